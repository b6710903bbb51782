"""Attention over the pages of the cache on a GPU, for prompts and decoding in one call, in kernels of our own.

A program has one key head and a tile of rows: some queries of one sequence, times the query heads that share the key
head. Sequences that have one query (decoding) are left to the kernel of ops/attention/decode.py.

What a query gets depends, to the last bit, on its own sequence and chunk only (see ops/attention/paged.py). With `invariant`
it does not matter either how a prompt was cut into chunks: chunks and single queries have tiles of the same size, and a chunk
brings its splits together as they come, in the way of the kernel that does it for single queries.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.batch import Batch, GroupBatch
from slipstream.ops.attention import paged
from slipstream.ops.attention.decode import launch
from slipstream.ops.attention.paged import finish, merge, walk
from slipstream.ops.chain import chain


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
    q = q if q.stride(2) == 1 else q.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    arguments = (q, keys, values, batch, group, out, scale, softcap, sinks)
    if not batch.decode_only:
        tensors, numbers, shape = paged.arguments(*arguments)
        layout = paged.tiles(shape["SHARE"], shape["WIDTH"], q.dtype, False, invariant)
        sequences = len(batch.starts)
        blocks = len(q) // (layout["BLOCK_M"] // shape["SHARE"]) + sequences  # at least as many as there are
        with torch.cuda.device_of(q):  # Triton launches on the current device
            _attend[(blocks * shape["KV_HEADS"],)](
                *tensors, *numbers, sequences, **shape, **layout, SPLIT=paged.splits(group)[0], INVARIANT=invariant,
                enable_fp_fusion=not invariant, **chain(q.device),
            )  # fmt: skip
    if batch.decode_only or any(b - a == 1 for a, b in pairwise(batch.query_starts)):
        launch(*arguments, invariant)
    return out


@triton.jit(do_not_specialize=["table_stride", "sequences"])
def _attend(  # type: ignore[no-untyped-def]
    q, keys, values, pages, first_pages, query_starts, starts, sinks, out,
    q_token, q_head, slot_stride, head_stride, table_stride, scale, inner, sequences,
    WINDOW: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr, SHARE: tl.constexpr, HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, INVARIANT: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    """BLOCK_M // SHARE queries of a sequence that has more than one."""
    if CHAIN:
        gdc_launch_dependents()
    # Key heads of one place go together, as they are neighbours in memory.
    kv_head, tile = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS
    tile = tl.num_programs(0) // KV_HEADS - 1 - tile  # the last queries of a prompt have most to do: they go first
    BLOCK_Q: tl.constexpr = BLOCK_M // SHARE
    sequence, beyond = 0, sequences
    while beyond - sequence > 1:  # the last sequence that begins at this tile or before
        middle = (sequence + beyond) // 2
        if tl.load(query_starts + middle) // BLOCK_Q + middle <= tile:
            sequence = middle
        else:
            beyond = middle
    first = (tile - tl.load(query_starts + sequence) // BLOCK_Q - sequence) * BLOCK_Q
    row = tl.load(query_starts + sequence)
    queries = tl.load(query_starts + sequence + 1) - row
    if first >= queries or queries == 1:
        return
    lane = tl.arange(0, BLOCK_M)
    query = first + lane // SHARE
    head = kv_head * SHARE + lane % SHARE
    real = (lane < BLOCK_Q * SHARE) & (query < queries)
    start = tl.load(starts + sequence)
    low, high = 0, start + tl.minimum(first + BLOCK_Q, queries)
    if WINDOW > 0:
        low = tl.maximum(start + first - WINDOW + 1, 0)
    pages += sequence * table_stride - tl.load(first_pages + sequence)
    keys += kv_head.to(tl.int64) * head_stride
    values += kv_head.to(tl.int64) * head_stride
    token = (row + query).to(tl.int64)
    dims = tl.arange(0, WIDTH)[None, :]
    mask = real[:, None] & (dims < HEAD_DIM)
    if CHAIN:
        gdc_wait()
    rows = tl.load(q + (token * q_token + head * q_head)[:, None] + dims, mask=mask, other=0)

    total = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_M,), tl.float32)
    if INVARIANT:
        nothing, lowest, zero = total, top, norm
        for split in range(low // SPLIT, tl.cdiv(high, SPLIT)):
            begin, end = tl.maximum(low, split * SPLIT), tl.minimum(high, (split + 1) * SPLIT)
            part, part_top, part_norm = walk(
                nothing, lowest, zero, rows, keys, values, slot_stride, pages, start + query,
                begin // BLOCK_N * BLOCK_N, end, begin, end, scale, inner, WINDOW, PAGE, HEAD_DIM, WIDTH, BLOCK_N, True,
            )  # fmt: skip
            total, top, norm = merge(total, top, norm, part, part_top, part_norm)
    else:  # tiles of which every query sees every key need no masks
        full, rest = low // BLOCK_N * BLOCK_N, (start + first + 1) // BLOCK_N * BLOCK_N
        if WINDOW > 0:
            begin = full
            full = tl.maximum(tl.cdiv(high - WINDOW, BLOCK_N) * BLOCK_N, begin)
            rest = tl.maximum(rest, full)
            total, top, norm = walk(
                total, top, norm, rows, keys, values, slot_stride, pages, start + query, begin,
                tl.minimum(full, high), low, high, scale, inner, WINDOW, PAGE, HEAD_DIM, WIDTH, BLOCK_N, True,
            )  # fmt: skip
        total, top, norm = walk(
            total, top, norm, rows, keys, values, slot_stride, pages, start + query, full, rest,
            low, high, scale, inner, WINDOW, PAGE, HEAD_DIM, WIDTH, BLOCK_N, False,
        )  # fmt: skip
        total, top, norm = walk(
            total, top, norm, rows, keys, values, slot_stride, pages, start + query, rest, high,
            low, high, scale, inner, WINDOW, PAGE, HEAD_DIM, WIDTH, BLOCK_N, True,
        )  # fmt: skip

    sink = None if sinks is None else tl.load(sinks + head, mask=real, other=0)
    total = finish(total, top, norm, sink).to(out.dtype.element_ty)
    tl.store(out + (token * (KV_HEADS * SHARE) + head)[:, None] * HEAD_DIM + dims, total, mask=mask)
