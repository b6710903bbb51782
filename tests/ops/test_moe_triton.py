"""The Triton experts without a GPU: run by Triton's interpreter in a process of its own (it must be asked for before the
kernels are imported; bfloat16 is wrong there, so float32 only), and compiled for Hopper."""

from __future__ import annotations

import contextlib
import itertools
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.errors import KernelError
from slipstream.layers.mlp import MoE
from slipstream.layers.norm import Norm
from slipstream.layers.ops import ExpertsChoice, Ops
from slipstream.ops.activation.reference import activation
from slipstream.ops.formats import Weight, decode, encode
from slipstream.ops.moe import ExpertsKernel, Pairs
from slipstream.ops.moe.reference import experts as reference

pytest.importorskip("triton")

from slipstream.ops.moe import kernels
from slipstream.ops.moe import layout as layouts
from slipstream.ops.moe import triton as module
from slipstream.ops.moe.layout import PLACES, laid_out, prepare
from slipstream.ops.moe.triton import TABLE, Alone, Tiles, experts, stacks
from slipstream.ops.norm.triton import add_norm
from slipstream.ops.router import Logits
from slipstream.ops.router.triton import add_norm_router, router
from slipstream.parallel.collectives import Parts
from tests.ops import interpreter

HIDDEN, INNER, EXPERTS, TOP_K = 160, 96, 5, 2
F32 = torch.float32


ALONE = (Alone(8, 1), Alone(2, 2), Alone(4, 2, 1), Alone(2, 4, 2), Alone(1, 2, 4))


def linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor, int], Tensor]:
    return lambda x, e: F.linear(x, weight[e], None if bias is None else bias[e])


