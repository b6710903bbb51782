"""Attention in decoding steps with its input in the same kernel, on a CUDA device: against the references in float64, and bit
against bit. Run with: pytest -m gpu tests/gpu/test_decode.py"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from slipstream.ops.attention.decode import decode
from slipstream.ops.attention.triton import attention
from slipstream.ops.attention_input.triton import attention_input
from tests.ops.test_decode_triton import Entering, all_alike, padded, with_room

pytestmark = pytest.mark.gpu
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# cos and sin, queries, keys, weights and the result are rounded to 8 or 11 bits.
TOLERANCE = {F32: 2e-5, BF16: 6e-2, F16: 8e-3}
LENGTHS = (2500, 129, 700, 1, 64, 1037, 513, 16)  # 513 begins a split
ROWS = range(len(LENGTHS))
SHAPES: dict[str, dict[str, Any]] = {
    "full": {"heads": 24, "kv_heads": 3},
    "window": {"heads": 10, "kv_heads": 2, "window": 128, "page_size": 3, "norms": False},
    "wide window": {"heads": 6, "kv_heads": 2, "window": 1100, "softcap": 20.0, "page_size": 128},
    "one for one": {"heads": 3, "kv_heads": 3, "sinks": False, "softcap": 5.0, "page_size": 64, "window": 1},
    "one for all": {"heads": 19, "kv_heads": 1, "page_size": 256, "norms": False},
}


def world(shape: str, head_dim: int, half: int, **more: Any) -> tuple[Entering, int]:
    facts = {"page_size": 16, **SHAPES[shape], **more}
    page_size = facts.pop("page_size")
    return Entering(LENGTHS, device="cuda", head_dim=head_dim, half=half, **facts), page_size


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "half"), [(16, 0), (64, 32), (64, 20), (80, 40), (80, 7), (96, 48), (128, 64), (256, 128), (256, 32)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_references(shape: str, head_dim: int, half: int, dtype: torch.dtype) -> None:
    made, page_size = world(shape, head_dim, half, dtype=dtype)
    assert made.error(ROWS, page_size=page_size) < TOLERANCE[dtype]
    assert made.error([0], page_size=page_size) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window", [None, 128, 700])
def test_it_gives_what_two_kernels_give(window: int | None, head_dim: int, dtype: torch.dtype) -> None:
    """But for the order of sums: in the norm of a head, and over the keys."""
    made = Entering(
        LENGTHS, heads=16, kv_heads=2, head_dim=head_dim, half=head_dim // 2, window=window, dtype=dtype, device="cuda"
    )
    one, two = made.asked(ROWS), made.asked(ROWS)
    found = decode(*one, **made.options)
    q = attention_input(*two[:5], two[6].slots)
    wanted = attention(q, *two[3:], **made.options)
    slots = one[6].slots
    assert torch.equal(one[4][slots], two[4][slots])
    torch.testing.assert_close(one[3][slots], two[3][slots], rtol={F32: 1e-5, BF16: 2**-7}[dtype], atol=1e-5)
    assert (found - wanted).abs().max() < {F32: 1e-5, BF16: 3e-2}[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window", [None, 200, 700])
def test_the_same_bits_whatever_else_is_in_the_call(window: int | None, head_dim: int, dtype: torch.dtype) -> None:
    """As long as the device has the same room for their splits."""
    lengths = (1200, 1033, 70, 513, 5)
    made = Entering(
        lengths, heads=16, kv_heads=2, head_dim=head_dim, half=head_dim // 2, window=window, dtype=dtype, device="cuda"
    )
    assert with_room(lambda: all_alike(made) + padded(made), 0) == 0


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("window", [None, 128])
def test_200_repeats_are_identical(window: int | None, head_dim: int) -> None:
    """The slot of the new key holds NaN each time: who reads it before it is written, or after, shows."""
    made = Entering(
        (4096, 3000, 2049, 513), heads=64, kv_heads=8, head_dim=head_dim, half=head_dim // 2, window=window, dtype=BF16,
        device="cuda",
    )  # fmt: skip
    asked = made.asked(range(4))
    slots = asked[6].slots
    first = decode(*asked, **made.options)
    keys, values = asked[3][slots], asked[4][slots]
    assert first.isfinite().all()
    for i in range(200):
        asked[3][slots] = asked[4][slots] = torch.nan if i % 2 else 1e4
        assert torch.equal(decode(*asked, **made.options), first)
        assert torch.equal(asked[3][slots], keys) and torch.equal(asked[4][slots], values)


def test_nan_stays_in_its_sequence() -> None:
    made, _ = world("full", 64, 32, dtype=BF16)
    made.product[1, 3] = torch.nan  # a query, and a key of one that has no others, and a value
    made.product[3, 24] = made.product[5, 29] = torch.nan
    found = made.run(ROWS).isnan()
    assert found[1, 3].all() and found[1].sum() == 64
    assert found[3, :8].all() and found[3].sum() == 8 * 64
    assert found[5, 16:].all() and found[5].sum() == 8 * 64
    assert not found[[0, 2, 4, 6, 7]].any()


@pytest.mark.parametrize("window", [None, 128])
def test_it_can_be_captured_in_a_graph(window: int | None) -> None:
    made, _ = world("full", 128, 64, window=window, dtype=BF16)
    asked = made.asked(ROWS)
    decode(*asked, **made.options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode(*asked, **made.options)
    asked[0].copy_(torch.randn_like(asked[0]))
    graph.replay()
    slots, found, keys = asked[6].slots, out.clone(), asked[3].clone()
    asked[3][slots] = torch.nan
    assert torch.equal(found, decode(*asked, **made.options)) and torch.equal(keys[slots], asked[3][slots])


def test_slots_beyond_two_billion_numbers() -> None:
    """Offsets into the cache are of 64 bits, also where a key is written."""
    made = Entering((40,), heads=2, kv_heads=1, head_dim=256, half=128, dtype=BF16, device="cuda")
    qkv, turns, norms, keys, values, batch, group = made.asked([0])
    far = (1 << 31) // (256 * 16) + 5
    cache = torch.empty(2, (far + 8) * 16, 1, 256, dtype=BF16, device="cuda")
    cache[:, far * 16 : far * 16 + len(keys)] = torch.stack((keys, values))
    wanted = decode(qkv, turns, norms, keys, values, batch, group, **made.options)
    moved = replace(group, pages=group.pages + far, slots=group.slots + far * 16)
    assert torch.equal(decode(qkv, turns, norms, *cache, batch, moved, **made.options), wanted)
    assert torch.equal(cache[0][moved.slots], keys[group.slots])
    assert torch.equal(cache[1][moved.slots], values[group.slots])


def test_host_is_not_waited_for() -> None:
    made, _ = world("full", 64, 32, dtype=BF16)
    asked = made.asked(ROWS)
    decode(*asked, **made.options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode(*asked, **made.options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
