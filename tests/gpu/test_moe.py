"""The Triton experts on a CUDA device against float64. Run with: pytest -m gpu tests/gpu/test_moe.py"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from slipstream.ops.formats import encode
from slipstream.ops.moe import triton as module
from slipstream.ops.moe.layout import prepare
from slipstream.ops.moe.triton import Alone, Tiles
from tests.ops.test_moe_triton import alone, case, error, grouped, layout, tiled

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