def stack(format: str, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> Weight:
    values = torch.randn(shape, device=device) * shape[-1] ** -0.5 * 2
    return encode(values, format) if format == "mxfp4" else Weight("dense", values.to(dtype), shape)


def case(
    format: str,
    tokens: int,
    kind: str,
    dtype: torch.dtype = F32,
    device: str = "cpu",
    sizes: tuple[int, int, int, int] = (HIDDEN, INNER, EXPERTS, TOP_K),
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the kernels give and what float64 gives. What the kernels allocate starts as NaN."""
    hidden, inner, number, top_k = sizes
    torch.manual_seed(tokens)
    shapes = (number, 2 * inner, hidden), (number, hidden, inner)
    weights = [stack(format, shape, dtype, device) for shape in shapes]
    biased = kind == "swiglu_clamped"
    biases = [torch.randn(shape[:2], device=device).to(dtype) if biased else None for shape in shapes]
    x = (3 * torch.randn(tokens, hidden, device=device)).to(dtype)
    if ids is None:
        ids = torch.rand(tokens, number, device=device).topk(top_k).indices
    shares = torch.rand(tokens, top_k, device=device).softmax(-1)
    layers = [
        linear(decode(w, F32).double(), None if b is None else b.double()) for w, b in zip(weights, biases, strict=True)
    ]
    wanted = reference(x.double(), ids, shares.double(), *layers, activation, kind=kind, limit=1.5)
    gate_up, down = (prepare(w, dtype, gated=i == 0) for i, w in enumerate(weights))
    empty = torch.empty
    torch.empty = poisoned  # type: ignore[assignment]
    try:
        found = experts(x, ids, shares, gate_up, biases[0], down, biases[1], kind=kind, limit=1.5)
    finally:
        torch.empty = empty
    assert found.dtype == dtype and found.shape == x.shape
    return found, wanted


def error(*args: Any, **kwargs: Any) -> float:
    found, wanted = case(*args, **kwargs)
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def tiled(tiles: Tiles, *args: Any, **kwargs: Any) -> float:
    before = module.choose_tiles, module.choose_group, module.choose_alone
    module.choose_tiles, module.choose_group, module.choose_alone = lambda *_: tiles, lambda *_: 0, lambda *_: None
    try:
        return error(*args, **kwargs)
    finally:
        module.choose_tiles, module.choose_group, module.choose_alone = before


def alone(choice: Alone, *args: Any, **kwargs: Any) -> float:
    """Where each pair is by itself."""
    used, before = [], module.choose_alone

    def choose(stack: Any, dtype: Any, pairs: int, kind: str | None) -> Alone:
        used.append(kind)
        return choice

    module.choose_alone = choose
    try:
        found = error(*args, **kwargs)
    finally:
        module.choose_alone = before
    assert None in used and len(set(used)) == 2
    return found


def in_parts(choice: Alone, parts: int, width: int, device: str = "cpu") -> float:
    """A sum in parts, with as many products in a warp as the width makes necessary, beside float64."""
    torch.manual_seed(width)
    weight = stack("mxfp4", (3, 80, width), F32, device)
    packed = prepare(weight.map(torch.clone), F32)
    x, bias = torch.randn(1, width, device=device), torch.randn(3, 80, device=device)
    ids = torch.tensor([2, -1, 0], dtype=torch.int32, device=device)
    out = torch.full((parts, 3, 80), torch.nan, device=device)
    module.run_alone(x, packed, bias, ids, out, choice, 3, None, 0.0)
    numbers = decode(weight, F32).double()
    wanted = torch.stack([numbers[e] @ x[0].double() + bias[e].double() for e in (2, 0)])
    assert out[:, 1].isnan().all(), "a pair of another rank is nobody's here"
    return ((out[:, [0, 2]].double().sum(0) - wanted).abs().max() / wanted.abs().max()).item()


def beside_tiles() -> float:
    """One product by itself and one in tiles, of which four warps want the inputs in another order."""
    worst = 0.0
    for warps, which in itertools.product((2, 4), ({"silu"}, {None}, {"silu", None})):
        tiles = Tiles(True, 8, warps, 4, warps, 3)
        before = module.choose_tiles, module.choose_alone
        module.choose_tiles = lambda *_, tiles=tiles: tiles
        module.choose_alone = lambda *a, which=which: Alone(4, 1) if a[3] in which else None
        try:
            worst = max(worst, error("mxfp4", 1, "silu", sizes=(192, 96, 5, 2)))
        finally:
            module.choose_tiles, module.choose_alone = before
    return worst


def grouped(size: int, *args: Any, **kwargs: Any) -> float:
    before, module.choose_group = module.choose_group, lambda *_: size
    try:
        return error(*args, **kwargs)
    finally:
        module.choose_group = before


def bits(*found: Tensor | None) -> list[Tensor]:
    """To be compared, as NaN is not equal to itself."""
    views = {2: torch.int16, 4: torch.int32}
    return [torch.empty(0) if t is None else t.view(views[t.itemsize]) for t in found]


def late(
    choice: Alone | Tiles | None, softmax_first: bool, renormalize: bool = True, kind: str = "silu", dtype: torch.dtype = F32,
    device: str = "cpu", sizes: tuple[int, int, int, int] = (64, 32, EXPERTS, TOP_K), normed: bool = False,
    format: str = "mxfp4",
) -> float:  # fmt: skip
    """A choice that is left to the experts is the router's own, to the last bit, and so is all that follows from it: of logits that
    often are equal, of any, and of some that are no number or infinite.

    Args:
        choice: None: what is chosen for these sizes.
        normed: there is a norm already, as where it is one kernel with a sum over ranks.
    """
    hidden, inner, number, top_k = sizes
    torch.manual_seed(number)
    shapes = (number, 2 * inner, hidden), (number, hidden, inner)
    gate_up, down = (prepare(stack(format, s, dtype, device), dtype, gated=i == 0) for i, s in enumerate(shapes))
    biases = [torch.randn(s[:2], device=device).to(dtype) if kind != "silu" else None for s in shapes]
    norm = torch.ones(hidden, dtype=dtype, device=device)
    how: dict[str, bool] = {"softmax_first": softmax_first, "renormalize": renormalize}
    whole, zeros = torch.randint(-2, 3, (1, hidden), device=device).to(dtype), torch.zeros(number, hidden)
    some = zeros.scatter(1, torch.randint(hidden, (number, 3)), 1.0).to(device, dtype)
    any_weight = (torch.randn(number, hidden) * hidden**-0.5).to(device, dtype)
    by_number, ends = torch.arange(number) % 7, torch.tensor([1, 1, torch.nan, torch.inf, -torch.inf, -torch.nan, 1])
    few = torch.where(by_number == 3, 1, -torch.inf)
    layers = (some, None), (any_weight, torch.randn(number)), (some, ends[by_number]), (some, few)
    before = module.choose_tiles, module.choose_alone
    if choice is not None:
        module.choose_alone = lambda *_: choice if isinstance(choice, Alone) else None
    if isinstance(choice, Tiles):
        module.choose_tiles = lambda *_: choice
    empty = torch.empty
    try:
        for weight, bias in layers:
            arrived = torch.zeros(8, dtype=torch.int32, device=device)
            layer = SimpleNamespace(
                dense=weight, bias=None if bias is None else bias.to(device, dtype), arrived=arrived
            )
            found: list[list[Tensor]] = []
            torch.empty = poisoned  # type: ignore[assignment]
            for logits in (None, Logits(torch.empty(1, number, dtype=F32, device=torch.device(device)), **how)):
                left = {} if logits is None else {"logits": logits}
                if normed:
                    total, h = None, whole
                    ids, shares = router(h, layer, top_k, **how, **left)
                else:
                    total, h, ids, shares = add_norm_router(whole, whole, norm, 1e-5, layer, top_k, **how, **left)
                out = experts(
                    h, ids, shares, gate_up, biases[0], down, biases[1], kind=kind, limit=1.5, leave=True, **left
                )
                found.append([ids, *bits(total, h, out.sums, shares)])
                found[-1] += [out.sum()] if shares.isfinite().all() else []
            torch.empty = empty
            if device == "cpu":  # where numpy adds in another order as there are more warps
                torch.testing.assert_close(
                    found[0].pop(4).view(F32), found[1].pop(4).view(F32), equal_nan=True, rtol=1e-6, atol=0
                )
                found[0][4:], found[1][4:] = [], []
            differ = [i for i, (a, b) in enumerate(zip(*found, strict=True)) if not torch.equal(a, b)]
            assert not differ, (differ, bias, found[0][0], found[1][0])
            assert not (ids < 0).any() and ids.dtype == torch.int32 and not arrived.any()
    finally:
        torch.empty = empty
        module.choose_tiles, module.choose_alone = before
    return 0.0


def layer(
    kind: str, top_k: int, sizes: tuple[int, int, int] = (64, 32, 5), dtype: torch.dtype = F32, device: str = "cpu"
) -> float:
    """A layer of gpt-oss or of Qwen3-MoE, whose experts choose for a token alone: what it gives, and what the next norm makes of
    that, are as in a layer whose router chooses. So also where the norm before it is one kernel with a sum over ranks."""
    (hidden, inner, number), oss = sizes, kind != "silu"
    torch.manual_seed(top_k)

    class Dense:
        def prepare(self, weight: Weight, dtype: torch.dtype) -> tuple[Tensor]:
            return (weight.data,)

    class Sums:
        def reduce_norm(self, part: Tensor, x: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
            return add_norm(x, part, more[0], more[1])

    chosen: list[bool] = []

    def run(*given: Any, **how: Any) -> Any:
        chosen.append("logits" in how)
        return stacks(*given, **how, leave=True)

    choice, no = ExpertsChoice(), Any
    choice.kernel = ours = ExpertsKernel(run, prepare, chooses=8)
    given: Any = add_norm, no, no, no, router, choice, lambda *_: Dense(), dtype
    ops = Ops(*given, adds=True, add_norm_router=add_norm_router)
    held = partial(torch.nn.Parameter, requires_grad=False)
    config: Any = SimpleNamespace(
        hidden_size=hidden, moe_intermediate_size=inner, num_experts=number, num_experts_per_tok=top_k, swiglu_limit=7.0
    )
    mlp, norm = MoE(ops, config, kind=kind, softmax_first=not oss, bias=oss), Norm(ops, hidden, 1e-5)
    norm.weight = held(torch.rand(hidden, device=device).to(dtype))
    weight = (torch.randn(number, hidden, device=device) * hidden**-0.5).to(dtype)
    mlp.router.accept(Weight("dense", weight, (number, hidden)))
    for part in (mlp.gate_up, mlp.down):
        part.accept(stack("mxfp4", part.shape, dtype, device))
    for one in (mlp.router, mlp.gate_up, mlp.down) if oss else ():
        shape = one.bias.shape  # type: ignore[union-attr]
        one.bias = held(torch.randn(shape, device=device).to(dtype))
    worst = 0.0
    for tokens, summed in ((1, False), (1, True), (2, False)):
        x, delta = torch.randn(2, tokens, hidden, device=device).to(dtype)
        found = []
        for kernel in (ours, ExpertsKernel(run, prepare)):
            choice.kernel = kernel
            total, out = mlp(norm, x, Parts(delta, Sums(), None) if summed else delta)  # type: ignore[arg-type]
            assert isinstance(out, Pairs)
            found.append([total, out.sums, out.ids, out.weights, *add_norm(total, out, norm.weight, 1e-5)])
        assert chosen[-2:] == [tokens == 1 and top_k <= 8, False]
        same = 3 if device == "cpu" else 6  # numpy adds in another order where there are more warps
        assert all(torch.equal(a, b) for a, b in zip(found[0][:same], found[1][:same], strict=True))
        worst = max(
            worst,
            *(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found[0][3:], found[1][3:], strict=True)),
        )
    return worst


def poisoned(*size: Any, dtype: torch.dtype = F32, device: Any = None) -> Tensor:
    return torch.zeros(*size, dtype=dtype, device=device).fill_(-99 if dtype == torch.int32 else torch.nan)


def interpreted() -> dict[str, Callable[[], float]]:
    cases: dict[str, Callable[[], float]] = {
        f"{format}-{tokens}-{kind}": partial(error, format, tokens, kind)
        for format, tokens, kind in (
            ("mxfp4", 1, "swiglu_clamped"),
            ("mxfp4", 19, "silu"),
            ("dense", 1, "silu"),
            ("dense", 19, "swiglu_clamped"),
        )
    }
    for name, tiles in {
        "few": Tiles(True, 8, 2, 8, 2, 4),
        "left": Tiles(True, 16, 4, 4, 2, 4),
        "warpgroup": Tiles(True, 32, 8, 2, 4, 3),
        "right": Tiles(False, 64, 8, 2, 4, 3),
    }.items():
        cases[f"tiles-{name}"] = partial(tiled, tiles, "mxfp4", 3 if name == "few" else 41, "swiglu_clamped")
    cases["tiles-dense"] = partial(tiled, Tiles(True, 32, 8, 2, 4, 3), "dense", 23, "silu")
    for one in ALONE:
        for tokens, top_k in ((1, 1), (1, 5), (4, 2)):
            name = f"alone-{one.split}-{one.slabs}-{one.step}-{tokens}-{top_k}"
            cases[name] = partial(alone, one, "mxfp4", tokens, "swiglu_clamped", sizes=(96, 224, 5, top_k))
    for parts, width in (
        (2, 1344),
        (3, 1344),
        (2, 96),
        (1, 2016),
    ):  # two products in a warp, one, parts with nothing to do
        for one in (Alone(4, 1), Alone(2, 2), Alone(4, 2, 2)):
            cases[f"alone-{one.split}-{one.slabs}-{one.step}-parts-{parts}-{width}"] = partial(
                in_parts, one, parts, width
            )
    cases["alone-beside-tiles"] = beside_tiles
    ways = (False, True), (True, True), (True, False)
    for i, (one, number, top_k) in enumerate(
        (
            (Alone(2, 2, 4, 4), 5, 4),
            (TABLE["few"], 32, 1),
            (Alone(2, 1), 40, 8),
            (TABLE["few"], 40, 8),
            (Alone(2, 2, 4, 4), 128, 8),
            (TABLE["few"], 128, 4),
        )
    ):
        cases[f"late-{number}-{top_k}-{i}"] = partial(late, one, *ways[i % 3], sizes=(64, 32, number, top_k))
    cases["layer-oss"], cases["layer-qwen"] = partial(layer, "swiglu_clamped", 4), partial(layer, "silu", 3)
    cases["layer-many"] = partial(layer, "silu", 9, (64, 32, 11))
    cases["late-rounded"] = partial(late, TABLE["few, dense"], True, dtype=torch.bfloat16, format="dense")
    cases["late-normed"] = partial(late, None, False, True, "swiglu_clamped", normed=True)
    some = torch.tensor([[3, -1, 0], [-1, -1, 2]])
    cases["alone-some-elsewhere"] = partial(alone, ALONE[0], "mxfp4", 2, "silu", ids=some, sizes=(352, 96, 5, 3))
    same = torch.tensor([[4, 1]]).expand(19, 2)
    cases["all-to-two-experts"] = partial(error, "mxfp4", 19, "silu", ids=same)
    cases["many-experts"] = partial(error, "mxfp4", 9, "silu", sizes=(64, 32, 67, 5))
    cases["nan"] = bad_block
    for absent in (False, True):
        cases["sorted-some-elsewhere" if absent else "sorted"] = partial(sort, absent)
        for size in (64, 128):
            name = f"grouped-{size}-some-elsewhere" if absent else f"grouped-{size}"
            cases[name] = partial(around_the_grouped_product, size, absent)
    for tokens in (1, 3, 19, 41):  # as few as are not sorted, and more
        some = torch.rand(tokens, 5).topk(3).indices - 2
        for format in ("mxfp4", "dense"):
            sizes = HIDDEN, INNER, 3, 3
            cases[f"some-elsewhere-{format}-{tokens}"] = partial(
                error, format, tokens, "swiglu_clamped", ids=some.where(some >= 0, -1), sizes=sizes
            )
    cases["all-elsewhere"] = nobody
    return cases


class Grouped:
    """What the kernel of the grouped product is to do, in float64: Gluon has no interpreter."""

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return self.run

    def run(
        self, x: Any, data: Any, factors: Any, bias: Tensor, experts: Tensor, most: int, out: Any, spans: int, slabs: int,
        steps: int, limit: float, kind: str | None, size: int, stages: int, **_: Any,
    ) -> None:  # fmt: skip
        assert x.block_shape == [size, 64] and out.block_shape == [size, 64 if kind else 128]
        assert spans * 16 >= slabs > (spans - 1) * 16 and x.base.shape[1] <= steps * 64
        width = x.base.shape[1]
        words, scales = data.base.view(-1, slabs, steps, 128), factors.base.view(-1, slabs, steps, 8)
        for tile in range(int(experts[most])):
            e, rows = int(experts[tile]), slice(tile * size, (tile + 1) * size)
            inputs = x.base[rows].double().unflatten(1, (-1, 2, 4, 2)).transpose(2, 3).reshape(size, width)
            weight = decoded(words[e], scales[e], (slabs * 16, width), kind is not None)
            y = inputs @ weight.T + bias[e].double()
            if kind is not None:
                y = activation(y, kind, limit).unflatten(1, (-1, 4, 2, 2)).transpose(2, 3).reshape(size, slabs * 8)
            out.base[rows] = y.to(out.base.dtype)


def nobody() -> float:
    """Tokens whose experts are all on other ranks."""
    found = []
    for tokens in (2, 30):
        found.append(case("mxfp4", tokens, "silu", ids=torch.full((tokens, 2), -1))[0])
    assert all((one == 0).all() for one in found)
    return 0.0


def around_the_grouped_product(size: int, absent: bool) -> float:
    from slipstream.ops.moe import grouped as gluon

    tokens, (hidden, inner, number, top_k) = 41, (96, 64, 3, 2)
    torch.manual_seed(size)
    stacks = [stack("mxfp4", shape, F32) for shape in ((number, 2 * inner, hidden), (number, hidden, inner))]
    biases = [torch.randn(w.shape[:2]) for w in stacks]
    x = torch.randn(tokens, hidden).bfloat16()
    ids = torch.rand(tokens, number).topk(top_k).indices
    if absent:
        ids = ids.where(ids != 2, -1)
    one_weight = torch.ones(1, 1, dtype=torch.float64)
    layers = [linear(decode(w, F32).double(), b.double()) for w, b in zip(stacks, biases, strict=True)]
    wanted = [
        reference(x[i // top_k, None].double(), e.view(1, 1), one_weight, *layers, activation, kind="silu", limit=1.5)[
            0
        ]
        for i, e in enumerate(ids.view(-1))
    ]
    gate_up, down = (prepare(w, torch.bfloat16, gated=i == 0) for i, w in enumerate(stacks))
    gluon.grouped, before = Grouped(), gluon.grouped
    try:
        found, places = module._grouped(x, ids, gate_up, biases[0], down, biases[1], inner, size, "silu", 1.5)
    finally:
        gluon.grouped = before
    here = ids.view(-1) >= 0
    assert (places[~here] == -1).all()
    answers = torch.stack(wanted)[here]
    assert (found[0, places[here].long()].double() - answers).norm() / answers.norm() < 6e-3  # bfloat16 twice
    return 0.0


def sort(absent: bool) -> float:
    """Around the grouped product: where pairs go, what is moved there and in which order, and what is added from there."""
    tokens, top_k, number, width, size = 37, 3, 6, 96, 8
    torch.manual_seed(1)
    ids = torch.rand(tokens, number).topk(top_k).indices
    ids[ids == 2] = 5  # nobody's, and twice in a token
    if absent:
        ids[ids == 1] = -1
    here = ids.view(-1) >= 0
    tiles, places = module._schedule(ids, number, size, sort=True)
    count = int(tiles[-1])
    assert count == sum(-(-int((ids == e).sum()) // size) for e in range(number)) and (tiles[count:-1] == -1).all()
    assert (places[~here] == -1).all() and len(places[here].unique()) == here.sum()
    assert torch.equal(tiles[places[here].long() // size], ids.view(-1)[here].int())
    x, moved = (
        torch.randint(1 << 30, (tokens, width), dtype=torch.int32),
        torch.zeros(count * size, width, dtype=torch.int32),
    )
    kernels.gather[(tokens,)](x, places, moved, x.stride(0), width, top_k, 128, CHAIN=False)
    mixed = x.unflatten(1, (-1, 4, 2)).transpose(2, 3).reshape(tokens, width)
    assert torch.equal(moved[places[here].long()], mixed.repeat_interleave(top_k, 0)[here])
    sums, weights, out = (
        torch.randn(1, count * size, width),
        torch.rand(tokens, top_k),
        torch.full((tokens, width), torch.nan),
    )
    kernels.add[(tokens, 2)](sums, ids, weights, places, out, width, tokens * top_k, top_k, 1, 64, CHAIN=False)
    each = sums[0, places.long()] * here[:, None]
    wanted = (each.view(tokens, top_k, width).double() * weights[..., None]).sum(1)
    return ((out - wanted).norm() / wanted.norm()).item()


def layout(sizes: tuple[int, int, int], device: str) -> float:
    """How many bytes a card lays out otherwise than a CPU does."""
    experts, rows, blocks = sizes
    torch.manual_seed(blocks)
    codes = torch.randint(256, (experts, rows, blocks, 16), dtype=torch.uint8)
    scales = torch.randint(130, (experts, rows, blocks), dtype=torch.uint8)
    scales[0, 1::3, 2::4] = 255
    off = 0
    for gated in (False, True):
        there = laid_out(codes.to(device), scales.to(device), gated)
        for got, want in zip(there, laid_out(codes, scales, gated), strict=True):
            assert got.shape == want.shape and got.dtype == want.dtype
            off += int((got.cpu() != want).sum())
    return float(off)


def bad_block() -> float:
    """A NaN scale in one expert's gate reaches the tokens that were sent there, past the clamp, and no other token."""
    torch.manual_seed(0)
    up, down = stack("mxfp4", (3, 64, 96), F32), stack("mxfp4", (3, 96, 32), F32)
    assert up.scales is not None
    up.scales[1, 5, 2] = 255
    ids = torch.tensor([[0], [1], [2], [1], [0], [2], [0], [1], [0], [2]])
    packed = prepare(up, F32, gated=True), prepare(down, F32)
    found = experts(
        torch.randn(10, 96), ids, torch.ones(10, 1), packed[0], None, packed[1], None, kind="swiglu_clamped"
    )
    assert torch.equal(found.isnan().any(1), ids[:, 0] == 1)
    return 0.0


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return interpreter.run(__file__)


@pytest.mark.parametrize("name", interpreted())
def test_the_kernels_in_the_interpreter_against_float64(results: dict[str, Any], name: str) -> None:
    found = results[name]
    assert isinstance(found, float) and found < 1e-6, found


def decoded(words: Tensor, scales: Tensor, shape: tuple[int, int], gated: bool) -> Tensor:
    """One expert's numbers from what prepare gave, by the words of kernels.py's docstring, one at a time."""
    rows, width = shape
    out = torch.full(shape, torch.nan, dtype=torch.float64)
    values = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    for slab, two, lane, block, half in np.ndindex(rows // 16, words.shape[1], 32, 2, 2):
        g, t = divmod(lane, 4)
        row = half * rows // 2 + slab * 8 + g if gated else slab * 16 + half * 8 + g
        word = int(words[slab, two, lane * 4 + block * 2 + half]) % 2**32
        scale = int(scales.view(torch.uint8)[slab, two, g * 4 + block * 2 + half])
        for p, e in np.ndindex(4, 2):
            column = (two * 2 + block) * 32 + p // 2 * 16 + 4 * t + p % 2 * 2 + e
            sign, *rest = (word >> (bit + 16 * e) % 32 & 1 for bit in (PLACES[p][0], *PLACES[p][1]))
            if column < width:
                out[row, column] = (-1) ** sign * values[rest[0] * 4 + rest[1] * 2 + rest[2]] * 2.0 ** (scale - 253)
    return out


@pytest.mark.parametrize(("width", "gated"), [(64, True), (96, False)])
def test_the_layout_of_mxfp4_is_what_the_kernels_say(width: int, gated: bool) -> None:
    torch.manual_seed(width)
    weight = stack("mxfp4", (2, 48, width), F32)
    wanted, size, place = decode(weight, F32)[1].double(), weight.nbytes, weight.data.data_ptr()
    data, scales = prepare(weight, torch.bfloat16, gated=gated)
    assert torch.equal(decoded(data[1], scales[1], (48, width), gated), wanted)
    if width % 64 == 0:  # the same bytes, in place
        assert data.nbytes + scales.nbytes == size and data.data_ptr() == place


def test_gate_and_up_of_dense_stacks_share_slabs() -> None:
    rows = torch.arange(48.0)[:, None].expand(1, 48, 32).clone()
    (data,) = prepare(Weight("dense", rows, (1, 48, 32)), F32, gated=True)
    assert data[0, :, 0].tolist() == [half * 24 + slab * 8 + g for slab, half, g in np.ndindex(3, 2, 8)]


def test_what_does_not_fit_is_refused() -> None:
    weight = stack("mxfp4", (2, 48, 64), F32)
    assert weight.scales is not None
    weight.scales[1, 3, 1] = 129
    with pytest.raises(KernelError, match="scale"):
        prepare(weight, F32)
    with pytest.raises(KernelError, match="40 x 64"):
        prepare(stack("mxfp4", (2, 40, 64), F32), F32)
    with pytest.raises(KernelError, match="int8"):
        prepare(encode(torch.randn(2, 48, 64), "int8"), F32)


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int, late: int = 0
) -> Any:
    """For Hopper. `late`: room for experts, where each program chooses for itself."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = constants | {"SOFTMAX_FIRST": late > 32, "RENORMALIZE": True, "EXPERTS": late}
    constants |= {} if late else {"logits": None, "shares": None}
    constants |= {"WARPS": warps} if "WARPS" in kernel.arg_names else {}
    types = types | {"logits": "*fp32", "shares": "*fp32"}
    signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in kernel.arg_names}
    wide = {*types, "x_stride", "num_inputs"} - {"limit", "logits"} - {*constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if a in wide}
    options = {"num_warps": warps, "num_stages": stages}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize(
    ("name", "kind", "most"),
    # Instructions of the loop, a weight and thread: what was counted and a little more. An H100's memory allows 5.2.
    [
        ("few", "swiglu_clamped", 3.0),
        ("few", None, 3.0),
        ("up to 12", None, 3.5),
        ("up to 40", "swiglu_clamped", 3.5),
        ("more", "swiglu_clamped", 4.0),
    ],
)
def test_it_compiles_for_hopper(
    name: str, kind: str | None, most: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import triton.language as tl

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tiles, kernel = TABLE[name], kernels.tiles
    warpgroup = tiles.warps >= 4
    types = {"x": "*bf16", "data": "*i32", "scales": "*i32", "bias": "*bf16", "experts": "*i32", "order": "*i32"}
    types |= {"out": "*bf16" if kind else "*fp32", "limit": "fp32"}
    constants: dict[str, Any] = {
        "KIND": kind, "LEFT": tiles.left, "BLOCK_M": tiles.pairs, "SLABS": tiles.slabs, "BLOCKS": tiles.blocks,
        "COMPUTE": tl.bfloat16, "MIXED": warpgroup, "EVEN": 2880 % (32 * tiles.blocks) == 0, "CHAIN": True, "PREFETCH": 0,
    }  # fmt: skip
    if name == "few":
        constants |= {"order": None, "PREFETCH": 128}
        types["experts"] = "*i64"
    made = compiled(kernel, types, constants, tiles.warps, tiles.stages)
    assert made.metadata.shared <= 110 << 10  # two programs a multiprocessor
    ptx = made.asm["ptx"].splitlines()
    products = [i for i, line in enumerate(ptx) if "mma.sync" in line or "wgmma.mma_async" in line]
    ends = [i for i, line in enumerate(ptx) if "bra" in line and i > products[-1]]
    loop = ptx[max(i for i, line in enumerate(ptx) if line.startswith("$L") and i < products[0]) : ends[0]]
    assert any("wgmma" in line for line in loop) == warpgroup
    assert any("cp.async" in line for line in loop) and not any("ld.global" in line for line in loop)
    assert not any("st.shared" in line for line in loop), "weights are to stay with the thread that loaded them"
    if warpgroup:  # before the registers that a product reads are filled again
        assert "wgmma.wait_group.sync.aligned 0;" in "".join(ptx[products[-1] : ends[0]])
    assert "ftz" not in "".join(ptx)  # codes before their scale are subnormal
    each = tiles.slabs * 16 * tiles.blocks * 32 / (32 * tiles.warps)
    counted = instructions(made.asm["cubin"], tmp_path / "kernel.cubin")
    assert counted / each < most, f"{counted / each:.2f} instructions a weight"


def test_who_is_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def choice(
        slabs: int, twos: int, pairs: int, kind: str | None = None, parts: int = 1, dtype: Any = torch.bfloat16
    ) -> Any:
        packed = torch.empty(1, slabs, twos, 128, dtype=torch.int32, device="meta"), torch.empty(0)
        return module.choose_alone(packed, dtype, pairs, kind, parts)

    assert choice(96, 32, 8, "silu") == Alone(2, 1, 4, 4)  # Qwen3-30B-A3B
    assert choice(128, 12, 8) == Alone(2, 1)
    assert choice(320, 32, 1) == Alone(4, 1, 4, 3)
    assert choice(128, 64, 1, parts=2) == Alone(8, 1)
    assert choice(360, 45, 4, "swiglu_clamped") is None and choice(180, 45, 4) == Alone(4, 2, 4, 3)  # gpt-oss
    assert choice(180, 45, 4, "swiglu_clamped") == Alone(2, 1, 8, 3)  # a half of it
    assert choice(180, 23, 4) == Alone(2, 1)
    assert choice(96, 32, 9, "silu") is choice(96, 32, 8, "silu", dtype=F32) is None
    assert choice(16, 200, 1, parts=2) is None, "more than registers hold"
    for number in range(1, 40):
        most, more = module.chunks(number)
        assert most.bit_count() == 1 and more.bit_count() <= 1 and number <= most + more <= number * 4 // 3 + 1


@pytest.mark.parametrize("kind", ["silu", None])
@pytest.mark.parametrize(
    ("one", "most"),
    [
        (Alone(8, 1), 4),
        (Alone(2, 1), 4),
        (Alone(2, 1), 8),
        (Alone(2, 1, 4, 4), 0),
        (Alone(2, 1, 8), 0),
        (Alone(4, 2, 4), 0),
    ],
)
def test_one_pair_compiles_for_hopper(
    one: Alone, most: int, kind: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import triton.language as tl

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, held = kernels.alone, not one.step
    types = {"x": "*bf16", "data": "*i32", "scales": "*i32", "bias": "*bf16", "experts": "*i32", "limit": "fp32"}
    types["out"] = "*bf16" if kind else "*fp32"
    constants: dict[str, Any] = {
        "KIND": kind, "SPLIT": one.split, "SLABS": one.slabs, "MOST": one.step or most, "MORE": 2 if held else 0, "HELD": held,
        "COMPUTE": tl.bfloat16, "CHAIN": True, "PREFETCH": 0 if held or kind else 64,
    }  # fmt: skip
    made = compiled(kernel, types, constants, one.split * one.slabs, one.stages)
    code = machine_code(made.asm["cubin"], tmp_path / "kernel.cubin")  # spills nothing
    before, _, after = made.asm["ptx"].partition("griddepcontrol.wait")
    assert len(code) == (0 if held else 1) and "ftz" not in before + after
    if held:  # words go from memory to where a product takes them, and do not wait for the input if they need not
        loads = [part.count("ld.global.v4.b32") for part in (before, after)]
        assert loads[0] == most + 2 if kind is None else loads[0] == 0 and loads[1] >= most + 2
        assert "st.shared.v4" not in before + after or most > 4  # so wide a product Triton lays out in another way
    else:
        assert "cp.async" in after and ("prefetch" in before) == (kind is None)


@pytest.mark.parametrize("kind", ["silu", None])
@pytest.mark.parametrize("one", [Alone(2, 1, 8, 3), Alone(4, 2, 4, 3), Alone(2, 1), None], ids=str)
def test_a_choice_of_each_program_compiles_for_hopper(
    one: Alone | None, kind: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import triton.language as tl

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"x": "*bf16", "data": "*i32", "scales": "*i32", "bias": "*bf16", "experts": "*i32", "limit": "fp32"}
    types["out"] = "*bf16" if kind else "*fp32"
    constants: dict[str, Any] = {"KIND": kind, "COMPUTE": tl.bfloat16, "CHAIN": True}
    if one is None:
        few = TABLE["few"]
        constants |= {"LEFT": True, "BLOCK_M": few.pairs, "SLABS": few.slabs, "BLOCKS": few.blocks, "MIXED": False}
        constants |= {"EVEN": False, "order": None, "PREFETCH": 64}
        made = compiled(kernels.tiles, types, constants, few.warps, few.stages, 32)
    else:
        constants |= {"SPLIT": one.split, "SLABS": one.slabs, "MOST": one.step or 4, "MORE": 0 if one.step else 2}
        constants |= {"HELD": not one.step, "PREFETCH": 64 if one.step and kind is None else 0}
        made = compiled(kernels.alone, types, constants, one.split * one.slabs, one.stages, 128)
    machine_code(made.asm["cubin"], tmp_path / "kernel.cubin")  # spills nothing
    before, _, after = made.asm["ptx"].partition("griddepcontrol.wait")
    chosen, _, rest = (before if kind is None else after).partition("bar.sync")
    assert "redux.sync.max.s32" in chosen and "cvt.rn.bf16" in chosen, (
        "behind the activation, in the shadow of what is before"
    )
    assert "redux" not in rest + (after if kind is None else ""), "no warp waits for another until it has chosen"
    assert chosen.count("ld.global.b32") == (1 if one is None else 4) and "ld.global.v" not in chosen
    assert kind is None or "ld.global" not in before


def test_a_card_is_used_beside_other_work_and_its_faults_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []

    def broken(*_: Any, **__: Any) -> None:
        used.append(threading.current_thread().name)
        raise RuntimeError

    monkeypatch.setattr(layouts, "prepare", broken)
    interval = sys.getswitchinterval()
    layouts.begin.cache_clear()
    thread = layouts.begin(torch.device("cpu"))
    assert layouts.begin(torch.device("cpu")) is thread
    thread.join(20)
    assert used == ["slipstream-begin"], "once, and nothing is said: whoever lays out will be told"
    assert sys.getswitchinterval() == interval
    layouts.begin.cache_clear()


def test_all_that_a_layout_uses_has_been_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators of a stack of experts, of which begin() has to use each: CUDA loads a kernel when it is first launched."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Used(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: set[tuple[str, ...]] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            self.names.add((str(func), *(str(t.dtype) for t in (*args, found) if isinstance(t, Tensor))))
            return found

    monkeypatch.setattr(layouts, "suppress", lambda _: contextlib.nullcontext())
    weights, seen = [encode(torch.zeros(3, 64, width), "mxfp4") for width in (192, 160)], []
    for work in (
        lambda: layouts._first(torch.device("cpu")),
        lambda: [prepare(w, torch.bfloat16, gated=gated) for w in weights for gated in (False, True)],
    ):
        layouts._tables.cache_clear()
        with Used() as used:
            work()
        seen.append(used.names)
    assert len(seen[1]) > 20 and seen[1] <= seen[0], seen[1] - seen[0]


@pytest.mark.parametrize("sort", [False, True])
def test_what_stands_around_the_products_compiles_for_hopper(
    sort: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"x": "*i32", "out": "*bf16", "sums": "*bf16" if sort else "*fp32", "weights": "*fp32", "places": "*i32"}
    types |= {"ids": "*i32", "experts": "*i32", "order": "*i32"}
    constants: dict[str, dict[str, Any]] = {
        "schedule": {"BINS": 64, "BLOCK_M": 128, "SORT": sort, "SIZE": 4096, "CHAIN": True},
        "gather": {"TOP_K": 4, "SIZE": 2048, "CHAIN": True},
        "add": {"TOP_K": 4, "PARTS": 1 if sort else 3, "SIZE": 1024, "CHAIN": True}
        | ({} if sort else {"places": None}),
    }
    for name, fixed in constants.items():
        kernel = getattr(kernels, name)
        known = types | ({"out": "*i32"} if name == "gather" else {})
        signature = {a: "constexpr" if a in fixed else known.get(a, "i32") for a in kernel.arg_names}
        options = {"num_warps": 8 if name == "schedule" else 4}
        made = triton.compile(ASTSource(kernel, signature, fixed), target=GPUTarget("cuda", 90, 32), options=options)
        machine_code(made.asm["cubin"], tmp_path / f"{name}.cubin")  # nothing is spilled


@pytest.mark.parametrize("kind", ["swiglu_clamped", "silu", None])
@pytest.mark.parametrize("size", [64, 128])
def test_the_grouped_product_compiles_for_hopper(
    size: int, kind: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from slipstream.ops.moe.grouped import grouped, stages

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def descriptor(type: str, shape: list[int], bits: int, swizzle: int = 128) -> str:
        return f"tensordesc<{type}{shape},{gl.NVMMASharedLayout(swizzle, bits, 2)!r}>"

    types = {"bias": "*bf16", "experts": "*i32", "limit": "fp32", "x": descriptor("bf16", [size, 64], 16)}
    types |= {"data": descriptor("i32", [16, 128], 32), "factors": descriptor("i32", [16, 8], 32, 32)}
    types["out"] = descriptor("bf16", [size, 64 if kind else 128], 16)
    constants: dict[str, Any] = {"KIND": kind, "PAIRS": size, "STAGES": stages(size)}
    if kind == "silu":
        constants["bias"] = None
    signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in grouped.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(grouped.arg_names) if a in ("bias", "experts")}
    source = GluonASTSource(grouped, signature, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert made.metadata.shared <= 227 << 10
    loops = machine_code(made.asm["cubin"], tmp_path / "kernel.cubin")
    assert len(loops) == 2  # of the two warpgroups
    for loop in loops:
        products = [line for line in loop if "HGMMA" in line]
        assert len(products) == 8 and sum("gsb0" in line for line in products) == 2, "one product after the other"
        waits = [i for i, line in enumerate(loop) if "DEPBAR" in line]
        assert len(loop) - waits[-1] < 20, "the decoding is behind the wait that it should fill"
        assert not any(name in line for line in loop for name in ("LDG", "LDL", "STL", "STS"))
        assert len(loop) < 3.1 * 64  # weights a thread; 2.9 were counted


def instructions(cubin: bytes, file: Path) -> int:
    return min(map(len, machine_code(cubin, file)))


def machine_code(cubin: bytes, file: Path) -> list[list[str]]:
    """The innermost loops around the tensor cores' instructions; no register is spilled."""
    import triton

    file.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage, text = (
        subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout
        for option in ("-res-usage", "-sass")
    )
    assert "STACK:0" in usage, usage
    found = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/ +([^;/]*);", text)]
    loops: list[tuple[int, int]] = []
    for at, line in found:
        back = int(branch[1], 16) if (branch := re.search(r"BRA.*0x([0-9a-f]+)", line)) else at
        if any("MMA" in other for place, other in found if back <= place < at):
            loops.append((back, at))
    inner = [a for a in loops if not any(a[0] <= b[0] and b[1] <= a[1] for b in loops if a != b)]
    return [[line for place, line in found if back <= place <= at] for back, at in inner]


if __name__ == "__main__":
    interpreter.main(interpreted())
