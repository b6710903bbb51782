"""Attention over the pages of the cache on a GPU, for prompts and decoding in one call, in kernels of our own.

A program has one key head and a tile of rows: some queries of one sequence, times the query heads that share the key
head. It walks over tiles of keys with a running maximum and sum; exponents are of base 2. The keys of a sequence with one
query (decoding) are cut into splits, a program each, which a second kernel brings together.

What a query gets depends, to the last bit, on its own sequence and chunk only: tiles and splits of keys stand at fixed
positions, sums have a fixed order, and a key that is masked changes nothing. With `invariant` it does not matter either how
a prompt was cut into chunks: chunks and single queries have tiles of the same size, and a chunk brings its splits together
as they come, in the way of the second kernel.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.batch import Batch, GroupBatch
from slipstream.ops.attention import SPLIT
from slipstream.ops.chain import chain

LOG2E = math.log2(math.e)
WHOLE = 1 << 30  # no splits
PREFETCH_L2 = tl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")


def attention(
    q: Tensor,  # (tokens, heads, head_dim)
    keys: Tensor,  # (num_slots, kv_heads, head_dim)
    values: Tensor,
    batch: Batch,
    group: GroupBatch,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (heads,)
    invariant: bool = False,
) -> Tensor:
    (tokens, heads, head_dim), kv_heads = q.shape, keys.shape[1]
    q = q if q.stride(2) == 1 else q.contiguous()
    out = torch.empty(tokens, heads, head_dim, dtype=q.dtype, device=q.device)
    pages, first_pages = group.page_table
    sequences, share, width = len(pages), heads // kv_heads, max(16, triton.next_power_of_2(head_dim))
    # A score is scale * s, or if it is capped softcap * tanh(inner * s).
    inner = None if softcap is None else 2 * LOG2E * scale / softcap
    scale = LOG2E * (scale if softcap is None else softcap)
    tensors = (q, keys, values, pages, first_pages, *batch.bounds, sinks, out)
    numbers = (q.stride(0), q.stride(1), keys.stride(0), keys.stride(1), pages.stride(0), sequences, scale, inner)
    shape = {
        "WINDOW": group.window or 0, "PAGE": group.page_size, "KV_HEADS": kv_heads, "SHARE": share,
        "HEAD_DIM": head_dim, "WIDTH": width,
    }  # fmt: skip
    split, most = splits(group.window, pages.shape[1] * group.page_size)
    # Which products the compiler fuses with sums, it chooses kernel by kernel. Without that, two have the same bits.
    options = {"SPLIT": split, "INVARIANT": invariant, "enable_fp_fusion": not invariant, **chain(q.device)}
    with torch.cuda.device_of(q):  # Triton launches on the current device
        if not batch.decode_only:
            layout = tiles(share, width, q.dtype, False, invariant)
            blocks = tokens // (layout["BLOCK_M"] // share) + sequences  # at least as many as there are
            _attend[(blocks * kv_heads,)](
                *tensors, None, None, None, *numbers, **shape, **layout, **options, DECODE=False
            )
        if batch.decode_only or any(b - a == 1 for a, b in pairwise(batch.query_starts)):
            tops = norms = parts = None
            if most > 1:
                tops = torch.empty(sequences, heads, most, dtype=torch.float32, device=q.device)
                norms = torch.empty_like(tops)
                parts = torch.empty(sequences, heads, most, head_dim, dtype=torch.float32, device=q.device)
            layout = tiles(share, width, q.dtype, True, invariant, group.window)
            _attend[sequences * kv_heads, most](
                *tensors, tops, norms, parts, *numbers, **shape, **layout, **options, DECODE=True
            )
            if most > 1:
                _combine[heads, sequences](
                    tops, norms, parts, *batch.bounds, sinks, out, most, WINDOW=group.window or 0, SPLIT=split,
                    HEAD_DIM=head_dim, WIDTH=width, num_warps=1, enable_fp_fusion=not invariant, **chain(q.device),
                )  # fmt: skip
    return out


def splits(window: int | None, longest: int) -> tuple[int, int]:
    """Keys in a split, and the most splits of a sequence whose pages hold `longest` keys."""
    if window is None:
        return SPLIT, triton.cdiv(longest, SPLIT)
    if window <= SPLIT:
        return WHOLE, 1
    return SPLIT, triton.cdiv(min(window, longest), SPLIT) + 1  # it need not begin where a split does


def tiles(
    share: int, width: int, dtype: torch.dtype, decode: bool, invariant: bool, window: int | None = None
) -> dict[str, int]:
    """Rows and keys of a tile, and how it is worked on: the best of a sweep on an H100."""
    rows = triton.next_power_of_2(share)
    if dtype == torch.float32:  # exact, so without tensor cores: all operands go through registers
        return {"BLOCK_M": max(16, rows), "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    # Each product of a walk is waited for before its operands change, so fetching two tiles ahead is safe here.
    if invariant:
        layout = {"BLOCK_M": max(64, rows), "BLOCK_N": 64, "num_warps": 8 if width > 128 else 4}
        return layout | {"num_stages": 3 if decode and width <= 128 else 2}
    if decode:
        wide = width <= 64 and window is None  # few keys fill narrow tiles better
        return {"BLOCK_M": max(16, rows), "BLOCK_N": 128 if wide else 64, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": max(128, rows), "BLOCK_N": 64, "num_warps": 8, "num_stages": 2 if width > 128 else 3}


@triton.jit
def _slots(pages, key, low, high, PAGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where keys low..high-1 stand in the cache."""
    return tl.load(pages + key // PAGE, mask=(key >= low) & (key < high), other=0).to(tl.int64) * PAGE + key % PAGE


@triton.jit
def _prefetch(pointers):  # type: ignore[no-untyped-def]
    tl.inline_asm_elementwise(PREFETCH_L2, "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _walk(  # type: ignore[no-untyped-def]
    total, top, norm, q, keys, values, slot_stride, pages, position, begin, end, low, high, scale, inner,
    WINDOW: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Take in the tiles of keys at begin..end-1: the weighted values, the largest score and the sum of the weights. Only
    keys low..high-1 are read; MASKED is for tiles where not every query sees every key."""
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, WIDTH)[None, :]
    slots = _slots(pages, begin + columns, low, high, PAGE)
    for at in range(begin, end, BLOCK_N):
        key = at + columns
        inside = (key >= low) & (key < high)
        place = slots[:, None] * slot_stride + dims
        mask = (dims < HEAD_DIM) & inside[:, None] if MASKED else dims < HEAD_DIM
        k = tl.load(keys + place, mask=mask, other=0)
        v = tl.load(values + place, mask=mask, other=0)
        # The next tile's, now: so its keys and values can be fetched while this one is multiplied.
        slots = _slots(pages, key + BLOCK_N, low, high, PAGE)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if inner is not None:
            scores = 1 - 2 / (1 + tl.exp2(scores * inner))  # tanh
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
        top = higher
    return total, top, norm


@triton.jit
def _merge(total, top, norm, part, part_top, part_norm):  # type: ignore[no-untyped-def]
    """What two walks found, as if it had been one."""
    higher = tl.maximum(top, part_top)
    base = tl.where(higher == float("-inf"), 0, higher)
    left, right = tl.exp2(top - base), tl.exp2(part_top - base)
    return total * left[:, None] + part * right[:, None], higher, norm * left + part_norm * right


@triton.jit
def _finish(total, top, norm, sink):  # type: ignore[no-untyped-def]
    """The mean of the values. A sink is one more score, which takes weight and has no value."""
    factor = 1 / norm
    if sink is not None:
        factor /= 1 + tl.exp2(sink.to(tl.float32) * 1.4426950408889634 - top - tl.log2(norm))
    return total * factor[:, None]


@triton.jit(do_not_specialize=["table_stride", "sequences"])
def _attend(  # type: ignore[no-untyped-def]
    q, keys, values, pages, first_pages, query_starts, starts, sinks, out, tops, norms, parts,
    q_token, q_head, slot_stride, head_stride, table_stride, sequences, scale, inner,
    WINDOW: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr, SHARE: tl.constexpr, HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, DECODE: tl.constexpr,
    INVARIANT: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """DECODE: one split of a sequence that has one query. Otherwise BLOCK_M // SHARE queries of one that has more."""
    if CHAIN:
        gdc_launch_dependents()
    # Key heads of one place go together, as they are neighbours in memory.
    kv_head, tile = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS
    BLOCK_Q: tl.constexpr = 1 if DECODE else BLOCK_M // SHARE
    if DECODE:
        sequence, block = tile, 0
    else:
        tile = tl.num_programs(0) // KV_HEADS - 1 - tile  # the last queries of a prompt have most to do: they go first
        sequence, beyond = 0, sequences
        while beyond - sequence > 1:  # the last sequence that begins at this tile or before
            middle = (sequence + beyond) // 2
            if tl.load(query_starts + middle) // BLOCK_Q + middle <= tile:
                sequence = middle
            else:
                beyond = middle
        block = tile - tl.load(query_starts + sequence) // BLOCK_Q - sequence
    row = tl.load(query_starts + sequence)
    queries = tl.load(query_starts + sequence + 1) - row
    first = block * BLOCK_Q
    if first >= queries or (queries == 1) != DECODE:
        return
    lane = tl.arange(0, BLOCK_M)
    query = first + lane // SHARE
    head = kv_head * SHARE + lane % SHARE
    real = (lane < BLOCK_Q * SHARE) & (query < queries)
    start = tl.load(starts + sequence)
    low, high = 0, start + tl.minimum(first + BLOCK_Q, queries)
    if WINDOW > 0:
        low = tl.maximum(start + first - WINDOW + 1, 0)
    num_splits = tl.cdiv(high, SPLIT) - low // SPLIT
    if DECODE:
        split = low // SPLIT + tl.program_id(1)
        if split * SPLIT >= high:
            return
        low, high = tl.maximum(low, split * SPLIT), tl.minimum(high, (split + 1) * SPLIT)
    pages += sequence * table_stride - tl.load(first_pages + sequence)
    keys += kv_head.to(tl.int64) * head_stride
    values += kv_head.to(tl.int64) * head_stride
    token = (row + query).to(tl.int64)
    dims = tl.arange(0, WIDTH)[None, :]
    mask = real[:, None] & (dims < HEAD_DIM)
    if CHAIN:
        if DECODE:  # what stands in the cache is on its way to the L2 before the query is there
            for begin in range(low // BLOCK_N * BLOCK_N, high, BLOCK_N):
                place = _slots(pages, begin + tl.arange(0, BLOCK_N), low, high, PAGE) * slot_stride
                for line in tl.static_range(0, HEAD_DIM, 64):
                    _prefetch(keys + place + line)
                    _prefetch(values + place + line)
        gdc_wait()
    rows = tl.load(q + (token * q_token + head * q_head)[:, None] + dims, mask=mask, other=0)

    total = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_M,), tl.float32)
    if not DECODE and INVARIANT:
        nothing, lowest, zero = total, top, norm
        for split in range(low // SPLIT, tl.cdiv(high, SPLIT)):
            begin, end = tl.maximum(low, split * SPLIT), tl.minimum(high, (split + 1) * SPLIT)
            part, part_top, part_norm = _walk(
                nothing, lowest, zero, rows, keys, values, slot_stride, pages, start + query,
                begin // BLOCK_N * BLOCK_N, end, begin, end, scale, inner, WINDOW, PAGE, HEAD_DIM, WIDTH, BLOCK_N, True,
            )  # fmt: skip
            total, top, norm = _merge(total, top, norm, part, part_top, part_norm)
    else:
        begin = low // BLOCK_N * BLOCK_N
        if not DECODE:  # tiles of which every query sees every key need no masks
            full, rest = begin, (start + first + 1) // BLOCK_N * BLOCK_N
            if WINDOW > 0:
                full = tl.maximum(tl.cdiv(high - WINDOW, BLOCK_N) * BLOCK_N, begin)
                rest = tl.maximum(rest, full)
                total, top, norm = _walk(
                    total, top, norm, rows, keys, values, slot_stride, pages, start + query, begin,
                    tl.minimum(full, high), low, high, scale, inner, WINDOW, PAGE, HEAD_DIM, WIDTH, BLOCK_N, True,
                )  # fmt: skip
            total, top, norm = _walk(
                total, top, norm, rows, keys, values, slot_stride, pages, start + query, full, rest,
                low, high, scale, inner, WINDOW, PAGE, HEAD_DIM, WIDTH, BLOCK_N, False,
            )  # fmt: skip
            begin = rest
        total, top, norm = _walk(
            total, top, norm, rows, keys, values, slot_stride, pages, start + query, begin, high,
            low, high, scale, inner, WINDOW, PAGE, HEAD_DIM, WIDTH, BLOCK_N, True,
        )  # fmt: skip

    if parts is not None and num_splits > 1:
        at = (sequence * KV_HEADS * SHARE + head).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(tops + at, top, mask=real)
        tl.store(norms + at, norm, mask=real)
        tl.store(parts + at[:, None] * HEAD_DIM + dims, total, mask=mask)
        return
    sink = None if sinks is None else tl.load(sinks + head, mask=real, other=0)
    total = _finish(total, top, norm, sink).to(out.dtype.element_ty)
    tl.store(out + (token * (KV_HEADS * SHARE) + head)[:, None] * HEAD_DIM + dims, total, mask=mask)


@triton.jit(do_not_specialize=["most"])
def _combine(  # type: ignore[no-untyped-def]
    tops, norms, parts, query_starts, starts, sinks, out, most,
    WINDOW: tl.constexpr, SPLIT: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """The splits of one query and head together, in order."""
    if CHAIN:
        gdc_launch_dependents()
        gdc_wait()
    sequence, head = tl.program_id(1), tl.program_id(0) + tl.arange(0, 1)
    row = tl.load(query_starts + sequence)
    position = tl.load(starts + sequence)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(position - WINDOW + 1, 0)
    num_splits = position // SPLIT - low // SPLIT + 1
    if tl.load(query_starts + sequence + 1) - row != 1 or num_splits == 1:
        return
    dims = tl.arange(0, WIDTH)[None, :]
    at = (sequence * tl.num_programs(0) + head).to(tl.int64) * most
    total = tl.zeros((1, WIDTH), tl.float32)
    top = tl.full((1,), float("-inf"), tl.float32)
    norm = tl.zeros((1,), tl.float32)
    for split in tl.range(0, num_splits, num_stages=4):
        part = tl.load(parts + (at + split)[:, None] * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0)
        total, top, norm = _merge(total, top, norm, part, tl.load(tops + at + split), tl.load(norms + at + split))
    sink = None if sinks is None else tl.load(sinks + head)
    total = _finish(total, top, norm, sink).to(out.dtype.element_ty)
    at = row.to(tl.int64) * tl.num_programs(0) + head
    tl.store(out + at[:, None] * HEAD_DIM + dims, total, mask=dims < HEAD_DIM)
