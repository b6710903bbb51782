"""Attention over pages on a CUDA device against the reference in float32, and bit against bit where nothing may matter.
Run with: pytest -m gpu tests/gpu/test_attention.py"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import slipstream.ops.attention.triton as module
from slipstream.ops.attention import IMPLS, paged
from slipstream.ops.choose import Case, choose
from tests.ops.test_attention_triton import World, all_alike

pytestmark = pytest.mark.gpu
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Values are normal numbers; weights and the result are rounded to 8 or 11 bits.
TOLERANCE = {F32: 1e-5, BF16: 3e-2, F16: 4e-3}
LENGTHS = (2500, 129, 700, 1, 64, 1037)
MIXED = [
    (0, 2499, 2500),
    (1, 0, 129),
    (2, 650, 700),
    (3, 0, 1),
    (4, 63, 64),
    (5, 500, 1037),
    (0, 1998, 2000),
    (2, 511, 512),
]
DECODE = [(i, n - 1, n) for i, n in enumerate(LENGTHS)]
SHAPES: dict[str, dict[str, Any]] = {
    "full": {"heads": 24, "kv_heads": 3},
    "window": {"heads": 10, "kv_heads": 2, "window": 128, "page_size": 3},
    "wide window": {"heads": 6, "kv_heads": 2, "window": 1100, "softcap": 20.0, "page_size": 128},
    "one for one": {"heads": 3, "kv_heads": 3, "sinks": False, "softcap": 5.0, "page_size": 64, "window": 1},
    "one for all": {"heads": 19, "kv_heads": 1, "page_size": 256},
}


def world(shape: str, **more: Any) -> tuple[World, int]:
    facts = SHAPES[shape] | more
    return World(LENGTHS, device="cuda", **{k: v for k, v in facts.items() if k != "page_size"}), facts.get(
        "page_size", 16
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_reference(shape: str, head_dim: int, dtype: torch.dtype) -> None:
    if dtype == F16 and head_dim not in (64, 80):
        pytest.skip("compiled as for bfloat16")
    made, page_size = world(shape, head_dim=head_dim, dtype=dtype)
    assert made.error(MIXED, page_size=page_size) < TOLERANCE[dtype]
    assert made.error(DECODE, page_size=page_size) < TOLERANCE[dtype]
    if head_dim in (64, 80):
        assert made.error(MIXED, True, page_size=page_size) < TOLERANCE[dtype]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [None, 200, 700])
@pytest.mark.parametrize("invariant", [False, True], ids=["", "invariant"])
def test_the_same_bits_whatever_else_is_in_the_call(
    invariant: bool, window: int | None, dtype: torch.dtype, head_dim: int
) -> None:
    made = World(
        (1200, 1033, 70, 515, 5), heads=16, kv_heads=2, head_dim=head_dim, window=window, dtype=dtype, device="cuda"
    )
    assert all_alike(made, invariant, 61) == 0


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("window", [None, 128])
def test_200_repeats_are_identical(window: int | None, head_dim: int) -> None:
    """A race of a pipelined product shows in some runs only."""
    made = World((4096, 3000, 2048), heads=64, kv_heads=8, head_dim=head_dim, window=window, dtype=BF16, device="cuda")
    options: dict[str, Any] = {"scale": made.scale, "sinks": made.extra}
    for chunks in ([(0, 2000, 4096), (1, 2999, 3000)], [(0, 4095, 4096), (1, 2999, 3000), (2, 2047, 2048)]):
        assert made.error(chunks) < TOLERANCE[BF16]
        step = made.step(chunks)
        for invariant in (False, True):
            first = module.attention(*step, **options, invariant=invariant)
            again = [module.attention(*step, **options, invariant=invariant) for _ in range(10)]
            for _ in range(20):
                assert all(torch.equal(a, first) for a in again)
                again = [module.attention(*step, **options, invariant=invariant) for _ in range(10)]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("invariant", [False, True], ids=["", "invariant"])
def test_fetching_ahead_changes_no_bit(invariant: bool, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = World((4096, 3000), heads=64, kv_heads=8, head_dim=head_dim, dtype=BF16, device="cuda")
    step = made.step([(0, 1000, 4096), (1, 2999, 3000)])
    found = [module.attention(*step, scale=made.scale, invariant=invariant) for _ in range(20)]
    tiles = paged.tiles
    monkeypatch.setattr(paged, "tiles", lambda *case: tiles(*case) | {"num_stages": 1})
    wanted = module.attention(*step, scale=made.scale, invariant=invariant)
    assert all(torch.equal(f, wanted) for f in found)


def test_nan_stays_in_its_sequence() -> None:
    made, _ = world("full", dtype=BF16, head_dim=64)
    made.q[1][5] = made.kv[5][1, 1036] = torch.nan
    step = made.step(MIXED)
    found = module.attention(*step, scale=made.scale).isnan().flatten(1).any(1)
    starts = step[3].query_starts
    assert found[starts[1] + 5] and found[starts[6] - 1]
    found[starts[1] + 5] = found[starts[5] : starts[6]] = False
    assert not found.any()


@pytest.mark.parametrize("window", [None, 128])
def test_decoding_can_be_captured_in_a_graph(window: int | None) -> None:
    made = World(LENGTHS, heads=16, kv_heads=2, head_dim=64, window=window, dtype=BF16, device="cuda")
    q, keys, values, *rest = made.step(DECODE)
    options: dict[str, Any] = {"scale": made.scale, "sinks": made.extra}
    module.attention(q, keys, values, *rest, **options)  # compiles, and makes the tables of the batch
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module.attention(q, keys, values, *rest, **options)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(out, module.attention(q, keys, values, *rest, **options))


def test_slots_beyond_two_billion_numbers() -> None:
    """Offsets into the cache are of 64 bits."""
    made = World((40,), heads=2, kv_heads=1, head_dim=256, dtype=BF16, device="cuda")
    q, keys, values, batch, group = made.step([(0, 39, 40)], page_size=16)
    far = (1 << 31) // (256 * 16) + 5
    cache = torch.empty(2, (far + 8) * 16, 1, 256, dtype=BF16, device="cuda")
    cache[:, far * 16 : far * 16 + len(keys)] = torch.stack((keys, values))
    wanted = module.attention(q, keys, values, batch, group, scale=0.1)
    pages, first = group.page_table
    moved: Any = SimpleNamespace(page_table=(pages + far, first), page_size=16, window=None)
    assert torch.equal(module.attention(q, *cache, batch, moved, scale=0.1), wanted)


def test_it_is_what_is_chosen() -> None:
    facts = {"head_dim": 64, "sinks": True, "softcap": None}
    capability = torch.cuda.get_device_capability()
    assert choose("attention", IMPLS, Case("cuda", "bfloat16", capability, facts)).name == "triton"
    facts["batch_invariant"] = True
    assert choose("attention", IMPLS, Case("cuda", "bfloat16", capability, facts)).name == "triton_invariant"
