"""The small Triton kernels of a step: residual and norm, entry to attention, router, activations, sampling.

Run by Triton's interpreter in a process of its own (float32 only, as bfloat16 is wrong there), and compiled for Hopper.
tests/gpu/test_small.py runs the same cases on a device.
"""

from __future__ import annotations

import dataclasses
import random
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton.language as tl

from slipstream.ops import activation, attention_input, norm, router, sampling
from slipstream.ops.activation.reference import activation as activation_reference
from slipstream.ops.activation.triton import _gate
from slipstream.ops.activation.triton import activation as triton_activation
from slipstream.ops.attention_input.triton import _attention_input
from slipstream.ops.attention_input.triton import attention_input as triton_input
from slipstream.ops.choose import Case
from slipstream.ops.moe import Pairs
from slipstream.ops.norm.reference import add_norm as norm_reference
from slipstream.ops.norm.triton import REGISTERS, _add_norm
from slipstream.ops.norm.triton import add_norm as triton_norm
from slipstream.ops.router.kernels import at_once, choice, part
from slipstream.ops.router.reference import router as router_reference
from slipstream.ops.router.triton import BLOCK, TILE, add_norm_router
from slipstream.ops.router.triton import router as triton_router
from slipstream.ops.sampling import Row
from slipstream.ops.sampling.reference import draw as draw_reference
from slipstream.ops.sampling.reference import pick as pick_reference
from slipstream.ops.sampling.reference import stream
from slipstream.ops.sampling.torch import sample as torch_sample
from slipstream.ops.sampling.triton import _change, _filter, _finish, _race
from slipstream.ops.sampling.triton import draw as triton_draw
from slipstream.ops.sampling.triton import pick as triton_pick
from slipstream.ops.sampling.triton import sample as triton_sample
from slipstream.request import SamplingParams
from tests.ops import interpreter, test_attention_input
from tests.ops.test_sampling import asked_for, draw_case, drawn, random_logits
from tests.ops.test_triton import inside_nan

F32 = torch.float32
KINDS = ("silu", "gelu", "gelu_tanh", "swiglu_clamped")


