"""Every op that batch_invariant takes on a CPU: a row's result has the same bits alone and at any place among any number."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.ops import activation, attention_input, linear, moe, norm, router, sampling
from slipstream.ops.choose import Case, Choice, choose
from slipstream.ops.formats import decode
from slipstream.ops.linear import blocks, native
from slipstream.ops.rope import Turns
from slipstream.ops.sampling import Row
from slipstream.request import SamplingParams
from tests.ops.test_linear import _levels, _numbers, _weight, compiled

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16)
FORMATS = ("dense", "int8", "int4-32", "int4-128", "mxfp4", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")


def chosen(op: str, impls: Any, dtype: torch.dtype, **facts: Any) -> Choice:
    case = Case("cpu", str(dtype)[6:], None, {"batch_invariant": True, **facts})
    return choose(op, impls, case)


def check(call: Callable[[Tensor], Tensor], x: Tensor, counts: Sequence[int] = (2, 3, 5, 16, 33)) -> Tensor:
    """Every row alone, and every number of rows at several places, against all rows at once."""
    torch.set_num_threads(2)
    try:
        whole = call(x)
        for i in range(len(x)):
            assert torch.equal(call(x[i : i + 1].clone()), whole[i : i + 1]), i
        for count in counts:
            for at in {0, 1, 3, len(x) - count}:
                if 0 <= at <= len(x) - count:
                    assert torch.equal(call(x[at : at + count]), whole[at : at + count]), (at, count)
    finally:
        torch.set_num_threads(1)
    return whole


def product(
    kernel: Any, format: str, dtype: torch.dtype, out: int, width: int, counts: Sequence[int] = range(1, 41)
) -> None:
    torch.manual_seed(out)
    weight, x = _weight(format, out, width), torch.randn(70, width).to(dtype)
    packed, bias = kernel.prepare(weight, dtype), torch.randn(out).to(dtype)
    found = check(lambda x: kernel(x, packed, bias), x, counts)
    want = (
        x.double() @ (_numbers(weight, dtype) if format == "dense" else decode(weight, F32).double()).T + bias.double()
    )
    tolerance = {F32: 2e-6, BF16: 6e-3, F16: 8e-4}[dtype]
    assert (found.double() - want).abs().max() < 4 * tolerance * want.abs().max()


@pytest.mark.parametrize(
    ("format", "dtype"), [(f, d) for f in FORMATS for d in (F32, BF16, F16) if d != F16 or f in FORMATS[:4]]
)
def test_linear(format: str, dtype: torch.dtype) -> None:
    choice = chosen("linear", linear.IMPLS, dtype, format=format.partition("-")[0], in_features=768, out_features=67)
    assert choice.name.endswith("_invariant")
    product(choice.fn, format, dtype, 67, 768)


@pytest.mark.parametrize("width", [1, 15, 33, 95])
@pytest.mark.parametrize(("format", "dtype"), [("dense", F32), ("dense", BF16), ("dense", F16), ("int8", F32)])
def test_linear_of_any_width(format: str, dtype: torch.dtype, width: int) -> None:
    product(native.Native(), format, dtype, 7, width, (2, 3, 7))


@pytest.mark.parametrize("level", _levels())
def test_linear_on_an_older_processor(level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ctypes.CDLL(str(compiled("dense", level, tmp_path, strict=True)))
    monkeypatch.setattr("slipstream.ops.native.build", lambda name, strict: made)
    for format, dtype in (("dense", F32), ("dense", BF16), ("dense", F16), ("int8", F32), ("int4-32", BF16)):
        product(native.Native(), format, dtype, 67, 768, (2, 3, 7))


@pytest.mark.slow
def test_blocks_on_an_older_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ctypes.CDLL(str(compiled("blocks", _levels()[0], tmp_path, strict=True)))
    monkeypatch.setattr("slipstream.ops.native.build", lambda name, strict: made)
    for format, dtype in (("mxfp4", F32), ("Q4_1", BF16), ("Q4_K", BF16)):
        product(blocks.Blocks(invariant=True), format, dtype, 67, 768, (2, 3, 7))


@pytest.mark.parametrize("width", [1, 13, 64, 1537])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "swiglu_clamped"])
def test_activation(kind: str, dtype: torch.dtype, width: int) -> None:
    call = chosen("activation", activation.IMPLS, dtype).fn
    torch.manual_seed(width)
    x = 4 * torch.randn(70, 2 * width).to(dtype)
    found = check(lambda x: call(x, kind, 1.5), x)
    want = activation.IMPLS[-1].load()(x.double(), kind, 1.5)
    torch.testing.assert_close(found.double(), want, rtol=1e-5 if dtype == F32 else 8e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_at_the_ends(dtype: torch.dtype) -> None:
    call = chosen("activation", activation.IMPLS, dtype).fn
    ends = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, 200.0, -200.0], dtype=dtype)
    x = torch.cat((ends, torch.ones_like(ends)))[None]
    for kind in ("silu", "gelu", "gelu_tanh", "swiglu_clamped"):
        want = activation.IMPLS[-1].load()(x.double(), kind, 7.0)
        torch.testing.assert_close(call(x, kind, 7.0).double(), want, equal_nan=True, rtol=8e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(60,), (6, 20), (2, 2049)])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    call = chosen("norm", norm.IMPLS, dtype, width=shape[-1]).fn
    x = torch.randn(40, 3, *shape).to(dtype)[:, 1]  # rows apart, as queries are within qkv
    for weight in (torch.rand(shape[-1]), torch.rand(shape[-1]).to(dtype)):
        check(lambda x, weight=weight: call(x, -x / 2, weight, 1e-5)[1], x)  # type: ignore[misc]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [False, True], ids=["", "norms"])
@pytest.mark.parametrize(("heads", "dim", "turned"), [(3, 10, 10), (5, 64, 64), (2, 24, 18)])
def test_attention_input(heads: int, dim: int, turned: int, norms: bool, dtype: torch.dtype) -> None:
    """Queries, and what is in the cache for each token afterwards."""
    call = chosen("attention_input", attention_input.IMPLS, dtype).fn
    freq, all_heads = torch.linspace(1, 0.001, turned // 2), heads + 4
    weights = (torch.rand(dim), torch.rand(dim), 1e-5) if norms else None
    x = torch.cat((torch.randn(70, all_heads * dim), torch.arange(70)[:, None]), -1).to(dtype)

    def enter(x: Tensor) -> Tensor:
        positions = x[:, -1].long()
        keys, values = torch.zeros(2, 70, 2, dim, dtype=dtype)
        turns = Turns(positions * 37, freq, 1.0, dtype, row_by_row=True)
        q = call(x[:, :-1].reshape(-1, all_heads, dim), turns, weights, keys, values, positions)
        return torch.cat((q, keys[positions], values[positions]), 1)

    check(enter, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", [5, 32, 128])
def test_router(experts: int, dtype: torch.dtype) -> None:
    call = chosen("router", router.IMPLS, dtype, experts=experts).fn
    x = 2 * torch.randn(70, experts).to(dtype)
    for softmax_first, renormalize in ((True, True), (True, False), (False, False)):
        options = {"softmax_first": softmax_first, "renormalize": renormalize}
        check(lambda x, options=options: torch.cat([t.double() for t in call(x, torch.clone, 3, **options)], -1), x)  # type: ignore[misc]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", moe.IMPLS[1:], ids=lambda i: i.name)  # triton rejects the mode
def test_experts(impl: Any, dtype: torch.dtype) -> None:
    experts, hidden, inner = 7, 24, 10
    kernel, act = native.Native(), chosen("activation", activation.IMPLS, dtype).fn
    stacks = [
        [kernel.prepare(_weight("dense", o, i, e), dtype) for e in range(experts)] for o, i in ((20, 24), (24, 10))
    ]
    gate_up, down = ((lambda x, e, s=s: kernel(x, s[e], None)) for s in stacks)
    logits = torch.randn(70, experts)

    def run(x: Tensor) -> Tensor:
        best, ids = logits[x[:, -1].long()].topk(3)
        return impl.load().experts(
            x[:, :hidden], ids, F.softmax(best, -1), gate_up, down, act, kind="swiglu_clamped", limit=7.0
        )

    assert inner * 2 == 20
    check(run, torch.cat((torch.randn(70, hidden), torch.arange(70)[:, None]), -1).to(dtype))


def test_sampling() -> None:
    call = chosen("sampling", sampling.IMPLS, F32).fn
    params = [
        SamplingParams(seed=i, temperature=0.5 + i / 70, top_k=i % 3 * 20, top_p=1 - i % 2 / 5) for i in range(70)
    ]

    def draw(x: Tensor) -> Tensor:
        rows = [Row(params[i], (1, 2), (3,) * (i % 5), i) for i in x[:, -1].long().tolist()]
        return torch.tensor(call(x[:, :-1].contiguous(), rows))[:, None]

    check(draw, torch.cat((torch.randn(70, 97), torch.arange(70)[:, None]), -1))


def test_what_torch_does_otherwise_is_seen() -> None:
    """The check itself fails where bits differ: torch's product, and its activation, on odd sizes."""
    weight = torch.randn(67, 768)
    with pytest.raises(AssertionError):
        check(lambda x: F.linear(x, weight), torch.randn(70, 768))
    with pytest.raises(AssertionError):
        check(F.silu, 3 * torch.randn(70, 33))


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("op", [activation, linear, norm], ids=lambda op: op.__name__.rpartition(".")[2])
def test_normal_implementations_say_why_not(op: Any, device: str) -> None:
    case = Case(
        device, "bfloat16", (9, 0), {"batch_invariant": True, "format": "dense", "in_features": 64, "width": 64}
    )
    for impl in op.IMPLS:
        fine = impl.name.endswith("_invariant") or (op, impl.name) in (
            (norm, "reference"),
            (norm, "triton"),
            (activation, "triton"),
            (activation, "torch"),
            (activation, "reference"),
        )
        assert fine or impl.reject(case), impl.name
    for name, device in (("native_invariant", "cuda"), ("triton_invariant", "cpu"), ("triton", "cpu")):
        for impl in op.IMPLS:
            assert impl.name != name or impl.reject(Case(device, "bfloat16", None, {**case.facts, "format": "int8"}))
