"""The Triton kernels of a mixture of experts: the schedule, a tile of a product with one expert's weights, the last sum.

A tile is BLOCK_M pairs of a token and an expert that was picked for it, all with the same expert, by a few slabs of 16
rows of weights. The weights are the left side of the product: the tensor cores want many rows there, and few tokens would
not fill them; a pair by itself has a kernel of its own (`alone`). In a stack that is followed by the activation a slab is 8 rows
of the gate and the same 8 of up, which the tensor cores then leave with one thread.

How mxfp4 is laid out, per slab and two blocks of 32 inputs: 128 words, of which thread 4 g + t of a warp is to hold four:
(block, half) of rows g and g + 8. A word's pair 2 i + j, element e is input 16 i + 4 t + 2 j + e of its block, as mma.sync
takes it after Triton's pass over K. Codes' bits stand so that a rotation and a mask give bfloat16 pairs (`PLACES` in
layout.py): sign, exponent and mantissa at bits 15, 8 to 7 and 6 are the number times 2^-126, and the scale is held times
2^126, which makes it right, exactly. The eight rows' scales follow in the same order, four in a word.

A warpgroup's product (wgmma) takes element e of pair 2 i + j at place 16 i + 8 j + 2 t + e, so its other side must be MIXED:
input 16 i + 4 t + 2 j + e stands there. Weights then go from a load straight into a product, in the thread that loaded them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.ops.chain import prefetch
from slipstream.ops.router.choice import picked

# Triton 3.6 lets a product run on while the registers that it reads are filled for the next step. PTX forbids that.
WAIT = tl.constexpr("wgmma.wait_group.sync.aligned 0; mov.b32 $0, $1;")


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def schedule(  # type: ignore[no-untyped-def]
    ids, experts, order, num_pairs, num_tiles,
    BINS: tl.constexpr, BLOCK_M: tl.constexpr, SORT: tl.constexpr, SIZE: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """One program an expert. experts (tiles): the expert of each tile, -1 for those beyond the last, then the number of
    tiles; order (tiles, BLOCK_M): the pairs in each tile, in order, num_pairs where there is none. With SORT, order (pairs):
    where each pair would stand there, -1 for those of ids below zero, which are in no tile."""
    if CHAIN:
        gdc_wait()
        gdc_launch_dependents()
    own = tl.program_id(0)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, num_pairs, SIZE):
        at = start + tl.arange(0, SIZE)
        found = tl.load(ids + at, mask=at < num_pairs, other=BINS - 1).to(tl.int32)
        counts += tl.histogram(tl.where(found < 0, BINS - 1, found), BINS)
    bins = tl.arange(0, BINS)
    tiles = tl.cdiv(counts, BLOCK_M)
    first = tl.sum(tl.where(bins < own, tiles, 0))
    count = tl.sum(tl.where(bins == own, counts, 0))
    end = first + tl.cdiv(count, BLOCK_M)
    last = tl.where(own == tl.num_programs(0) - 1, num_tiles, end)
    for start in range(first, last, SIZE):
        at = start + tl.arange(0, SIZE)
        tl.store(experts + at, tl.where(at < end, own, -1), mask=at < last)
    if own == tl.num_programs(0) - 1:
        tl.store(experts + num_tiles, end)
    to = first * BLOCK_M
    for start in range(0, num_pairs, SIZE):
        at = start + tl.arange(0, SIZE)
        found = tl.load(ids + at, mask=at < num_pairs, other=BINS - 1).to(tl.int32)
        mine = (found == own).to(tl.int32)
        place = to + tl.cumsum(mine, 0) - 1
        if SORT:
            nowhere = (found < 0) & (own == tl.num_programs(0) - 1)
            tl.store(order + at, tl.where(nowhere, -1, place), mask=(mine == 1) | nowhere)
        else:
            tl.store(order + place, at, mask=mine == 1)
        to += tl.sum(mine)
    if not SORT:
        rest = to + tl.arange(0, BLOCK_M)
        tl.store(order + rest, num_pairs + tl.zeros_like(rest), mask=rest < end * BLOCK_M)


@triton.jit
def gather(  # type: ignore[no-untyped-def]
    x, places, out, x_stride, width, TOP_K: tl.constexpr, SIZE: tl.constexpr, CHAIN: tl.constexpr
):
    """Each token's inputs to the places of its pairs, MIXED. x and out are pairs of bfloat16 in words."""
    if CHAIN:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    words = tl.load(x + token * x_stride + ((at & ~7) | ((at & 3) << 1) | ((at & 4) >> 2)), mask=at < width)
    for slot in tl.static_range(TOP_K):
        place = tl.load(places + token * TOP_K + slot).to(tl.int64)
        tl.store(out + place * width + at, words, mask=(at < width) & (place >= 0))


