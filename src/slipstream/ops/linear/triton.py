"""Multiply by packed weights on a GPU: mxfp4, int8, int4, and GGUF's Q4_0, Q4_1 and Q8_0, in kernels of our own.

Everything is seen as rows of blocks of 32 codes, 4 or 8 bits each, with a scale for each 1, 2 or 4 blocks or for the
row, and (Q4_1) an offset a block. mxfp4, int8 and int4 stay as they stand in the file; GGUF's blocks are cut into codes
in order, scales and offsets (float16), which takes the same bytes and changes no number.

One token or two are multiplied row by row in float32, with the exact weights. More are a matrix product of tiles that
are decoded on the way: for bfloat16 activations the weights are rounded to bfloat16 (mxfp4 and int8, whose scale is
applied at the end, lose nothing by that), for the other dtypes they are float32, as mxfp4's range does not fit float16.
Sums are float32 always.

Where a token's result must have the same bits in any batch, every number of tokens goes through tiles of one shape, and no
sum is cut into parts.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.ops.formats import Weight
from slipstream.ops.formats.blocks import BLOCKS, in_order

FEW = 2  # tokens up to which rows are multiplied one by one
# Loads one step ahead and no more: from 3 on, Triton 3.6 lets a step's product run on while the registers or the shared
# memory that it reads are filled for the next. Seen on an H100: 24 of 36 results of int4 were off by up to 5%.
STAGES = 2
INVARIANT = 32  # tokens for which the tiles are made where they must not depend on the number of tokens
ROWS = {"BLOCK_N": 8, "BLOCKS": 32, "STAGES": 4}  # the tile of that kernel


class Triton:
    """Activations are float32, bfloat16 or float16.

    Args:
        invariant: the result for a token has the same bits in any batch.
    """

    def __init__(self, invariant: bool = False) -> None:
        self.invariant = invariant

    def prepare(self, weight: Weight, dtype: torch.dtype) -> tuple[Tensor, ...]:
        if weight.scales is not None:
            return weight.data.contiguous(), weight.scales.contiguous()
        *outer, width = weight.shape
        blocks = weight.data.view(*outer, width // 32, -1)
        heads = 2 if weight.format == "Q4_1" else 1  # float16 numbers at the start of a block
        codes = blocks[..., 2 * heads :]
        if weight.format == "Q8_0":
            data = codes.contiguous().view(torch.int8).view(*outer, width)
        else:
            data = in_order(codes).view(*outer, width // 2)
        halves = blocks[..., : 2 * heads].contiguous().view(torch.float16)
        return data, *(halves[..., i].contiguous() for i in range(heads))

    def held_bytes(self, format: str, shape: tuple[int, ...], dtype: torch.dtype, packed: int) -> int | None:
        """GGUF's blocks are cut, so a weight that is shared with the embedding is there twice."""
        return packed if format in BLOCKS else None

    def wide(
        self, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        if out is None:
            out = torch.empty(len(x), len(packed[0]), dtype=torch.float32, device=x.device)
        return self(x, packed, bias, out)

    def __call__(self, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        data, scales, *rest = packed
        offsets = rest[0] if rest else None
        (tokens, width), rows = x.shape, data.shape[0]
        if out is None:
            out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
        if not tokens:
            return out
        x = x if x.stride(1) == 1 else x.contiguous()
        bits = 8 if data.dtype == torch.int8 else 4
        whole_row = bits == 8 and scales.shape[1] == 1
        layout = {
            "FP4": scales.dtype == torch.uint8,
            "BITS": bits,
            "SHARE": 0 if whole_row else width // 32 // scales.shape[1],
        }
        weight = data, scales, offsets
        with torch.cuda.device_of(x):  # Triton launches on the current device
            if tokens <= FEW and not self.invariant:
                grid = (triton.cdiv(rows, ROWS["BLOCK_N"]), tokens)  # CUDA takes 65,535 of the second at most
                _vector[grid](x, *weight, bias, out, x.stride(0), rows, width // 32, **layout, **ROWS)
            else:
                self._product(x, weight, bias, out, layout)
        return out

    def _product(self, x: Tensor, weight: Any, bias: Tensor | None, out: Tensor, layout: dict[str, Any]) -> None:
        (tokens, width), rows = x.shape, out.shape[1]
        block_m, block_n, blocks, warps = tiles(INVARIANT if self.invariant else tokens, x.dtype)
        grid = triton.cdiv(tokens, block_m), triton.cdiv(rows, block_n)
        steps = triton.cdiv(width // 32, blocks)
        # Where tiles alone leave the device idle, several programs share a tile, each with a part of the sum.
        parts = 1 if self.invariant else max(1, min(_programs(x.device) // (grid[0] * grid[1]), steps // 2))
        steps = triton.cdiv(steps, parts)
        sums = out if parts == 1 else torch.empty(parts, tokens, rows, dtype=torch.float32, device=x.device)
        _tiles[(*grid, parts)](
            x, *weight, bias if parts == 1 else None, sums, x.stride(0), tokens, rows, width // 32, steps, **layout,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCKS=blocks,
            COMPUTE=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float32, num_warps=warps, num_stages=STAGES,
        )  # fmt: skip
        if parts > 1:
            _add[(triton.cdiv(out.numel(), 1024),)](sums, bias, out, out.numel(), rows, parts, SIZE=1024)


def tiles(tokens: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Tokens, rows and blocks of 32 inputs in a tile, and the warps that work on it."""
    if dtype != torch.bfloat16:
        return (16, 64, 1, 4) if tokens <= 32 else (64, 64, 1, 4)
    if tokens <= 64:
        return max(16, triton.next_power_of_2(tokens)), 64, 4, 4
    return 128, 128, 2, 8


@cache
def _programs(device: torch.device) -> int:
    """How many programs keep a device busy."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@triton.jit
def _codes(  # type: ignore[no-untyped-def]
    data, rows, blocks, inside, num_blocks, FP4: tl.constexpr, BITS: tl.constexpr, OFFSETS: tl.constexpr
):
    """(rows, blocks, 32) float32: the numbers that codes stand for before scales and offsets; exact."""
    SIZE: tl.constexpr = 4 * BITS
    ZERO: tl.constexpr = 128 if BITS == 8 else 0 if OFFSETS else 8  # what was added to codes to make them bytes
    at = rows[:, None].to(tl.int64) * num_blocks + blocks[None, :]
    packed = tl.load(data + at[:, :, None] * SIZE + tl.arange(0, SIZE)[None, None, :], inside[None, :, None], other=0)
    packed = packed.to(tl.uint8, bitcast=True)
    if BITS == 4:
        packed = tl.join(packed & 15, packed >> 4).reshape(rows.shape[0], blocks.shape[0], 32)
    else:
        packed = packed ^ 128  # code + 128, as a byte
    bits = packed.to(tl.uint32)
    if FP4:
        # Sign, exponent and mantissa where float32 has them, then the difference of the two biases: 127 - 1.
        bits = ((bits & 8) << 28) | ((bits & 7) << 22)
        return bits.to(tl.float32, bitcast=True) * 85070591730234615865843651857942052864.0
    # 2^23 + code, written as bits: cheaper than a conversion.
    return (bits | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + ZERO)


@triton.jit
def _factors(  # type: ignore[no-untyped-def]
    values, rows, blocks, inside, num_blocks, FP4: tl.constexpr, SHARE: tl.constexpr
):
    """(rows, blocks) float32: scales, or offsets."""
    at = rows[:, None].to(tl.int64) * (num_blocks // SHARE) + (blocks // SHARE)[None, :]
    found = tl.load(values + at, mask=inside[None, :], other=0)
    if FP4:  # E8M0: byte 0 is 2^-127, which float32 has as a subnormal, and 255 is NaN
        bits = found.to(tl.uint32)
        bits = tl.where(bits == 0, 0x00400000, tl.where(bits == 255, 0x7FC00000, bits << 23))
        return bits.to(tl.float32, bitcast=True)
    return found.to(tl.float32)


@triton.jit
def _vector(  # type: ignore[no-untyped-def]
    x, data, scales, offsets, bias, out, x_stride, num_rows, num_blocks,
    FP4: tl.constexpr, BITS: tl.constexpr, SHARE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One token by BLOCK_N rows. A thread takes whole blocks, so a block is summed before it is scaled."""
    token = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = tl.minimum(rows, num_rows - 1)  # the rows beyond the last repeat it, and are not stored
    total = tl.zeros((BLOCK_N, BLOCKS), tl.float32)
    for start in tl.range(0, num_blocks, BLOCKS, num_stages=STAGES):
        blocks = start + tl.arange(0, BLOCKS)
        inside = blocks < num_blocks
        at = blocks[:, None] * 32 + tl.arange(0, 32)[None, :]
        part = tl.load(x + token * x_stride + at, mask=inside[:, None], other=0).to(tl.float32)
        if SHARE > 0:
            scale = _factors(scales, real, blocks, inside, num_blocks, FP4, SHARE)
        codes = _codes(data, real, blocks, inside, num_blocks, FP4, BITS, offsets is not None)
        sums = tl.sum(codes * part[None, :, :], 2)
        if SHARE > 0:
            sums *= scale
        if offsets is not None:
            sums += _factors(offsets, real, blocks, inside, num_blocks, FP4, SHARE) * tl.sum(part, 1)[None, :]
        total += sums
    y = tl.sum(total, 1)
    if SHARE == 0:
        y *= tl.load(scales + real).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + real).to(tl.float32)
    tl.store(out + token * num_rows + rows, y.to(out.dtype.element_ty), mask=rows < num_rows)


@triton.jit(do_not_specialize=["tokens", "steps"])
def _tiles(  # type: ignore[no-untyped-def]
    x, data, scales, offsets, bias, out, x_stride, tokens, num_rows, num_blocks, steps,
    FP4: tl.constexpr, BITS: tl.constexpr, SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """BLOCK_M tokens by BLOCK_N rows, over `steps` steps of the input. The weights are the left side of the product:
    the tensor cores want 64 rows there, and a few tokens would not fill them."""
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = tl.minimum(rows, num_rows - 1)
    x += tl.minimum(token, tokens - 1).to(tl.int64)[None, :] * x_stride
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = tl.program_id(2) * steps * BLOCKS
    for start in range(first, tl.minimum(first + steps * BLOCKS, num_blocks), BLOCKS):
        blocks = start + tl.arange(0, BLOCKS)
        inside = blocks < num_blocks
        at = start * 32 + tl.arange(0, BLOCKS * 32)
        part = tl.load(x + at[:, None], mask=(at < num_blocks * 32)[:, None], other=0)
        if SHARE > 0:
            scale = _factors(scales, real, blocks, inside, num_blocks, FP4, SHARE)
        weight = _codes(data, real, blocks, inside, num_blocks, FP4, BITS, offsets is not None)
        if SHARE > 0:
            weight *= scale[:, :, None]
        if offsets is not None:
            weight += _factors(offsets, real, blocks, inside, num_blocks, FP4, SHARE)[:, :, None]
        weight = weight.reshape(BLOCK_N, BLOCKS * 32).to(COMPUTE)
        total = tl.dot(weight, part.to(COMPUTE), total, input_precision="ieee")
    if SHARE == 0:
        total *= tl.load(scales + real).to(tl.float32)[:, None]
    if bias is not None:
        total += tl.load(bias + real).to(tl.float32)[:, None]
    out += (tl.program_id(2).to(tl.int64) * tokens + token.to(tl.int64))[None, :] * num_rows
    mask = (rows < num_rows)[:, None] & (token < tokens)[None, :]
    tl.store(out + rows[:, None], total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["size", "parts"])
def _add(sums, bias, out, size, num_rows, parts, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The parts of the sums together, always in the same order, and the bias."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < size
    y = tl.zeros((SIZE,), tl.float32)
    for _ in range(parts):
        y += tl.load(sums + at, mask=inside, other=0)
        sums += size
    if bias is not None:
        y += tl.load(bias + at % num_rows, mask=inside, other=0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)