def alone(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """All rows at once, once each row has been seen to have the same bits by itself."""
    whole = call(x)
    for i in {0, 1, len(x) // 2, len(x) - 1}:
        assert torch.equal(call(x[i : i + 1]), whole[i : i + 1]), i
    assert torch.equal(call(x), whole)
    return whole


def off(mine: Tensor, want: Tensor) -> float:
    return ((mine.double() - want.double()).abs().max() / want.double().abs().max()).item()


def add_norm(
    dtype: torch.dtype = F32, device: str = "cpu", rows: int = 7, width: int = 60, held: torch.dtype | None = None
) -> float:
    """The sum is exactly that of torch. `held`: dtype of the sum, where the norm has another."""
    torch.manual_seed(rows)
    x, delta = (inside_nan((3 * torch.randn(rows, width)).to(device, d)) for d in (held or dtype, dtype))
    weight = torch.rand(width).to(device, dtype if width % 2 == 0 else F32)
    total, found = triton_norm(x, delta, weight, 0.1, dtype)
    assert torch.equal(total, x + delta) and total.dtype == x.dtype and found.dtype == dtype
    both = torch.cat((x, delta.to(x.dtype)), 1)
    assert torch.equal(alone(lambda t: triton_norm(t[:, :width], t[:, width:], weight, 0.1, dtype)[1], both), found)
    assert torch.equal(triton_norm(total, None, weight, 0.1, dtype)[1], found)
    return off(found, norm_reference(total.double(), None, weight.double(), 0.1)[1])


def add_to_wide() -> None:
    assert add_norm(torch.float16, width=62, held=F32) < 1e-3


def left(
    rows: int, width: int, top_k: int, parts: int, sort: bool = False, dtype: torch.dtype = F32, device: str = "cpu"
) -> tuple[Pairs, Tensor]:
    """What experts left, some of it of experts of another rank, whose numbers nobody wrote; and the sum in float64."""
    torch.manual_seed(width)
    pairs = rows * top_k
    room = pairs + 11 if sort else pairs
    sums, shares = torch.randn(parts, room, width), torch.rand(rows, top_k)
    ids = torch.randint(7, (rows, top_k), dtype=torch.int32).where(torch.rand(rows, top_k) > 0.2, -1)
    places = torch.randperm(room)[:pairs] if sort else torch.arange(pairs)
    sums = sums.to(dtype if sort else F32)
    each = sums.double().sum(0)[places].view(rows, top_k, width) * (ids >= 0)[..., None]
    wanted = (each * shares[..., None]).sum(1).to(device)
    sums[:, places[ids.view(-1) < 0]] = torch.nan
    known = places.int().where(ids.view(-1) >= 0, -1).to(device) if sort else None
    return Pairs(sums.to(device), ids.to(device), shares.to(device), known, dtype), wanted


def add_left(*sizes: Any, dtype: torch.dtype = F32, device: str = "cpu") -> float:
    """The norm's own sum of what experts left is that of the kernel that does nothing else, to the last bit."""
    pairs, wanted = left(*sizes, dtype=dtype, device=device)
    x, weight = torch.randn(pairs.shape, device=device).to(dtype), torch.rand(pairs.shape[1], device=device).to(dtype)
    total, found = triton_norm(x, pairs, weight, 0.1)
    whole = pairs.sum()
    assert torch.equal(total, x + whole) and len(pairs) == len(x) and pairs.itemsize == x.itemsize
    exact = norm_reference(total.double(), None, weight.double(), 0.1)[1]
    return max(off(whole, wanted), off(found, exact))


def norm_alone(device: str = "cpu") -> float:
    """Parts of a wider tensor of three dims, no rows at all, and a NaN that stays in its row."""
    x, weight = torch.randn(7, 5, 60, device=device)[:, 1:4], torch.rand(60, device=device)
    same, whole = triton_norm(x, None, weight, 1e-5)
    assert same is x and whole.shape == x.shape and triton_norm(x[:0], None, weight, 1e-5)[1].shape == (0, 3, 60)
    bad = x.clone()
    bad[2, 1, 3] = torch.nan
    total, found = triton_norm(bad, x, weight, 1e-5)
    assert found.isnan().any(-1).nonzero().tolist() == [[2, 1]] and total.isnan().sum() == 1
    return off(whole, norm_reference(x.double(), None, weight.double(), 1e-5)[1])


def enter(
    dim: int | None, norms: bool, dtype: torch.dtype = F32, device: str = "cpu", sizes: Any = (), eager: bool = False
) -> float:
    if sizes and sizes[0] > 1:  # each token by itself writes and gives the same bits
        asked = test_attention_input.case(dim, norms, dtype, device, sizes)
        whole, keys = triton_input(**asked), asked["keys"].clone()
        turns = asked["turns"]
        for i in (0, sizes[0] - 1):
            row = slice(i, i + 1)
            one = asked | {"qkv": asked["qkv"][row], "slots": asked["slots"][row], "keys": torch.zeros_like(keys)}
            if turns is not None:
                one["turns"] = type(turns)(turns.positions[row], turns.frequencies, turns.factor, dtype)
            assert torch.equal(triton_input(**one), whole[row])
            assert torch.equal(one["keys"][one["slots"]], keys[one["slots"]])
    return test_attention_input.run(triton_input, dim, norms, dtype, device, sizes)


def enter_nan(device: str = "cpu") -> None:
    """A NaN in one token's query reaches that head alone; no token, no work."""
    asked = test_attention_input.case(20, True, F32, device)
    asked["qkv"][2, 1, 3] = torch.nan
    q = triton_input(**asked)
    assert q.isnan().any(-1).nonzero().tolist() == [[2, 1]] and not asked["keys"].isnan().any()
    assert triton_input(**asked | {"qkv": asked["qkv"][:0], "slots": asked["slots"][:0]}).shape == (0, 6, 20)


def route(
    experts: int, top_k: int, softmax_first: bool, renormalize: bool, dtype: torch.dtype = F32, device: str = "cpu",
    tokens: int = 13,
) -> float:  # fmt: skip
    """Numbers that often are equal, so that the order of equal ones shows; then a NaN, infinities and nothing."""
    torch.manual_seed(experts)
    logits = inside_nan((4 * torch.randn(tokens, experts)).round().div(2).to(device, dtype))
    logits[11] = torch.zeros(experts).where(torch.arange(experts) % 2 == 1, -0.0)
    options = {"softmax_first": softmax_first, "renormalize": renormalize}
    ids, weights = triton_router(logits, torch.clone, top_k, **options)
    want_ids, want = router_reference(logits, torch.clone, top_k, **options)
    assert ids.dtype == torch.int32 and weights.dtype == F32 and torch.equal(ids, want_ids)
    alone(lambda x: torch.cat([t.double() for t in triton_router(x, torch.clone, top_k, **options)], -1), logits)
    bad = logits.clone()
    bad[1, 2], bad[3, :4], bad[5] = torch.nan, -torch.inf, torch.nan
    bad[7, 3], bad[9] = torch.inf, -torch.inf
    found_ids, found = triton_router(bad, torch.clone, top_k, **options)
    bad_ids, bad_weights = router_reference(bad, torch.clone, top_k, **options)
    assert torch.equal(found.isnan(), bad_weights.isnan()), (found, bad_weights)
    assert torch.equal(found_ids[[0, 2, 3, 4, 6, 8]], bad_ids[[0, 2, 3, 4, 6, 8]])
    assert ((found_ids >= 0) & (found_ids < experts)).all()
    assert all(len(set(row)) == top_k for row in found_ids.tolist())
    assert triton_router(logits[:0], torch.clone, top_k, **options)[0].shape == (0, top_k)
    return off(weights, want)


@dataclass
class Layer:
    """A linear layer whose weight can be had, and which must not be called. Without `arrived` a kernel cannot do all at once."""

    dense: Tensor
    bias: Tensor | None
    arrived: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        raise AssertionError("the kernel has the weight")


def route_product(
    tokens: int = 19, hidden: int = 600, experts: int = 7, dtype: torch.dtype = F32, device: str = "cpu"
) -> float:
    """The product too: the error of the weights; the experts are those of float64 wherever it is not too close to call."""
    torch.manual_seed(hidden)
    x = inside_nan(torch.randn(tokens, hidden).to(device, dtype))
    weight = inside_nan((torch.randn(experts, hidden) * hidden**-0.5).to(device, dtype))
    bias = torch.randn(experts).to(device, dtype)
    logits, worst = x.double() @ weight.double().T, 0.0
    for layer in (Layer(weight, bias), Layer(weight, None)):
        exact = logits if layer.bias is None else logits + bias.double()
        ids, weights = triton_router(x, layer, 3, softmax_first=True, renormalize=False)
        alone(lambda x, layer=layer: triton_router(x, layer, 3, softmax_first=False)[1], x)
        shares = exact.softmax(-1)
        worst = max(worst, off(weights, shares.gather(1, ids.long())))
        clear = exact.sort(-1).values.diff(dim=-1).amin(-1) > (1e-5 if dtype == F32 else 0.04)
        want = exact.sort(-1, descending=True).indices[:, :3]
        assert torch.equal(ids[clear].long(), want[clear]) and (clear.any() or tokens < 20 or experts > 30)
        assert triton_router(x[:0], layer, 3, softmax_first=True)[0].shape == (0, 3)
    many = triton_router(x, lambda x: logits.to(dtype), 3, softmax_first=False, few=tokens - 1)
    assert torch.equal(many[0], triton_router(logits.to(dtype), torch.clone, 3, softmax_first=False)[0])
    bad = x.clone()
    bad[0, 5] = torch.nan
    assert triton_router(bad, layer, 3, softmax_first=True)[1].isnan().any(-1).nonzero().tolist() == [[0]]
    return worst


SPECIAL = {2: torch.nan, 3: torch.inf, 4: -torch.inf, 5: -torch.nan}


def choose(
    experts: int, top_k: int, softmax_first: bool, renormalize: bool, dtype: torch.dtype = F32, device: str = "cpu",
    tokens: int = 3, width: int = 52,
) -> float:  # fmt: skip
    """Product and choice in one kernel, of logits that are small integers, exact in any order of sums and often equal; then with
    biases that are no number or infinite; then of zeros with either sign."""
    torch.manual_seed(experts)
    options = {"softmax_first": softmax_first, "renormalize": renormalize}
    x = torch.randint(-2, 3, (tokens, width)).to(device, dtype)
    rows = torch.zeros(experts, width).scatter_(1, torch.randint(width, (experts, 3)), 1.0)
    layer = Layer(inside_nan(rows.to(device, dtype)), None, torch.zeros(8, dtype=torch.int32, device=device))
    biases: list[Tensor | None] = [None, *torch.randint(-2, 3, (2, experts)).to(device, dtype)]
    biases[2] = biases[1] - 20  # type: ignore[operator]  # all below zero
    for i, value in SPECIAL.items():
        biases.append(torch.full((experts,), value).where(torch.arange(experts) % 7 == i, 1.0).to(device, dtype))
    worst = 0.0
    for bias in (*biases, torch.full((experts,), -torch.inf, dtype=dtype, device=device)):
        layer.bias = bias
        ids, weights = triton_router(inside_nan(x), layer, top_k, **options)
        logits = x @ layer.dense.T if bias is None else x @ layer.dense.T + bias
        want_ids, want = router_reference(logits, torch.clone, top_k, **options)
        assert torch.equal(weights.isnan(), want.isnan()), (bias, weights, want)
        assert torch.equal(ids, want_ids), (bias, ids, want_ids)
        if want.isfinite().all():
            worst = max(worst, off(weights, want))
        assert layer.arrived is not None and not layer.arrived.any()
    layer.bias, size = None, 64  # a row with nothing beyond its end that would make a zero of it
    signs = torch.ones(experts, size).where(torch.arange(experts)[:, None] % 3 == 0, -1.0).to(device, dtype)
    layer.dense, x = signs, torch.full((tokens, size), -0.0, dtype=dtype, device=device)
    assert torch.equal(triton_router(x, layer, top_k, **options)[0].cpu(), torch.arange(top_k).int().expand(tokens, -1))
    assert triton_router(x[:0], layer, top_k, **options)[0].shape == (0, top_k)
    return worst


def after_norm(
    rows: int, width: int, experts: int, top_k: int, softmax_first: bool, renormalize: bool = True, bias: bool = False,
    parts: int = 0, left_k: int = 1, sort: bool = False, dtype: torch.dtype = F32, device: str = "cpu", wide: bool = False,
) -> float:  # fmt: skip
    """Residual, norm, product and choice in one kernel, against one after the other. The sum is exact.

    Args:
        parts: of what experts or a product left to add; 0: what is to be added is a tensor.
        wide: the residual is float32, and the norm of it in the dtype of the weight.
    """
    torch.manual_seed(width)
    kept = F32 if wide else dtype
    x = inside_nan((3 * torch.randn(rows, width)).to(device, kept))
    delta: Any = inside_nan(torch.randn(rows, width).to(device, dtype))
    if parts:
        delta = left(rows, width, left_k, parts, sort, dtype, device)[0]
    norm = (torch.rand(width) + 0.5).to(device, dtype if width % 4 else F32)
    weight = inside_nan((torch.randn(experts, width) * width**-0.5).to(device, dtype))
    layer = Layer(weight, torch.randn(experts).to(device, dtype) if bias else None)
    layer.arrived = torch.zeros(8, dtype=torch.int32, device=device)
    options = {"softmax_first": softmax_first, "renormalize": renormalize}

    def run(x: Tensor, delta: Any, top_k: int = top_k) -> tuple[Tensor, ...]:
        return add_norm_router(x, delta, norm, 0.1, layer, top_k, **options)

    total, normed, ids, weights = found = run(x, delta)
    for i in {0, rows // 2} if isinstance(delta, Tensor) else ():
        one = run(x[i : i + 1], delta[i : i + 1])
        assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(one, found, strict=True)), "a row by itself"
    assert all(torch.equal(a, b) for a, b in zip(run(x, delta), found, strict=True))
    if not wide:
        two = triton_norm(x, delta, norm, 0.1)
        assert torch.equal(total, two[0]) and off(normed, two[1]) <= (1e-6 if dtype == F32 else 1e-2)
    added = delta.double() if isinstance(delta, Tensor) else left(rows, width, left_k, parts, sort, dtype, device)[1]
    assert total.dtype == kept and off(total, x.double() + added) < (1e-6 if kept == F32 else 8e-3)
    exact = norm_reference(total.double(), None, norm.double(), 0.1)[1]
    logits = normed.double() @ weight.double().T
    logits = logits if layer.bias is None else logits + layer.bias.double()
    shares = (logits.softmax(-1) if softmax_first else logits).gather(1, ids.long())
    if not softmax_first:
        shares = shares.softmax(-1)
    elif renormalize:
        shares = shares / shares.sum(-1, keepdim=True)
    best = logits.sort(-1, descending=True)
    clear = -best.values[:, : top_k + 1].diff(dim=-1).amax(-1) > (1e-5 if dtype == F32 else 0.04)
    want = best.indices[:, :top_k]
    assert torch.equal(ids[clear].long(), want[clear]) and (clear.any() or dtype != F32)
    assert normed.dtype == dtype and ids.dtype == torch.int32 and not layer.arrived.any()
    same, alone, *picked = run(total, None)
    assert same is total and all(torch.equal(a, b) for a, b in zip((alone, *picked), found[1:], strict=True))
    bad = x.clone()
    bad[0, 5] = torch.nan
    total, normed, ids, weights = run(bad, delta)
    for t in (total, normed, weights):
        assert t.isnan().any(-1).nonzero().tolist() == [[0]]
    assert run(x[:0], None)[3].shape == (0, top_k)
    return max(off(found[1], exact), off(found[3], shares))


def gate(kind: str, dtype: torch.dtype = F32, device: str = "cpu", rows: int = 5, inner: int = 523) -> float:
    torch.manual_seed(inner)
    x = inside_nan((4 * torch.randn(rows, 2 * inner)).to(device, dtype))
    found = alone(lambda x: triton_activation(x, kind, 1.5), x)
    assert found.dtype == dtype and triton_activation(x[None], kind, 1.5).shape == (1, rows, inner)
    assert triton_activation(x[:0], kind).shape == (0, inner)
    assert torch.equal(triton_activation(x, kind, 1.5, torch.float16), triton_activation(x.float(), kind, 1.5).half())
    ends = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, 200.0, -200.0], device=device)
    ends = torch.cartesian_prod(ends, ends).T.reshape(1, -1)
    want = activation_reference(ends.double() if kind == "gelu" else ends, kind, 7.0)  # torch's erf may give NaN at inf
    found_ends = triton_activation(ends, kind, 7.0).to(want.dtype)
    torch.testing.assert_close(found_ends, want, equal_nan=True, rtol=1e-5, atol=1e-6)
    return off(found, activation_reference(x.double(), kind, 1.5))