@triton.jit
def _times(a, b):  # type: ignore[no-untyped-def]
    """Pairs of bfloat16 in words. sm_80 has no mul."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }", "=r,r,r", [a, b], dtype=tl.uint32,
        is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _mxfp4(  # type: ignore[no-untyped-def]
    words, scales, SLABS: tl.constexpr, TWOS: tl.constexpr, COMPUTE: tl.constexpr, MIXED: tl.constexpr,
    EACH: tl.constexpr = 1,
):  # fmt: skip
    """(SLABS, TWOS * 128) words and (SLABS, TWOS * 8) words of four scales -> (SLABS * 16, TWOS * 64) numbers.

    EACH: 4 where every thread of a row has its scales: (SLABS, TWOS * 32).
    """
    words = words.to(tl.uint32, bitcast=True).reshape(SLABS, TWOS, 8, 4, 2, 2)  # slab, two blocks, g, t, block, half
    scales = scales.to(tl.uint32, bitcast=True)
    s = tl.join(tl.join(scales & 255, (scales >> 16) & 255), tl.join((scales >> 8) & 255, scales >> 24))
    s = s.reshape(SLABS, TWOS, 8, EACH, 2, 2)
    a = words & 0x81C081C0
    b = (words << 6) & 0x81C081C0
    c = ((words << 12) | (words >> 20)) & 0x81C081C0
    d = ((words << 2) & 0x80C080C0) | ((words >> 6) & 0x01000100)
    if COMPUTE == tl.bfloat16:  # noqa: SIM300
        s = tl.broadcast_to(s * 0x00800080, (SLABS, TWOS, 8, 4, 2, 2))
        pairs = tl.join(tl.join(_times(a, s), _times(c, s)), tl.join(_times(b, s), _times(d, s)))
        low = (pairs & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        high = (pairs >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        pairs = tl.join(tl.join(a, c), tl.join(b, d))
        s = (s << 23).to(tl.float32, bitcast=True)[:, :, :, :, :, :, None, None]
        low = (pairs << 16).to(tl.float32, bitcast=True) * s
        high = (pairs & 0xFFFF0000).to(tl.float32, bitcast=True) * s
    both = tl.join(low, high)  # slab, two blocks, g, t, block, half, i, j, e
    if MIXED:
        both = both.permute(0, 5, 2, 1, 4, 6, 7, 3, 8)
    else:
        both = both.permute(0, 5, 2, 1, 4, 6, 3, 7, 8)
    return both.reshape(SLABS * 16, TWOS * 64)


@triton.jit
def _expert(  # type: ignore[no-untyped-def]
    experts, logits, shares, num_experts, KIND: tl.constexpr, ROUND: tl.constexpr, SOFTMAX_FIRST: tl.constexpr,
    RENORMALIZE: tl.constexpr, EXPERTS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Of this program's tile: as it was scheduled or, of one token, chosen here."""
    LAST: tl.constexpr = KIND is None
    if logits is None:
        expert = tl.load(experts + tl.program_id(1))
    else:
        expert = picked(logits, experts, shares, num_experts, LAST, ROUND, SOFTMAX_FIRST, RENORMALIZE, EXPERTS, WARPS)
    return expert.to(tl.int64)


@triton.jit
def _load(pointers, inside, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """A mask costs instructions in the loop."""
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=inside[None, :], other=0)


@triton.jit
def _biases(bias, expert, rows, width, part, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """An expert's, for rows of what a product or, with a KIND, its activation leaves: then of gate and of up."""
    if KIND is None:
        found = (tl.load(bias + expert * width + rows, mask=(rows < width) & (part == 0), other=0),)
    else:
        gate = tl.load(bias + expert * 2 * width + rows, mask=rows < width, other=0)
        found = gate, tl.load(bias + (expert * 2 + 1) * width + rows, mask=rows < width, other=0)  # type: ignore[assignment]
    return found


@triton.jit
def _ended(total, biases, SLABS: tl.constexpr, KIND: tl.constexpr, limit):  # type: ignore[no-untyped-def]
    """The product of SLABS slabs with some columns, and its biases; with a KIND, after the activation."""
    COLUMNS: tl.constexpr = total.shape[1]
    if KIND is None:
        if biases is not None:
            total += biases[0].to(tl.float32)[:, None]
    else:
        gate, up = tl.split(total.reshape(SLABS, 2, 8, COLUMNS).permute(0, 2, 3, 1))
        gate, up = gate.reshape(SLABS * 8, COLUMNS), up.reshape(SLABS * 8, COLUMNS)
        if biases is not None:
            gate += biases[0].to(tl.float32)[:, None]
            up += biases[1].to(tl.float32)[:, None]
        if KIND == "swiglu_clamped":
            gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
            up = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL) + 1
            total = gate * tl.sigmoid(1.702 * gate) * up
        else:
            total = gate * tl.sigmoid(gate) * up
    return total


