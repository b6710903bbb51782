"""The Triton experts on a CUDA device against float64. Run with: pytest -m gpu tests/gpu/test_moe.py"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from slipstream.ops.formats import encode
from slipstream.ops.moe import triton as module
from slipstream.ops.moe.layout import prepare
from slipstream.ops.moe.triton import TABLE, Alone, Tiles
from slipstream.ops.norm.triton import add_norm
from slipstream.ops.router import Logits
from slipstream.ops.router.triton import add_norm_router
from tests.ops.test_moe_triton import alone, case, error, grouped, late, layer, layout, tiled

pytestmark = pytest.mark.gpu
BF = torch.bfloat16
SIZES = {
    "odd": (160, 96, 5, 2),
    "gpt-oss": (2880, 2880, 6, 4),
    "qwen": (2048, 768, 37, 8),
}


@pytest.mark.parametrize("tokens", [1, 3, 5, 40, 300, 1100])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("format", ["mxfp4", "dense"])
def test_bfloat16_against_float64(format: str, size: str, tokens: int) -> None:
    kind = "silu" if size == "qwen" else "swiglu_clamped"
    assert error(format, tokens, kind, BF, "cuda", SIZES[size]) < 6e-3


@pytest.mark.parametrize("tokens", [1, 33])
def test_float32_against_float64(tokens: int) -> None:
    assert error("mxfp4", tokens, "swiglu_clamped", torch.float32, "cuda") < 1e-5


@pytest.mark.parametrize("format", ["mxfp4", "dense"])
@pytest.mark.parametrize("name", module.TABLE)
def test_every_tile_of_the_table(name: str, format: str) -> None:
    for tokens in (1, 130):
        for size in ("odd", "gpt-oss"):
            tiles: Tiles = module.TABLE[name]
            assert tiled(tiles, format, tokens, "swiglu_clamped", BF, "cuda", SIZES[size]) < 6e-3


@pytest.mark.parametrize(
    "one", [Alone(8, 1), Alone(4, 1, 4), Alone(2, 2, 4, 4), Alone(2, 2, 8), Alone(4, 2, 2)], ids=str
)
@pytest.mark.parametrize("size", SIZES)
def test_each_pair_alone(size: str, one: Alone) -> None:
    hidden, inner, number, top_k = SIZES[size]
    kind = "silu" if size == "qwen" else "swiglu_clamped"
    for tokens, picked in ((1, top_k), (8 // top_k, top_k), (1, 1)):
        assert alone(one, "mxfp4", tokens, kind, BF, "cuda", (hidden, inner, number, picked)) < 6e-3


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("name", SIZES)
def test_the_grouped_product(name: str, size: int) -> None:
    for tokens, kind in ((1, "silu"), (45, "swiglu_clamped"), (700, "swiglu_clamped"), (1300, "silu")):
        assert grouped(size, "mxfp4", tokens, kind, BF, "cuda", SIZES[name]) < 6e-3


WHOLE = {  # kind, softmax_first, and sizes
    "gpt-oss": ("swiglu_clamped", False, (2880, 2880, 32, 4)),
    "qwen": ("silu", True, (2048, 768, 128, 8)),
}


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("model", WHOLE)
def test_experts_choose_as_the_router_does(model: str, normed: bool) -> None:
    kind, first, sizes = WHOLE[model]
    assert late(None, first, True, kind, BF, "cuda", sizes, normed) == 0
    for other in (sizes, (160, 96, 5, 2), (160, 96, 40, 8), (320, 256, 300, 5)):
        for one in (Alone(2, 2, 4, 4), Alone(8, 1), Alone(4, 2, 2), TABLE["few"], Tiles(True, 8, 4, 4, 4, 3)):
            for again in (True, False) if first else (True,):
                assert late(one, first, again, kind, BF, "cuda", other, normed) == 0
    assert late(TABLE["float32"], first, True, kind, torch.float32, "cuda", (160, 96, 40, 4), normed) == 0
    hidden, inner, number, top_k = sizes
    assert layer(kind, top_k, (hidden, inner, number), BF, "cuda") == 0


@pytest.mark.parametrize("model", WHOLE)
def test_a_choice_of_each_program_replayed_400_times(model: str) -> None:
    """Three layers in one graph, for two tokens by turns: memory holds the other's logits, experts and shares, so that whatever reads
    or writes too early gives other bits than layers whose router chooses, run one kernel after the other."""
    kind, first, (hidden, inner, number, top_k) = WHOLE[model]
    torch.manual_seed(0)
    layers: list[Any] = []
    for _ in range(3):
        shapes = (number, 2 * inner, hidden), (number, hidden, inner)
        stacks = [encode(torch.randn(s, device="cuda") * s[-1] ** -0.5, "mxfp4") for s in shapes]
        packed = [prepare(w, BF, gated=i == 0) for i, w in enumerate(stacks)]
        weight = (torch.randn(number, hidden, device="cuda") * hidden**-0.5).to(BF)
        arrived = torch.zeros(8, dtype=torch.int32, device="cuda")
        layers.append((packed, SimpleNamespace(dense=weight, bias=None, arrived=arrived)))
    norm, tokens = torch.ones(hidden, dtype=BF, device="cuda"), torch.randn(2, 1, hidden, device="cuda").to(BF)
    x = tokens[0].clone()

    def run(leave: bool) -> list[torch.Tensor]:
        total, delta, found = x, x, []
        for (gate_up, down), router in layers:
            values = torch.empty(1, number, dtype=torch.float32, device="cuda")
            left: dict[str, Any] = {"logits": Logits(values, first, True)} if leave else {}
            total, h, ids, shares = add_norm_router(
                total, delta, norm, 1e-5, router, top_k, softmax_first=first, **left
            )
            if not leave:
                torch.cuda.synchronize()
            delta = module.experts(h, ids, shares, gate_up, None, down, None, kind=kind, leave=True, **left)
            if not leave:
                torch.cuda.synchronize()
            found += [ids, shares]
        return [*found, *add_norm(total, delta, norm, 1e-5)]

    wanted = []
    for token in tokens:
        x.copy_(token)
        wanted.append([t.clone() for t in run(False)])
    assert not torch.equal(wanted[0][0], wanted[1][0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(True)
    for i in range(400):
        x.copy_(tokens[i % 2])
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, wanted[i % 2], strict=True)), i


@pytest.mark.parametrize("tokens", [1, 2, 9, 64, 200, 700])
def test_two_hundred_runs_are_identical(tokens: int) -> None:
    torch.manual_seed(tokens)
    stacks = [torch.randn(s, device="cuda") / 20 for s in ((16, 512, 320), (16, 320, 256))]
    packed = [prepare(encode(w, "mxfp4"), BF, gated=i == 0) for i, w in enumerate(stacks)]
    x = torch.randn(tokens, 320, device="cuda", dtype=BF)
    weights, ids = torch.randn(tokens, 16, device="cuda").topk(4)

    def run() -> torch.Tensor:
        return module.experts(x, ids, weights, packed[0], None, packed[1], None, kind="silu")

    first = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(100):
        graph.replay()
        assert torch.equal(run(), first) and torch.equal(captured, first)


def test_the_layout_is_that_of_a_cpu() -> None:
    for sizes in ((5, 2880, 90), (1, 16, 2), (9, 5760, 90)):
        assert layout(sizes, "cuda") == 0


def test_all_tokens_to_two_experts() -> None:
    found, wanted = case("mxfp4", 20, "silu", BF, "cuda", ids=torch.tensor([[4, 1]], device="cuda").expand(20, 2))
    assert (found.double() - wanted).norm() / wanted.norm() < 6e-3


@pytest.mark.parametrize("format", ["mxfp4", "dense"])
@pytest.mark.parametrize("tokens", [1, 2, 9, 130, 1300])
def test_experts_of_other_ranks_are_left_out(tokens: int, format: str) -> None:
    """As few as are not sorted, tiles, and the grouped product; memory that nobody wrote is NaN here."""
    torch.manual_seed(tokens)
    ids = torch.rand(tokens, 12, device="cuda").topk(4).indices - 7
    found, wanted = case(
        format, tokens, "swiglu_clamped", BF, "cuda", (320, 256, 5, 4), ids=ids.where(ids >= 0, -1).int()
    )
    assert (found.double() - wanted).norm() <= 6e-3 * wanted.norm()