def draws(rows: int, vocab: int, dtype: torch.dtype = F32, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(vocab)
    logits = inside_nan((3 * torch.randn(rows, vocab)).to(device, dtype))
    temperature = torch.tensor([0.0, 1.0, 0.3, 2.5, 1e-3, 0.0, 30.0] * rows)[:rows].to(device)
    starts = torch.tensor([stream(seed, 3 * seed) for seed in range(rows)], device=device)
    return logits, temperature, starts


def picked(dtype: torch.dtype = F32, device: str = "cpu", rows: int = 41, vocab: int = 2 * 2048 + 37) -> None:
    """The tokens of the reference, to the last; equal logits; rows that have none; one row alone."""
    logits, temperature, starts = draws(rows, vocab, dtype, device)
    tokens, ok = triton_pick(logits, temperature, starts)
    assert tokens.dtype == torch.int64 and ok.dtype == torch.bool and ok.all()
    assert torch.equal(tokens, pick_reference(logits, temperature, starts)[0])
    bad = logits.round()  # many are equal
    bad[1, 3], bad[2, -1], bad[3], bad[4, :-3], bad[5, 1:] = torch.nan, torch.inf, -torch.inf, -torch.inf, -torch.inf
    bad[6] = 0
    found, want = triton_pick(bad, temperature, starts), pick_reference(bad, temperature, starts)
    assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])
    assert found[1].logical_not().nonzero()[:, 0].tolist() == [1, 2, 3]
    again = triton_pick(logits[7:8], temperature[7:8], starts[7:8])
    assert again[0].item() == tokens[7].item()
    assert triton_pick(logits[:0], temperature[:0], starts[:0])[0].shape == (0,)


