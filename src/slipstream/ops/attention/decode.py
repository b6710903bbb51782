"""Attention of sequences that have one query each (decoding), and what comes before it in the same kernel: head norms, rotation and
the write of the new keys.

A program has one key head of one sequence and a split of its keys; a second kernel brings the splits together. Where it is given the
product of the layer, each program makes its own queries of it. The one with the newest split also makes the new key and value, writes
them to the cache, and begins its walk as if it had taken them in. No program reads what another one writes: walks end before the
newest key of their sequence, and no other sequence has its page (scheduler.py: Scheduler._settle).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.batch import Batch, GroupBatch
from slipstream.ops.attention import paged
from slipstream.ops.attention.paged import capped, finish, merge, slots_of, take, walk
from slipstream.ops.attention_input.triton import angles, arguments, enter, fetch, weights
from slipstream.ops.chain import chain, prefetch, processors
from slipstream.ops.rope import Turns


def decode(
    qkv: Tensor,  # (tokens, heads + 2 * kv_heads, head_dim)
    turns: Turns | None,
    norms: tuple[Tensor, Tensor, float] | None,
    keys: Tensor,  # (num_slots, kv_heads, head_dim)
    values: Tensor,
    batch: Batch,
    group: GroupBatch,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (heads,)
) -> Tensor:  # (tokens, heads, head_dim)
    """attention_input and then attention, of a step in which every sequence has one query. The newest key is the first in the
    order of sums, and splits are shorter where few sequences leave room, so the last bits may be others than where the two ops run,
    beside a prompt, and than beside other sequences."""
    qkv = qkv if qkv.stride(2) == 1 else qkv.contiguous()
    tokens, all_heads, head_dim = qkv.shape
    out = torch.empty(tokens, all_heads - 2 * keys.shape[1], head_dim, dtype=qkv.dtype, device=qkv.device)
    entry = (group.slots, *arguments(turns, norms))
    launch(qkv, keys, values, batch, group, out, scale, softcap, sinks, False, entry)
    return out


def launch(
    q: Tensor,  # (tokens, heads, head_dim), or qkv where there is an entry
    keys: Tensor,
    values: Tensor,
    batch: Batch,
    group: GroupBatch,
    out: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    invariant: bool,
    entry: tuple[Any, ...] = (None, *arguments(None, None)),
) -> None:
    """Fill the rows of `out` that are of sequences with one query."""
    tensors, numbers, shape = paged.arguments(q, keys, values, batch, group, out, scale, softcap, sinks)
    (_, heads, head_dim), sequences = out.shape, len(batch.starts)
    room = 0 if entry[0] is None else processors(q.device) // (sequences * shape["KV_HEADS"])
    split, most = paged.splits(group, room)
    layout = paged.tiles(shape["SHARE"], shape["WIDTH"], q.dtype, True, invariant, group.window, room > 0)
    # Which products the compiler fuses with sums, it chooses kernel by kernel. Without that, two have the same bits.
    options = {"enable_fp_fusion": not invariant, **chain(q.device)}
    tops = norms = parts = None
    if most > 1:
        tops = torch.empty(sequences, heads, most, dtype=torch.float32, device=q.device)
        norms = torch.empty_like(tops)
        parts = torch.empty(sequences, heads, most, head_dim, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        ahead = room > 0 and shape["WIDTH"] <= 128
        _decode[sequences * shape["KV_HEADS"], most](
            *tensors, tops, norms, parts, *entry, *numbers, split, **shape, **layout, AHEAD=ahead, **options
        )
        if most > 1:
            _combine[heads, sequences](
                tops, norms, parts, *batch.bounds, sinks, out, most, split, WINDOW=shape["WINDOW"], HEAD_DIM=head_dim,
                WIDTH=shape["WIDTH"], AT_ONCE=8, num_warps=1, **options,
            )  # fmt: skip


@triton.jit(do_not_specialize=["table_stride", "keys_each"])
def _decode(  # type: ignore[no-untyped-def]
    q, keys, values, pages, first_pages, query_starts, starts, sinks, out, tops, norms, parts,
    slots, positions, freq, q_weight, k_weight, factor, eps, HALF: tl.constexpr,
    q_token, q_head, slot_stride, head_stride, table_stride, scale, inner, keys_each,
    WINDOW: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr, SHARE: tl.constexpr, HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, AHEAD: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    """A split of `keys_each` of a sequence's keys, for the query heads that share a key head.

    AHEAD: its first tile is in registers before the query is there. That is for few programs, as fewer find room so.
    """
    if CHAIN:
        gdc_launch_dependents()
    # Key heads of one place go together, as they are neighbours in memory.
    kv_head, sequence = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS
    row, position = tl.load(query_starts + sequence), tl.load(starts + sequence)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(position - WINDOW + 1, 0)
    newest, num_splits = position // keys_each, position // keys_each - low // keys_each + 1
    split = low // keys_each + tl.program_id(1)
    if tl.load(query_starts + sequence + 1) - row != 1 or split > newest:
        return
    high = position + 1 if slots is None else position  # the newest key is not in the cache yet
    low, high = tl.maximum(low, split * keys_each), tl.minimum(high, (split + 1) * keys_each)
    pages += sequence * table_stride - tl.load(first_pages + sequence)
    keys += kv_head.to(tl.int64) * head_stride
    values += kv_head.to(tl.int64) * head_stride
    token = row.to(tl.int64)
    source = q + token * q_token
    lane = tl.arange(0, BLOCK_M)
    head = kv_head * SHARE + lane
    dims = tl.arange(0, WIDTH)[None, :]
    mask = (lane < SHARE)[:, None] & (dims < HEAD_DIM)
    first = low // BLOCK_N * BLOCK_N
    ahead = first
    if AHEAD:  # of the cache no kernel of this step writes what is read here
        ahead += BLOCK_N
        key = first + tl.arange(0, BLOCK_N)
        inside = (key >= low) & (key < high)
        stand = slots_of(pages, key, low, high, PAGE)[:, None] * slot_stride + dims
        there = inside[:, None] & (dims < HEAD_DIM)
        first_keys = tl.load(keys + stand, mask=there, other=0)
        first_values = tl.load(values + stand, mask=there, other=0)
    if CHAIN:  # the rest of it is on its way to the L2 before the query is there
        for begin in range(ahead, high, BLOCK_N):
            place = slots_of(pages, begin + tl.arange(0, BLOCK_N), low, high, PAGE) * slot_stride
            for line in tl.static_range(0, HEAD_DIM, 64):
                prefetch(keys + place + line)
                prefetch(values + place + line)
    at = tl.broadcast_to(dims, (BLOCK_M, WIDTH))
    cos, sin, partner = angles(positions, freq, token, factor, HALF, BLOCK_M, WIDTH, q.dtype.element_ty)
    wq, wq_there = (None, None) if q_weight is None else weights(q_weight, at, partner, HALF, HEAD_DIM)
    wk, wk_there = (None, None) if k_weight is None else weights(k_weight, at, partner, HALF, HEAD_DIM)
    slot = 0 if slots is None else tl.load(slots + token)
    if CHAIN:
        gdc_wait()
    rows, others = fetch(source + head[:, None] * q_head, at, partner, mask, HALF)
    total = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_M,), tl.float32)
    if slots is not None:  # each lane makes the key, so that nothing has to go from one to another
        source += (KV_HEADS * SHARE + kv_head) * q_head
        k, other = fetch(source, at, partner, at < HEAD_DIM, HALF)
        v = tl.load(source + KV_HEADS * q_head + at, mask=at < HEAD_DIM, other=0)
        rows = enter(rows, others, wq, wq_there, eps, cos, sin, at, HALF, HEAD_DIM)
        k = enter(k, other, wk, wk_there, eps, cos, sin, at, HALF, HEAD_DIM)
        if split == newest:
            once = (lane == 0)[:, None] & (at < HEAD_DIM)
            tl.store(keys + slot * slot_stride + at, k, mask=once)
            tl.store(values + slot * slot_stride + at, v, mask=once)
            top = capped(tl.sum(rows.to(tl.float32) * k.to(tl.float32), 1), inner) * scale
            total = v.to(tl.float32)
        norm = tl.where(split == newest, tl.exp2(top - top), 0)  # 1, or NaN
    if AHEAD:
        total, top, norm = take(
            total, top, norm, rows, first_keys, first_values, key, inside, position + 0 * lane, scale, inner, WINDOW, True
        )  # fmt: skip
    total, top, norm = walk(
        total, top, norm, rows, keys, values, slot_stride, pages, position + 0 * lane, ahead, high,
        low, high, scale, inner, WINDOW, PAGE, HEAD_DIM, WIDTH, BLOCK_N, True,
    )  # fmt: skip

    if parts is not None and num_splits > 1:
        part = (sequence * KV_HEADS * SHARE + head).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(tops + part, top, mask=lane < SHARE)
        tl.store(norms + part, norm, mask=lane < SHARE)
        tl.store(parts + part[:, None] * HEAD_DIM + dims, total, mask=mask)
        return
    sink = None if sinks is None else tl.load(sinks + head, mask=lane < SHARE, other=0)
    total = finish(total, top, norm, sink).to(out.dtype.element_ty)
    tl.store(out + (token * (KV_HEADS * SHARE) + head)[:, None] * HEAD_DIM + dims, total, mask=mask)


@triton.jit(do_not_specialize=["most", "keys_each"])
def _combine(  # type: ignore[no-untyped-def]
    tops, norms, parts, query_starts, starts, sinks, out, most, keys_each,
    WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, AT_ONCE: tl.constexpr,
    CHAIN: tl.constexpr,
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
    num_splits = position // keys_each - low // keys_each + 1
    if tl.load(query_starts + sequence + 1) - row != 1 or num_splits == 1:
        return
    dims = tl.arange(0, WIDTH)[None, :]
    at = (sequence * tl.num_programs(0) + head).to(tl.int64) * most
    total = tl.zeros((1, WIDTH), tl.float32)
    top = tl.full((1,), float("-inf"), tl.float32)
    norm = tl.zeros((1,), tl.float32)
    for first in range(0, num_splits, AT_ONCE):
        found, found_tops, found_norms = (), (), ()  # all of them are asked for before the first is waited for
        for i in tl.static_range(AT_ONCE):
            split = first + i + tl.arange(0, 1)
            there = split < num_splits
            found += (
                tl.load(
                    parts + (at + split)[:, None] * HEAD_DIM + dims, mask=there[:, None] & (dims < HEAD_DIM), other=0
                ),
            )  # type: ignore[assignment]
            found_tops += (tl.load(tops + at + split, mask=there, other=float("-inf")),)  # type: ignore[assignment]
            found_norms += (tl.load(norms + at + split, mask=there, other=0),)  # type: ignore[assignment]
        for i in tl.static_range(AT_ONCE):  # one that is not there changes nothing
            total, top, norm = merge(total, top, norm, found[i], found_tops[i], found_norms[i])
    sink = None if sinks is None else tl.load(sinks + head)
    total = finish(total, top, norm, sink).to(out.dtype.element_ty)
    at = row.to(tl.int64) * tl.num_programs(0) + head
    tl.store(out + at[:, None] * HEAD_DIM + dims, total, mask=dims < HEAD_DIM)
