"""What both kernels of attention over pages are made of: tiles and splits of keys, and the walk over them.

A walk takes in tiles of keys with a running maximum and sum; exponents are of base 2. Tiles and splits stand at fixed positions (in
`decode`, at those for so many sequences and pages), sums have a fixed order, and a key that is masked changes nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.batch import Batch, GroupBatch
from slipstream.ops.attention import SPLIT

LOG2E = math.log2(math.e)
WHOLE = 1 << 30  # no splits
SHORT = 64  # keys of the shortest split


def arguments(
    q: Tensor,  # (tokens, heads or more, head_dim)
    keys: Tensor,  # (num_slots, kv_heads, head_dim)
    values: Tensor,
    batch: Batch,
    group: GroupBatch,
    out: Tensor,  # (tokens, heads, head_dim)
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,  # (heads,)
) -> tuple[tuple[Any, ...], tuple[Any, ...], dict[str, int]]:
    """What both kernels are launched with: tensors, numbers and the shape of the model."""
    pages, first_pages = group.page_table
    # A score is scale * s, or if it is capped softcap * tanh(inner * s).
    inner = None if softcap is None else 2 * LOG2E * scale / softcap
    scale = LOG2E * (scale if softcap is None else softcap)
    tensors = (q, keys, values, pages, first_pages, *batch.bounds, sinks, out)
    numbers = (q.stride(0), q.stride(1), keys.stride(0), keys.stride(1), pages.stride(0), scale, inner)
    (_, heads, head_dim), kv_heads = out.shape, keys.shape[1]
    shape = {
        "WINDOW": group.window or 0, "PAGE": group.page_size, "KV_HEADS": kv_heads, "SHARE": heads // kv_heads,
        "HEAD_DIM": head_dim, "WIDTH": max(16, triton.next_power_of_2(head_dim)),
    }  # fmt: skip
    return tensors, numbers, shape


def splits(group: GroupBatch, room: int = 0) -> tuple[int, int]:
    """Keys in a split, and the most splits of a sequence.

    Args:
        room: splits of a sequence that find room on the device at once. Where that is several, they are shorter: one tile after the
            other takes longer than to add up a few splits.
    """
    window, longest = group.window, group.page_table[0].shape[1] * group.page_size
    span = longest if window is None else min(window, longest)
    size = SPLIT if room < 4 else min(SPLIT, max(SHORT, triton.next_power_of_2(triton.cdiv(span, room))))
    if window is None:
        return size, triton.cdiv(longest, size)
    if window <= SPLIT:
        return WHOLE, 1
    return size, triton.cdiv(span, size) + 1  # it need not begin where a split does


def tiles(
    share: int,
    width: int,
    dtype: torch.dtype,
    decode: bool,
    invariant: bool,
    window: int | None = None,
    few: bool = False,
) -> dict[str, int]:
    """Rows and keys of a tile, and how it is worked on: the best of a sweep on an H100.

    Args:
        few: each program has a multiprocessor to itself.
    """
    rows = triton.next_power_of_2(share)
    if dtype == torch.float32:  # exact, so without tensor cores: all operands go through registers
        return {"BLOCK_M": max(16, rows), "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    # Each product of a walk is waited for before its operands change, so fetching two tiles ahead is safe here.
    if invariant:
        layout = {"BLOCK_M": max(64, rows), "BLOCK_N": 64, "num_warps": 8 if width > 128 else 4}
        return layout | {"num_stages": 3 if decode and width <= 128 else 2}
    if decode:
        wide = width <= 64 and window is None and not few  # few keys fill narrow tiles better
        warps = 8 if few and width <= 64 else 4
        return {"BLOCK_M": max(16, rows), "BLOCK_N": 128 if wide else 64, "num_warps": warps, "num_stages": 3}
    return {"BLOCK_M": max(128, rows), "BLOCK_N": 64, "num_warps": 8, "num_stages": 2 if width > 128 else 3}


@triton.jit
def slots_of(pages, key, low, high, PAGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where keys low..high-1 stand in the cache."""
    return tl.load(pages + key // PAGE, mask=(key >= low) & (key < high), other=0).to(tl.int64) * PAGE + key % PAGE


@triton.jit
def capped(scores, inner):  # type: ignore[no-untyped-def]
    if inner is not None:
        scores = 1 - 2 / (1 + tl.exp2(scores * inner))  # tanh
    return scores


@triton.jit
def take(  # type: ignore[no-untyped-def]
    total, top, norm, q, k, v, key, inside, position, scale, inner, WINDOW: tl.constexpr, MASKED: tl.constexpr
):
    """A tile of a walk: keys and values that have been read."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    scores = capped(scores, inner)
    if MASKED:
        seen = inside[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            seen &= key[None, :] > position[:, None] - WINDOW
        scores = tl.where(seen, scores * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0, higher)  # nothing seen yet
        weights = tl.exp2(scores - base[:, None])
    else:
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        base = higher
        weights = tl.exp2(scores * scale - base[:, None])
    shrink = tl.exp2(top - base)
    norm = norm * shrink + tl.sum(weights, 1)
    total = tl.dot(weights.to(v.dtype), v, total * shrink[:, None], input_precision="ieee")
    return total, higher, norm


@triton.jit
def walk(  # type: ignore[no-untyped-def]
    total, top, norm, q, keys, values, slot_stride, pages, position, begin, end, low, high, scale, inner,
    WINDOW: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Take in the tiles of keys at begin..end-1: the weighted values, the largest score and the sum of the weights. Only
    keys low..high-1 are read; MASKED is for tiles where not every query sees every key."""
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, WIDTH)[None, :]
    slots = slots_of(pages, begin + columns, low, high, PAGE)
    for at in range(begin, end, BLOCK_N):
        key = at + columns
        inside = (key >= low) & (key < high)
        place = slots[:, None] * slot_stride + dims
        mask = (dims < HEAD_DIM) & inside[:, None] if MASKED else dims < HEAD_DIM
        k = tl.load(keys + place, mask=mask, other=0)
        v = tl.load(values + place, mask=mask, other=0)
        # The next tile's, now: so its keys and values can be fetched while this one is multiplied.
        slots = slots_of(pages, key + BLOCK_N, low, high, PAGE)
        total, top, norm = take(total, top, norm, q, k, v, key, inside, position, scale, inner, WINDOW, MASKED)
    return total, top, norm


@triton.jit
def merge(total, top, norm, part, part_top, part_norm):  # type: ignore[no-untyped-def]
    """What two walks found, as if it had been one."""
    higher = tl.maximum(top, part_top)
    base = tl.where(higher == float("-inf"), 0, higher)
    left, right = tl.exp2(top - base), tl.exp2(part_top - base)
    return total * left[:, None] + part * right[:, None], higher, norm * left + part_norm * right


@triton.jit
def finish(total, top, norm, sink):  # type: ignore[no-untyped-def]
    """The mean of the values. A sink is one more score, which takes weight and has no value."""
    factor = 1 / norm
    if sink is not None:
        factor /= 1 + tl.exp2(sink.to(tl.float32) * 1.4426950408889634 - top - tl.log2(norm))
    return total * factor[:, None]