def differ(x: Tensor, rows: list[Row], seed: int, device: str = "cpu") -> int:
    """Rows that have another token than in the reference; one row alone has what it has beside others."""
    x = inside_nan(x.to(device))
    asked = asked_for(rows, x.shape[1], random.Random(seed), device)
    found = drawn(triton_draw, x, asked)
    i = len(rows) // 2
    assert drawn(triton_draw, x[i : i + 1], asked_for(rows[i : i + 1], x.shape[1], random.Random(seed), device)) == [
        found[i]
    ]
    return sum(a != b for a, b in zip(found, drawn(draw_reference, x, asked), strict=True))


def some_rows(device: str = "cpu") -> None:
    """Only those that are asked for, in a copy."""
    x, rows = random_logits(1, 5, 2 * 1024 + 37).to(device), []
    rows = [Row(SamplingParams(top_k=1 + i, top_p=0.9, logit_bias={7: 40.0}), (1,), (), i) for i in (0, 1)]
    part = dataclasses.replace(
        asked_for(rows, x.shape[1], random.Random(0), device), rows=torch.tensor([1, 3]).to(device)
    )
    assert drawn(triton_draw, x, part) == [None, 7, None, 7, None]


def sampled(device: str = "cpu", cases: int = 12) -> int:
    """Rows of any parameters, some of them with typical_p, that have another token than in torch's sampler."""
    differ = 0
    for seed in range(cases):
        x, rows = draw_case(seed)
        rows[::3] = [dataclasses.replace(r, params=r.params.replace(typical_p=0.9, temperature=0.8)) for r in rows[::3]]
        pairs = zip(triton_sample(x.to(device), rows), torch_sample(x.to(device), rows), strict=True)
        differ += sum(a != b for a, b in pairs)
    return differ


