"""The Triton kernels of a mixture of experts: the schedule, a tile of a product with one expert's weights, the last sum.

A tile is BLOCK_M pairs of a token and an expert that was picked for it, all with the same expert, by a few slabs of 16
rows of weights. The weights are the left side of the product: the tensor cores want many rows there, and few tokens would
not fill them. In a stack that is followed by the activation a slab is 8 rows of the gate and the same 8 of up, which the
tensor cores then leave with one thread.

How mxfp4 is laid out, per slab and block of 32 inputs: 64 words, of which thread 4 g + t of a warp is to hold two, for rows
g and g + 8. A word has 8 codes, in the order in which a tensor core's left side wants them: pair p, half e is input
8 p + 2 t + e. Their bits stand so that a rotation and a mask give bfloat16 pairs (`PLACES` in triton.py): sign, exponent
and mantissa at bits 15, 8 to 7 and 6 make the number times 2^-126; the scale, held times 2^126, makes it right, exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MUL = "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }"  # sm_80 has no mul


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def schedule(
    ids,
    experts,
    order,
    num_pairs,
    num_tiles,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SIZE: tl.constexpr,
    CHAIN: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """One program an expert. experts (tiles): the expert of each tile, -1 for those beyond the last; order (tiles,
    BLOCK_M): the pairs in each tile, in order, num_pairs where there is none."""
    if CHAIN:
        gdc_wait()
        gdc_launch_dependents()
    own = tl.program_id(0)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, num_pairs, SIZE):
        at = start + tl.arange(0, SIZE)
        counts += tl.histogram(tl.load(ids + at, mask=at < num_pairs, other=BINS - 1).to(tl.int32), BINS)
    bins = tl.arange(0, BINS)
    tiles = tl.cdiv(counts, BLOCK_M)
    first = tl.sum(tl.where(bins < own, tiles, 0))
    count = tl.sum(tl.where(bins == own, counts, 0))
    end = first + tl.cdiv(count, BLOCK_M)
    last = tl.where(own == tl.num_programs(0) - 1, num_tiles, end)
    for start in range(first, last, SIZE):
        at = start + tl.arange(0, SIZE)
        tl.store(experts + at, tl.where(at < end, own, -1), mask=at < last)
    to = first * BLOCK_M
    for start in range(0, num_pairs, SIZE):
        at = start + tl.arange(0, SIZE)
        mine = (tl.load(ids + at, mask=at < num_pairs, other=BINS - 1).to(tl.int32) == own).to(tl.int32)
        tl.store(order + to + tl.cumsum(mine, 0) - 1, at, mask=mine == 1)
        to += tl.sum(mine)
    rest = to + tl.arange(0, BLOCK_M)
    tl.store(order + rest, num_pairs + tl.zeros_like(rest), mask=rest < end * BLOCK_M)


@triton.jit
def _mxfp4(words, scales, SLABS: tl.constexpr, BLOCKS: tl.constexpr, COMPUTE: tl.constexpr, MIXED: tl.constexpr):  # type: ignore[no-untyped-def]
    """(SLABS, BLOCKS * 64) words and (SLABS, BLOCKS * 16) scale bytes -> (SLABS * 16, BLOCKS * 32) numbers."""
    words = words.to(tl.uint32, bitcast=True).reshape(SLABS, BLOCKS, 8, 4, 2)
    a = words & 0x81C081C0
    b = (words << 6) & 0x81C081C0
    c = ((words << 12) | (words >> 20)) & 0x81C081C0
    d = ((words << 2) & 0x80C080C0) | ((words >> 6) & 0x01000100)
    s = scales.to(tl.uint32).reshape(SLABS, BLOCKS, 8, 1, 2)
    if COMPUTE == tl.bfloat16:
        s = tl.broadcast_to(s * 0x00800080, (SLABS, BLOCKS, 8, 4, 2))
        a = tl.inline_asm_elementwise(MUL_ASM, "=r,r,r", [a, s], dtype=tl.uint32, is_pure=True, pack=1)
        b = tl.inline_asm_elementwise(MUL_ASM, "=r,r,r", [b, s], dtype=tl.uint32, is_pure=True, pack=1)
        c = tl.inline_asm_elementwise(MUL_ASM, "=r,r,r", [c, s], dtype=tl.uint32, is_pure=True, pack=1)
        d = tl.inline_asm_elementwise(MUL_ASM, "=r,r,r", [d, s], dtype=tl.uint32, is_pure=True, pack=1)
        pairs = tl.join(tl.join(a, c), tl.join(b, d))
        low = (pairs & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        high = (pairs >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        pairs = tl.join(tl.join(a, c), tl.join(b, d))
        s = (s << 23).to(tl.float32, bitcast=True)[:, :, :, :, :, None, None]
        low = (pairs << 16).to(tl.float32, bitcast=True) * s
        high = (pairs & 0xFFFF0000).to(tl.float32, bitcast=True) * s
    both = tl.join(low, high).reshape(SLABS, BLOCKS, 8, 4, 2, 4, 2)  # slab, block, g, t, half, pair, element
    if MIXED:
        both = both.permute(0, 4, 2, 1, 5, 3, 6)
    else:
        both = both.permute(0, 4, 2, 1, 3, 5, 6)
    return both.reshape(SLABS * 16, BLOCKS * 32)


MUL_ASM = tl.constexpr(MUL)


@triton.jit
def _load(pointers, rows, columns, SOME: tl.constexpr, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """With only the masks that are needed: each costs instructions in the loop."""
    if EVEN and not SOME:
        return tl.load(pointers)
    elif EVEN:
        return tl.load(pointers, mask=rows, other=0)
    elif SOME:
        return tl.load(pointers, mask=rows & columns[None, :], other=0)
    else:
        return tl.load(pointers, mask=columns[None, :], other=0)


@triton.jit(do_not_specialize=["num_pairs", "share", "steps", "limit"])
def tiles(  # type: ignore[no-untyped-def]
    x, data, scales, bias, experts, order, out, x_stride, num_slabs, num_blocks, num_pairs, share, steps, limit,
    KIND: tl.constexpr, LEFT: tl.constexpr, BLOCK_M: tl.constexpr, SLABS: tl.constexpr, BLOCKS: tl.constexpr,
    COMPUTE: tl.constexpr, MIXED: tl.constexpr, EVEN: tl.constexpr, CHAIN: tl.constexpr,
    PREFETCH: tl.constexpr,
):  # fmt: skip
    """The product of x[pair // share] and the weights of the pair's expert; with a KIND of activation, after it.

    Over `steps` steps of BLOCKS * 32 inputs: out (parts, pairs, rows), without bias if there are several parts. Without
    `order` a tile has one pair.
    """
    tile, part = tl.program_id(1), tl.program_id(2)
    if CHAIN and KIND is not None:  # the schedule stands when what follows the activation starts
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.load(experts + tile).to(tl.int64)
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
    data += expert * num_slabs * num_blocks * (512 if scales is None else 64)
    if scales is not None:
        scales += expert * num_slabs * num_blocks * 16
    if scales is None:
        row = (real[:, None] * 16 + tl.arange(0, 16)[None, :]).reshape(SLABS * 16)
    first = part * steps * BLOCKS
    HEIGHT: tl.constexpr = 16 if KIND is None else 8  # of what a slab leaves
    columns, width = tl.program_id(0) * SLABS * HEIGHT + tl.arange(0, SLABS * HEIGHT), num_slabs * HEIGHT
    if bias is not None:
        if KIND is None:
            first_bias = tl.load(bias + expert * width + columns, mask=(columns < width) & (part == 0), other=0)
        else:
            first_bias = tl.load(bias + expert * 2 * width + columns, mask=columns < width, other=0)
            second_bias = tl.load(bias + (expert * 2 + 1) * width + columns, mask=columns < width, other=0)
    if CHAIN and KIND is None:
        if PREFETCH > 0:  # weights on their way to the L2 before the input is there
            lines = first * 64 + tl.arange(0, PREFETCH) * 32
            ahead = data + (real * num_blocks * 64)[:, None] + lines[None, :]
            ahead = tl.where((lines < tl.minimum(first + steps * BLOCKS, num_blocks) * 64)[None, :], ahead, data)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ahead], dtype=tl.int32, is_pure=False, pack=1
            )
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros((SLABS * 16, BLOCK_M) if LEFT else (BLOCK_M, SLABS * 16), tl.float32)
    for block in range(first, tl.minimum(first + steps * BLOCKS, num_blocks), BLOCKS):
        at = block * 32 + tl.arange(0, BLOCKS * 32)
        part_x = _load(x + at[None, :], there, at < num_blocks * 32, True, EVEN)
        if scales is None:
            weight = _load(
                data + row[:, None] * num_blocks * 32 + at[None, :], there, at < num_blocks * 32, False, EVEN
            )
            weight = weight.to(COMPUTE)
        else:
            at = block * 64 + tl.arange(0, BLOCKS * 64)
            words = _load(
                data + (real * num_blocks * 64)[:, None] + at[None, :], there, at < num_blocks * 64, False, EVEN
            )
            at = block * 16 + tl.arange(0, BLOCKS * 16)
            bytes = _load(
                scales + (real * num_blocks * 16)[:, None] + at[None, :], there, at < num_blocks * 16, False, EVEN
            )
            weight = _mxfp4(words, bytes, SLABS, BLOCKS, COMPUTE, MIXED)
        if LEFT:
            total = tl.dot(weight, part_x.to(COMPUTE).T, total, input_precision="ieee")
        else:
            total = tl.dot(part_x.to(COMPUTE), weight.T, total, input_precision="ieee")
    if not LEFT:
        total = total.T
    if KIND is None:
        if bias is not None:
            total += first_bias.to(tl.float32)[:, None]
    else:
        gate, up = tl.split(total.reshape(SLABS, 2, 8, BLOCK_M).permute(0, 2, 3, 1))
        gate, up = gate.reshape(SLABS * 8, BLOCK_M), up.reshape(SLABS * 8, BLOCK_M)
        if bias is not None:
            gate += first_bias.to(tl.float32)[:, None]
            up += second_bias.to(tl.float32)[:, None]
        if KIND == "swiglu_clamped":
            gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
            up = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL) + 1
            total = gate * tl.sigmoid(1.702 * gate) * up
        else:
            total = gate * tl.sigmoid(gate) * up
    mask = (columns < width)[:, None] & (pairs < num_pairs)[None, :]
    if MIXED and KIND is not None:
        columns = (columns & ~31) | ((columns & 24) >> 2) | ((columns & 6) << 2) | (columns & 1)
    out += (part.to(tl.int64) * num_pairs + pairs.to(tl.int64))[None, :] * width
    tl.store(out + columns[:, None], total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_pairs", "parts"])
def add(sums, weights, out, width, num_pairs, parts, TOP_K: tl.constexpr, SIZE: tl.constexpr, CHAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """One token's experts together, each by its weight, in the order in which they were picked."""
    if CHAIN:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = at < width
    y = tl.zeros((SIZE,), tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        one = tl.zeros((SIZE,), tl.float32)
        for part in range(parts):
            one += tl.load(sums + (part * num_pairs + pair) * width + at, mask=inside, other=0).to(tl.float32)
        y += one * tl.load(weights + pair)
    tl.store(out + token * width + at, y.to(out.dtype.element_ty), mask=inside)