@triton.jit(do_not_specialize=["num_pairs", "share", "steps", "limit", "logits", "num_experts"])
def tiles(  # type: ignore[no-untyped-def]
    x, data, scales, bias, experts, order, out, x_stride, num_slabs, num_blocks, num_inputs, num_pairs, share, steps, limit,
    KIND: tl.constexpr, LEFT: tl.constexpr, BLOCK_M: tl.constexpr, SLABS: tl.constexpr, BLOCKS: tl.constexpr,
    COMPUTE: tl.constexpr, MIXED: tl.constexpr, EVEN: tl.constexpr, CHAIN: tl.constexpr, PREFETCH: tl.constexpr,
    WARPS: tl.constexpr, logits=None, shares=None, num_experts=0, SOFTMAX_FIRST: tl.constexpr = False,
    RENORMALIZE: tl.constexpr = False, EXPERTS: tl.constexpr = 0,
):  # fmt: skip
    """The product of x[pair // share] and the weights of the pair's expert; with a KIND of activation, after it.

    Over `steps` steps of BLOCKS * 32 inputs: out (parts, pairs, rows); the bias is in the first part. Without `order`, tile
    i is pair i alone. With `logits` (num_experts), of one token, `experts` and `shares` (top_k) are not there yet: each program
    chooses for itself, as that is faster than to wait for another. CHAIN: the kernels of a layer start before the one before has
    ended (Hopper).
    """
    tile, part = tl.program_id(1), tl.program_id(2)
    if CHAIN and KIND is not None:  # what comes after the activation finds the schedule done
        gdc_wait()
        gdc_launch_dependents()
    ROUND: tl.constexpr = x.dtype.element_ty
    expert = _expert(experts, logits, shares, num_experts, KIND, ROUND, SOFTMAX_FIRST, RENORMALIZE, EXPERTS, WARPS)
    if expert < 0:
        return
    inside = tl.arange(0, BLOCK_M)
    if order is None:
        pairs = tl.where(inside == 0, tile, num_pairs)
    else:
        pairs = tl.load(order + tile * BLOCK_M + inside)
    there = (pairs < num_pairs)[:, None]
    slab = tl.program_id(0) * SLABS + tl.arange(0, SLABS)
    real = tl.minimum(slab, num_slabs - 1)  # what is beyond the last repeats it, and is not stored
    x += (tl.minimum(pairs, num_pairs - 1) // share).to(tl.int64)[:, None] * x_stride
    if scales is None:
        row = (real[:, None] * 16 + tl.arange(0, 16)[None, :]).reshape(SLABS * 16)
        data += expert * num_slabs * num_inputs * 16
    else:
        data += expert * num_slabs * num_blocks * 64
        scales += expert * num_slabs * num_blocks * 4
    first = part * steps * BLOCKS
    HEIGHT: tl.constexpr = 16 if KIND is None else 8  # of what a slab leaves
    columns, width = tl.program_id(0) * SLABS * HEIGHT + tl.arange(0, SLABS * HEIGHT), num_slabs * HEIGHT
    biases = None if bias is None else _biases(bias, expert, columns, width, part, KIND)
    if CHAIN and KIND is None:
        if PREFETCH > 0:  # weights on their way to the L2 before the input is there
            lines = first * 64 + tl.arange(0, PREFETCH) * 32
            ahead = data + (real * num_blocks * 64)[:, None] + lines[None, :]
            ahead = tl.where((lines < tl.minimum(first + steps * BLOCKS, num_blocks) * 64)[None, :], ahead, data)
            prefetch(ahead)
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros((SLABS * 16, BLOCK_M) if LEFT else (BLOCK_M, SLABS * 16), tl.float32)
    for block in range(first, tl.minimum(first + steps * BLOCKS, num_blocks), BLOCKS):
        at = block * 32 + tl.arange(0, BLOCKS * 32)
        mask = there if EVEN else there & (at < num_inputs)[None, :]
        part_x = tl.load(x + at[None, :], mask=mask, other=0)  # what is not there is not read
        if scales is None:
            weight = _load(data + row[:, None] * num_inputs + at[None, :], at < num_inputs, EVEN)
            weight = weight.to(COMPUTE)
        else:
            at = block * 64 + tl.arange(0, BLOCKS * 64)
            words = _load(data + (real * num_blocks * 64)[:, None] + at[None, :], at < num_blocks * 64, EVEN)
            at = block * 4 + tl.arange(0, BLOCKS * 4)
            fours = _load(scales + (real * num_blocks * 4)[:, None] + at[None, :], at < num_blocks * 4, EVEN)
            weight = _mxfp4(words, fours, SLABS, BLOCKS // 2, COMPUTE, MIXED)
        if LEFT:
            total = tl.dot(weight, part_x.to(COMPUTE).T, total, input_precision="ieee")
            if MIXED and CHAIN:
                tl.inline_asm_elementwise(WAIT, "=r,r", [block], dtype=tl.int32, is_pure=False, pack=1)
        else:
            total = tl.dot(part_x.to(COMPUTE), weight.T, total, input_precision="ieee")
    if not LEFT:
        total = total.T
    total = _ended(total, biases, SLABS, KIND, limit)
    mask = (columns < width)[:, None] & (pairs < num_pairs)[None, :]
    if MIXED and KIND is not None:
        columns = (columns & ~14) | ((columns & 12) >> 1) | ((columns & 2) << 2)
    out += (part.to(tl.int64) * num_pairs + pairs.to(tl.int64))[None, :] * width
    tl.store(out + columns[:, None], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _held(data, scales, row, first, num_twos, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The words and scales of SIZE times two blocks from `first` on, each where a tensor core takes it from."""
    two = first + tl.arange(0, SIZE)[None, :]
    there = (two < num_twos)[:, :, None]
    two = (row + two)[:, :, None]
    words = tl.load(data + two * 128 + tl.arange(0, 128)[None, None, :], mask=there, other=0)
    fours = tl.load(scales + two * 8 + (tl.arange(0, 32) // 4)[None, None, :], mask=there, other=0)
    return words, fours


@triton.jit
def _times_parts(  # type: ignore[no-untyped-def]
    weights, x, begin, num_inputs, total, SPLIT: tl.constexpr, SIZE: tl.constexpr, EACH: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """And the products of each warp's words and scales with the inputs of each part, in a column each."""
    WARPS: tl.constexpr = weights[0].shape[0]
    at = begin + tl.arange(0, SIZE * 64)[None, :]
    inside = (tl.arange(0, 8) < SPLIT)[:, None] & (at < num_inputs)
    some = tl.load(x + at, mask=inside, other=0).to(COMPUTE)
    words, fours = weights[0].reshape(WARPS, SIZE * 128), weights[1].reshape(WARPS, SIZE * 8 * EACH)
    weight = _mxfp4(words, fours, WARPS, SIZE, COMPUTE, False, EACH)
    return tl.dot(weight, some.T, total, input_precision="ieee")


@triton.jit(do_not_specialize=["num_pairs", "share", "steps", "limit", "logits", "num_experts"])
def alone(  # type: ignore[no-untyped-def]
    x, data, scales, bias, experts, out, x_stride, num_slabs, num_twos, num_inputs, num_pairs, share, steps, limit,
    KIND: tl.constexpr, SPLIT: tl.constexpr, SLABS: tl.constexpr, MOST: tl.constexpr, MORE: tl.constexpr,
    HELD: tl.constexpr, COMPUTE: tl.constexpr, CHAIN: tl.constexpr, PREFETCH: tl.constexpr,
    logits=None, shares=None, num_experts=0, SOFTMAX_FIRST: tl.constexpr = False,
    RENORMALIZE: tl.constexpr = False, EXPERTS: tl.constexpr = 0,
):  # fmt: skip
    """What `tiles` does, of mxfp4, where each tile is one pair: a warp has a slab and one of SPLIT parts of its inputs.

    A tensor core multiplies by 8 columns. One pair would leave 7 of them empty, so each has another part of the inputs, and a
    warp's answer stands in the column of its own part.

    Args:
        MOST, MORE: how many times 64 inputs of a part go into one product, and into a second one.
        HELD: there is but one step, and its weights are in registers before the input is there.
    """
    WARPS: tl.constexpr = SPLIT * SLABS
    TWOS: tl.constexpr = MOST + MORE
    pair, part = tl.program_id(1), tl.program_id(2)
    if CHAIN and KIND is not None:  # what comes after the activation finds the schedule done
        gdc_wait()
        gdc_launch_dependents()
    ROUND: tl.constexpr = x.dtype.element_ty
    expert = _expert(experts, logits, shares, num_experts, KIND, ROUND, SOFTMAX_FIRST, RENORMALIZE, EXPERTS, WARPS)
    if expert < 0:
        return
    warp, column = tl.arange(0, WARPS), tl.arange(0, 8)
    slab = tl.minimum(tl.program_id(0) * SLABS + warp % SLABS, num_slabs - 1)  # what is beyond the last is not stored
    row = ((expert * num_slabs + slab) * num_twos)[:, None]
    x += (pair // share).to(tl.int64) * x_stride
    HEIGHT: tl.constexpr = 16 if KIND is None else 8  # of what a slab leaves
    rows, width = tl.program_id(0) * SLABS * HEIGHT + tl.arange(0, SLABS * HEIGHT), num_slabs * HEIGHT
    first = (part * SPLIT + warp // SLABS)[:, None] * steps * TWOS
    begin = (part * SPLIT + column)[:, None] * steps * TWOS * 64
    if HELD:
        held = _held(data, scales, row, first, num_twos, MOST)
        more = None if MORE == 0 else _held(data, scales, row, first + MOST, num_twos, MORE)
    biases = None if bias is None else _biases(bias, expert, rows, width, part, KIND)
    if CHAIN and KIND is None:
        if PREFETCH > 0:  # weights on their way to the L2 before the input is there
            lines = tl.arange(0, PREFETCH)[None, :]
            lines = tl.where((lines < steps * TWOS * 4) & (first * 4 + lines < num_twos * 4), lines, 0)
            ahead = data + (row + tl.minimum(first, num_twos - 1)) * 128 + lines * 32
            prefetch(ahead)
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros((WARPS * 16, 8), tl.float32)
    if HELD:
        total = _times_parts(held, x, begin, num_inputs, total, SPLIT, MOST, 4, COMPUTE)
        if MORE > 0:
            total = _times_parts(more, x, begin + MOST * 64, num_inputs, total, SPLIT, MORE, 4, COMPUTE)
    else:
        for step in range(0, steps):
            two = first + step * MOST
            at = tl.arange(0, MOST * 128)[None, :]
            words = tl.load(data + (row + two) * 128 + at, mask=two * 128 + at < num_twos * 128, other=0)
            at = tl.arange(0, MOST * 8)[None, :]
            fours = tl.load(scales + (row + two) * 8 + at, mask=two * 8 + at < num_twos * 8, other=0)
            total = _times_parts(
                (words, fours), x, begin + step * MOST * 64, num_inputs, total, SPLIT, MOST, 1, COMPUTE
            )
    own = (tl.arange(0, SPLIT)[:, None, None] == column[None, None, :]).broadcast_to(SPLIT, SLABS * 16, 8)
    total = tl.where(own, total.reshape(SPLIT, SLABS * 16, 8), 0)
    total = _ended(tl.sum(tl.sum(total, 2), 0)[:, None], biases, SLABS, KIND, limit)
    out += (part.to(tl.int64) * num_pairs + pair) * width
    tl.store(out + rows[:, None], total.to(out.dtype.element_ty), mask=(rows < width)[:, None])


@triton.jit
def summed(  # type: ignore[no-untyped-def]
    sums, ids, weights, places, token, at, inside, width, num_pairs, TOP_K: tl.constexpr, PARTS: tl.constexpr
):
    """One token's experts together, each by its weight, in the order in which they were picked; not those of ids below zero."""
    y = tl.zeros(at.shape, tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        here = tl.load(ids + pair) >= 0
        place = pair if places is None else tl.maximum(tl.load(places + pair), 0).to(tl.int64)
        one = tl.zeros(at.shape, tl.float32)
        for part in tl.static_range(PARTS):
            one += tl.load(sums + (part * num_pairs + place) * width + at, mask=inside, other=0).to(tl.float32)
        y += tl.where(here, one, 0) * tl.load(weights + pair)
    return y


@triton.jit(do_not_specialize=["num_pairs"])
def add(  # type: ignore[no-untyped-def]
    sums, ids, weights, places, out, width, num_pairs,
    TOP_K: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """One token's experts together, where the norm that comes next does not make the sum."""
    if CHAIN:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = at < width
    y = summed(sums, ids, weights, places, token, at, inside, width, num_pairs, TOP_K, PARTS)
    tl.store(out + token * width + at, y.to(out.dtype.element_ty), mask=inside)