def interpreted() -> dict[str, Callable[[], float | None]]:
    cases: dict[str, Callable[[], float | None]] = {"add_norm": add_norm, "norm": norm_alone, "nan": enter_nan}
    cases["add_norm-wide"] = add_to_wide
    cases["add_norm-1"], cases["add_norm-odd"] = partial(add_norm, rows=1, width=257), partial(add_norm, width=61)
    cases["add_left-1"], cases["add_left-7"] = partial(add_left, 1, 60, 4, 3), partial(add_left, 7, 130, 3, 1)
    cases["add_left-sorted"] = partial(add_left, 5, 36, 8, 1, True)
    for dim in (None, 20, 12):
        for norms in (False, True):
            cases[f"enter-{dim}-{norms}"] = partial(enter, dim, norms)
    cases["enter-wide"] = partial(enter, 80, True, sizes=(3, 9, 3, 80, 7))
    for i, (first, again) in enumerate(((False, True), (True, True), (True, False))):
        cases[f"router-{i}"] = partial(route, 7, 3, first, again)
        cases[f"router-32-{i}"] = partial(route, 32, 4, first, again)
        for experts, k in ((23, 1), (7, 3), (37, 8)):
            cases[f"choose-{k}-{i}"] = partial(choose, experts, k, first, again)
        cases[f"after-norm-{i}"] = partial(after_norm, 3 + i, 60 + 21 * i, 9 + i, 1 + 2 * i, first, again, i != 1)
        cases[f"after-norm-left-{i}"] = partial(
            after_norm, 3 - i, 100 + 33 * i, 42 - 13 * i, 8 - i, first, again, i == 1, 4 - i
        )
    cases["after-norm-experts"] = partial(after_norm, 5, 36, 7, 2, True, parts=2, left_k=4)
    cases["after-norm-sorted"] = partial(after_norm, 3, 70, 33, 4, False, bias=True, parts=1, left_k=8, sort=True)
    cases["after-norm-1"] = partial(after_norm, 1, 1030, 32, 4, False, bias=True, parts=3)
    cases["router-256"], cases["router-300"] = partial(route, 256, 16, True, True), partial(route, 300, 5, False, True)
    cases["router-128"] = partial(route, 128, 8, True, True)
    cases["router-product"], cases["router-product-1"] = route_product, partial(route_product, 1, 130, 40)
    for kind in KINDS:
        cases[kind] = partial(gate, kind)
    cases["pick"], cases["draw-some"], cases["sample"] = picked, some_rows, lambda: float(sampled())
    for seed in range(24):
        cases[f"draw-{seed}"] = partial(lambda seed: float(differ(*draw_case(seed), seed)), seed)
    return cases


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return interpreter.run(__file__)


