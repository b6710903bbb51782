"""The sum over ranks in one kernel, which writes to the memory of other cards and finds there what they wrote.

A program has a row. It writes its words into a slot of its own on each other card, each word together with the number of this sum, 8
bytes that arrive at once; then it looks at its own card's slots until every word in them has that number. So nothing has to be
flushed or signalled, and a word is on its way for as long as a link takes. Slots alternate: who writes number n + 2 has seen every
row's number n + 1, which its sender wrote when it was done with n.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.ops.chain import chain
from slipstream.ops.moe import Pairs
from slipstream.ops.moe.kernels import summed
from slipstream.ops.norm.triton import left, registers
from slipstream.ops.reduce import ROWS, WORDS, Slots


def reduce(x: Tensor, slots: Slots) -> Tensor:  # (rows, width)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, None, None, out, 0.0, slots)
    return out


def reduce_norm(
    part: Tensor | Pairs, x: Tensor, weight: Tensor, eps: float, slots: Slots, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    total, out = (torch.empty(x.shape, dtype=d, device=x.device) for d in (x.dtype, dtype or x.dtype))
    _launch(part, x, weight, total, out, eps, slots)
    return total, out


def _launch(
    part: Tensor | Pairs,
    x: Tensor | None,
    weight: Tensor | None,
    total: Tensor | None,
    out: Tensor,
    eps: float,
    slots: Slots,
) -> None:
    rows, made = len(part), _words(out)
    if not rows:
        return
    before, after = (y if y is None or y.dtype == torch.float32 else _words(y) for y in (x, total))
    mine, pairs = (None, part) if isinstance(part, Pairs) else (_words(part), None)
    size = triton.next_power_of_2(made.shape[1])
    with torch.cuda.device_of(out):  # Triton launches on the current device
        _sum[(rows,)](
            mine, before, weight, after, made, slots.table, slots.counts, slots.stop,
            0 if mine is None else mine.stride(0), 0 if before is None else before.stride(0), made.shape[1], eps,
            *left(pairs), RANK=slots.rank, RANKS=slots.size, HALVES=part.itemsize == 2, ROWS=ROWS, MOST=WORDS, SIZE=size,
            num_warps=min(16, max(1, size // 128)), maxnreg=registers(2 * size, pairs), **chain(out.device),
        )  # fmt: skip


def _words(x: Tensor) -> Tensor:
    """The same rows as int32: two halves, or a float32, in each."""
    whole = x.stride(1) == 1 and x.stride(0) * x.itemsize % 4 == 0 and x.data_ptr() % 4 == 0
    return (x if whole else x.contiguous()).view(torch.int32)


@triton.jit
def _low(word, HALVES: tl.constexpr):  # type: ignore[no-untyped-def]
    return ((word << 16) if HALVES else word).to(tl.float32, bitcast=True)


@triton.jit
def _high(word):  # type: ignore[no-untyped-def]
    return (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _word(low, high, HALVES: tl.constexpr):  # type: ignore[no-untyped-def]
    if HALVES:
        first = low.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return first | (high.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return low.to(tl.int32, bitcast=True)


@triton.jit
def _experts(  # type: ignore[no-untyped-def]
    sums, ids, shares, places, row, at, words, num_pairs, TOP_K: tl.constexpr, PARTS: tl.constexpr, HALVES: tl.constexpr
):
    """What this rank's experts gave, added up and rounded, in words."""
    if HALVES:
        both = 2 * at[:, None] + tl.arange(0, 2)[None, :]
        y = summed(sums, ids, shares, places, row, both, both < 2 * words, 2 * words, num_pairs, TOP_K, PARTS)
        low, high = tl.split(y)
        return _word(low, high, HALVES)
    y = summed(sums, ids, shares, places, row, at, at < words, words, num_pairs, TOP_K, PARTS)
    return _word(y, y, HALVES)


@triton.jit(do_not_specialize=["num_pairs"])
def _sum(  # type: ignore[no-untyped-def]
    part, x, weight, total, out, table, counts, stop, part_stride, x_stride, words, eps, sums, ids, shares, places, num_pairs,
    TOP_K: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, HALVES: tl.constexpr,
    ROWS: tl.constexpr, MOST: tl.constexpr, SIZE: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    real = at < words
    low_scale = tl.zeros((SIZE,), tl.float32)
    high_scale = low_scale
    if weight is not None:
        step: tl.constexpr = 2 if HALVES else 1
        low_scale = tl.load(weight + step * at, mask=real, other=0).to(tl.float32)
        if HALVES:
            high_scale = tl.load(weight + step * at + 1, mask=real, other=0).to(tl.float32)
    if CHAIN:
        gdc_launch_dependents()
        gdc_wait()
    count = tl.load(counts + row)
    slot = ((count & 1) * RANKS * ROWS + row) * MOST
    if sums is None:
        mine = tl.load(part + row * part_stride + at, mask=real, other=0)
    else:
        mine = _experts(sums, ids, shares, places, row, at, words, num_pairs, TOP_K, PARTS, HALVES)
    numbered = (count.to(tl.int64) << 32) | mine.to(tl.uint32, bitcast=True).to(tl.int64)
    for other in tl.static_range(RANKS):
        if other != RANK:
            there = tl.multiple_of(tl.load(table + other).to(tl.pointer_type(tl.int64)), 16)
            tl.store(there + slot + RANK * ROWS * MOST + at, numbered, mask=real)
    here = tl.multiple_of(tl.load(table + RANK).to(tl.pointer_type(tl.int64)), 16)
    low, high = tl.zeros((SIZE,), tl.float32), tl.zeros((SIZE,), tl.float32)
    for other in tl.static_range(RANKS):
        word = mine
        if other != RANK:
            place = here + slot + other * ROWS * MOST + at
            found = tl.load(place, mask=real, other=0, volatile=True)
            waits = tl.max((real & ((found >> 32).to(tl.int32) != count)).to(tl.int32), 0)
            while waits != 0:
                over = tl.load(stop, volatile=True)
                found = tl.load(place, mask=real, other=0, volatile=True)
                waits = tl.max((real & ((found >> 32).to(tl.int32) != count)).to(tl.int32), 0)
                waits = tl.where(over != 0, 0, waits)
            word = found.to(tl.int32)
        low += _low(word, HALVES)
        if HALVES:
            high += _high(word)
    tl.store(counts + row, tl.where(count == -1, 2, count + 1))  # never 0, which slots hold at first
    word = _word(low, high, HALVES)
    if x is not None:
        if x.dtype.element_ty == tl.float32:
            each: tl.constexpr = 2 if HALVES else 1
            low += tl.load(x + row * x_stride + each * at, mask=real, other=0)
            tl.store(total + row * words * each + each * at, low, mask=real)
            if HALVES:
                high += tl.load(x + row * x_stride + each * at + 1, mask=real, other=0)
                tl.store(total + row * words * each + each * at + 1, high, mask=real)
        else:
            before = tl.load(x + row * x_stride + at, mask=real, other=0)
            low, high = _low(before, HALVES) + _low(word, HALVES), _high(before) + _high(word)
            word = _word(low, high, HALVES)  # the norm is of the sum as it goes on to the next layer
            tl.store(total + row * words + at, word, mask=real)
            low, high = _low(word, HALVES), _high(word)
        squares = low * low + high * high if HALVES else low * low
        root = tl.sqrt_rn(tl.sum(squares) / (words * (2 if HALVES else 1)) + eps)
        word = _word(low / root * low_scale, high / root * high_scale, HALVES)
    tl.store(out + row * words + at, word, mask=real)