@pytest.mark.parametrize("case", interpreted())
def test_the_kernels_in_the_interpreter(results: dict[str, Any], case: str) -> None:
    found = results[case]
    assert found is None or (isinstance(found, float) and found < 5e-6), found


@pytest.mark.parametrize("op", [norm, attention_input, router, activation, sampling], ids=lambda op: op.__name__)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_they_serve_both_modes_and_say_what_they_need(
    op: Any, batch_invariant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "triton_invariant" if op is router and batch_invariant else "triton"
    reject = next(i.reject for i in getattr(op, "PICK", op.IMPLS) if i.name == name)

    def why(device: str = "cuda", capability: Any = (9, 0), **facts: Any) -> str:
        return str(reject(Case(device, "bfloat16", capability, {"batch_invariant": batch_invariant, **facts})))

    assert why() == "None"
    assert "CUDA" in why("cpu") and "6.1" in why(capability=(6, 1))
    if op is router:
        assert "1,024" in why(experts=1025)
        assert "another order" in str(op.IMPLS[0].reject(Case("cuda", "bfloat16", (9, 0), {"batch_invariant": True})))
    monkeypatch.setattr("slipstream.ops.choose.find_spec", lambda name: None)
    assert "pip install triton" in why()


LEFT = {"eps": "fp32", "sums": "*fp32", "ids": "*i32", "shares": "*fp32", "places": "*i32", "num_pairs": "i32"}
NOT_LEFT = {"sums": None, "ids": None, "shares": None, "places": None, "TOP_K": 0, "PARTS": 0}
CHOICE = {"SOFTMAX_FIRST": False, "RENORMALIZE": True}
ROUTER = {**CHOICE, "ROUND": tl.bfloat16}
AT_ONCE = {"eps": "fp32", "logits": "*fp32", "arrived": "*i32", "ids": "*i32", "weights": "*fp32", "sums": "*fp32"} | {
    "left_ids": "*i32", "shares": "*fp32", "places": "*i32", "num_pairs": "i32"
}  # fmt: skip
ALL_GIVEN = {"sums": None, "left_ids": None, "shares": None, "places": None, "LEFT_K": 0, "PARTS": 0}
KERNELS: dict[
    str, tuple[Any, dict[str, Any], dict[str, str], int]
] = {  # constants, types that are not bf16 or i32, warps
    "add_norm": (_add_norm, {"SIZE": 4096, **NOT_LEFT}, {"eps": "fp32"}, 8),
    "add_norm_wide": (_add_norm, {"SIZE": 4096, **NOT_LEFT}, {"eps": "fp32", "x": "*fp32", "total": "*fp32"}, 8),
    "add_left": (_add_norm, {"SIZE": 4096, "TOP_K": 4, "PARTS": 2, "delta": None, "places": None}, LEFT, 16),
    "add_left_sorted": (_add_norm, {"SIZE": 2048, "TOP_K": 8, "PARTS": 1, "delta": None}, LEFT, 8),
    "attention_input": (
        _attention_input,
        {"HEAD_DIM": 64, "HALF": 32, "HEADS": 8, "SIZE": 64, "q_weight": None, "k_weight": None},
        {"positions": "*i64", "freq": "*fp32", "slots": "*i64", "factor": "fp32", "eps": "fp32"},
        4,
    ),
    "router": (choice, {"EXPERTS": 32, "PARTS": 15, **ROUTER}, {"logits": "*fp32", "ids": "*i32", "weights": "*fp32"}, 1),
    "router_512": (
        choice,
        {"EXPERTS": 512, "PARTS": 11, **ROUTER},
        {"logits": "*fp32", "ids": "*i32", "weights": "*fp32"},
        1,
    ),
    "at_once": (at_once, {"EXPERTS": 128, "WARPS": 8, "SIZE": 4096, **CHOICE, **ALL_GIVEN}, AT_ONCE, 8),
    "at_once_left": (
        at_once,
        {"EXPERTS": 128, "WARPS": 8, "SIZE": 2048, "SOFTMAX_FIRST": True, "RENORMALIZE": True}
        | {"delta": None, "bias": None, "places": None, "LEFT_K": 1, "PARTS": 4},
        AT_ONCE,
        8,
    ),
    "at_once_normed": (
        at_once,
        {"EXPERTS": 32, "WARPS": 8, "SIZE": 4096, **CHOICE, **ALL_GIVEN}
        | {"delta": None, "scale": None, "total": None, "out": None},
        AT_ONCE,
        8,
    ),
    "at_once_left_to_experts": (
        at_once,
        {"EXPERTS": 128, "WARPS": 8, "SIZE": 2048, **CHOICE, **ALL_GIVEN, "arrived": None},
        AT_ONCE,
        8,
    ),
    "at_once_widest": (at_once, {"EXPERTS": 256, "WARPS": 16, "SIZE": 8192, **CHOICE, **ALL_GIVEN}, AT_ONCE, 16),
    "at_once_float32": (
        at_once,
        {"EXPERTS": 64, "WARPS": 16, "SIZE": 8192, **CHOICE, **ALL_GIVEN},
        AT_ONCE | dict.fromkeys(("x", "delta", "scale", "weight", "bias", "total", "out"), "*fp32"),
        16,
    ),
    "router_product": (part, {"STEPS": 3, "BLOCK_N": 32, **TILE}, {"out": "*fp32"}, 4),
    "activation": (_gate, {"KIND": "swiglu_clamped", "BLOCK": 512}, {"limit": "fp32"}, 4),
    "race": (
        _race,
        {"PIECE": 1024},
        {"logits": "*fp32", "temperature": "*fp32", "starts": "*i64", "found": "*fp32", "ids": "*i32"},
        4,
    ),
    "finish": (
        _finish,
        {"PIECES": 256},
        {"temperature": "*fp32", "found": "*fp32", "ids": "*i32", "tokens": "*i64", "ok": "*i1"},
        1,
    ),
    "change": (
        _change,
        {"BLOCK": 1024},
        {
            "x": "*fp32", "bounds": "*i64", "newest": "*i64", "numbers": "*fp64", "tokens": "*i32", "marks": "*i32",
            "biases": "*fp32",
        },
        4,
    ),
    "filter": (
        _filter,
        {"BLOCK": 2048},
        {
            "found": "*fp32", "starts": "*i64", "top_ks": "*i64", "numbers": "*fp64", "kept": "*i32", "tokens": "*i64",
            "ok": "*i1",
        },
        16,
    ),
}  # fmt: skip
NUMBERS = (
    "x_stride", "delta_stride", "w_stride", "part_stride", "stride", "width", "heads", "kv_heads", "experts", "top_k", "inner",
    "vocab", "size", "pieces", "tokens", "hidden", "each", "rows",
    "num_pairs",
)  # fmt: skip


LOADS = {
    "at_once_left": 1 + 4 * 2,
    "add_left": 1 + 8 * 2,
    "add_left_sorted": 1 + 8 * 2,
}  # four numbers each, or eight of x


def counts_right(before: str, after: str, weights: int) -> None:
    """What the kernel's docstring says of who sees what, in PTX: stores, a barrier, one thread's add that releases and acquires, a
    barrier, loads past the L1. Then each warp goes on by itself."""
    words = r"bar\.sync|(?<=@)%p\d+ atom\S+|(?:ld|st|atom|red)\.global\S*|redux\S+|fence\S*|membar\S*"
    found = re.findall(words, after)
    (at,) = (i for i, word in enumerate(found) if "atom" in word)
    assert re.fullmatch(r"%p\d+ atom\.global\.gpu\.acq_rel\.add\.u32", found[at]), found[at]
    assert found[at - 2 : at] == ["st.global.b32", "bar.sync"] and found[at + 1] == "bar.sync", found
    rest = [word for word in found[at + 2 :] if not word.startswith("redux")]
    assert rest[0] == "st.global.b32" and rest[1].startswith("ld.global.cg") and "bar.sync" not in rest, rest
    assert (
        all(word.startswith("ld.global.cg") for word in rest if word.startswith("ld")) and "redux.sync.max.s32" in found
    )
    assert len(re.findall(r"ld\.global\.v4", before)) >= weights, "weights are there before the tokens are"


@pytest.mark.parametrize("name", KERNELS)
def test_it_compiles_for_hopper_without_spills(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, constants, types, warps = KERNELS[name]
    chained = "CHAIN" in kernel.arg_names
    constants = constants | ({"CHAIN": True} if chained else {})
    signature = {
        a: "constexpr" if a in constants else types.get(a, "i32" if a in NUMBERS else "*bf16") for a in kernel.arg_names
    }
    whole = {  # multiples of 16, as they are in the models
        (i,): [["tt.divisibility", 16]]
        for i, a in enumerate(kernel.arg_names)
        if signature[a][0] == "*" or "stride" in a or a in ("width", "hidden", "inner")
    }
    if kernel is at_once:
        constants = constants | {"BLOCK_N": BLOCK}
        signature["BLOCK_N"] = "constexpr"
    source = ASTSource(kernel, signature, constants, whole)
    options = {"num_warps": warps, "enable_fp_fusion": name != "change"}
    if kernel in (at_once, choice) or name.startswith("add_left"):
        options["maxnreg"] = REGISTERS
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = made.asm["ptx"]
    cubin = tmp_path / "cubin"
    cubin.write_bytes(made.asm["cubin"])

    def dump(what: str) -> str:
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        return subprocess.run([tool, what, cubin], capture_output=True, text=True, check=True).stdout

    if name in ("change", "filter") or "maxnreg" in options:
        used = dump("-res-usage")
        assert "STACK:0 " in used and "LOCAL:0 " in used, used
        assert name != "change" or "fma" not in ptx  # products are rounded before they are added, as in the reference
    before, wait, after = ptx.partition("griddepcontrol.wait")
    assert bool(wait) == chained == ("griddepcontrol.launch_dependents" in ptx)
    assert not chained or ("st.global" in after and "st.global" not in before)  # an earlier kernel may still read there
    assert name != "attention_input" or ".b16" not in "".join(x for x in ptx.splitlines() if "ld.global" in x)
    if kernel is at_once and "arrived" in constants:
        last = ptx.rpartition("st.global.b32")[0]
        assert "atom" not in ptx and "bar.sync" in last and "bar.sync" not in ptx[len(last) :], (
            "nobody waits, and nobody chooses"
        )
    elif kernel is at_once:
        counts_right(before, after, {"at_once_widest": 4 * 2, "at_once_float32": 4 * 4}.get(name, 4))
    if name in LOADS:  # all of a sum is asked for before any of it is waited for
        first = re.split(r"FADD|FFMA", dump("-sass").split("ACQBULK")[1])[0]
        assert len(re.findall(r"LDG\.E\.128", first)) == LOADS[name]
    stack = 32 if name == "attention_input" else 0  # angles of more than 105,615 are reduced by a table on the stack
    held = [line for line in ptx.splitlines() if line.strip().startswith(".local")]
    assert sum(int(line.partition("[")[2].partition("]")[0]) for line in held) <= stack, held


if __name__ == "__main__":
    interpreter.main(interpreted())
