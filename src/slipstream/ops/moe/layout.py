"""Experts' weights as the kernels of a mixture want them: slabs of 16 rows, and mxfp4's bits where two instructions find them.

kernels.py says what the layout is and why. A card lays out what has landed on it in one pass; elsewhere torch does the same.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from slipstream.errors import KernelError
from slipstream.ops.formats import Weight

# Where a word of 8 codes has each one's sign and its exponent and mantissa: kernels.py rotates them to bits 15 and 8 to 6.
PLACES = ((15, (8, 7, 6)), (9, (2, 1, 0)), (3, (28, 27, 26)), (13, (14, 5, 4)))
TOGETHER = 512 << 20  # bytes of experts that are laid out at a time: so many lie on the card twice


def _moves() -> tuple[tuple[int, int], ...]:
    """How to bring the bits of codes that follow each other to their PLACES: by so much to the left, round, and a mask."""
    found: dict[int, int] = {}
    for i in range(8):  # the second of a pair is a half-word on
        sign, rest = PLACES[i // 2]
        for bit, to in zip((3, 2, 1, 0), (sign, *rest), strict=True):
            place = (to + i % 2 * 16) % 32
            distance = (place - 4 * i - bit) % 32
            found[distance] = found.get(distance, 0) | 1 << place
    return tuple(sorted(found.items()))


MOVES = _moves()


def prepare(weight: Weight, dtype: torch.dtype, *, gated: bool = False) -> tuple[Tensor, ...]:
    """A stack (experts, out, in) as `experts` wants it, in the same bytes: contiguous mxfp4 is overwritten in place.

    Args:
        gated: the stack is gate rows, then up rows.

    Raises:
        KernelError: the sizes do not fit, or an mxfp4 scale is above 2, which bfloat16 has no room for here.
    """
    number, rows, width = weight.shape
    if weight.format not in ("dense", "mxfp4") or rows % 16 or width % 32:
        raise KernelError(
            f"slabs hold floats and mxfp4 of 16 n rows by 32 n inputs, not {weight.format} {rows} x {width}; choose another "
            "implementation of moe"
        )
    if weight.scales is None:
        data = weight.data.to(dtype).contiguous()
        if gated:
            for one in data:
                one.copy_(_slabs(one, gated).reshape(rows, width).clone())
        return (data,)
    if ((weight.scales > 128) & (weight.scales != 255)).any():
        raise KernelError(
            "an mxfp4 scale is above 2, for which the layout of slabs has no room; choose other implementations than "
            "moe[triton] and linear[triton_slabs]: moe_implementation='loop', linear_implementation='triton'"
        )
    blocks = width // 32
    data, scales = weight.data.view(number, rows, blocks, 16), weight.scales.view(number, rows, blocks)
    if blocks % 2:  # in twos
        data, scales = F.pad(data, (0, 0, 0, 1)), F.pad(scales, (0, 1))
    data, scales = data.contiguous(), scales.contiguous()
    some = max(1, TOGETHER // data[0].nbytes)
    for codes, factors in zip(data.split(some), scales.split(some), strict=True):  # there is never a second stack
        made = laid_out_on_card(codes, factors, gated) if data.is_cuda else laid_out(codes, factors, gated)
        codes.view(-1).view(torch.int32).copy_(made[0])
        factors.view(-1).copy_(made[1])
    shape = number, rows // 16, -1
    return data.view(-1).view(torch.int32).view(*shape, 128), scales.view(-1).view(torch.int32).view(*shape, 8)


def held_bytes(format: str, shape: tuple[int, ...], dtype: torch.dtype) -> int | None:
    """What `prepare` makes of a stack (experts, out, in) of that format: blocks in twos."""
    number, rows, width = shape
    return number * rows * (width // 32 + width // 32 % 2) * 17 if format == "mxfp4" else None


def laid_out(codes: Tensor, scales: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    """Packed codes (experts, rows, blocks, 16) and scales (experts, rows, blocks), uint8 -> the words and scales, flat."""
    words, factors = [], []
    for c, s in zip(codes, scales, strict=True):
        broken = s == 255
        plain = c.view(torch.int16).unflatten(-1, (2, 4)).transpose(-1, -2).contiguous().view(torch.int32)[..., 0]
        moved = torch.zeros_like(plain)
        for distance, mask in MOVES:
            left = plain << distance
            round = plain >> (32 - distance) & (1 << distance) - 1 if distance else 0
            moved |= (left | round) & (mask - (mask >> 31 << 32))
        moved = moved.masked_fill_(broken[..., None], 0)  # 0 times infinity: NaN, as 255 means
        words.append(_slabs(moved, gated).permute(0, 3, 2, 5, 4, 1).reshape(-1))
        made = _slabs(torch.where(broken, s, s + 126), gated)  # slab, half, g, two blocks, which
        factors.append(made.permute(0, 3, 2, 4, 1).reshape(-1))
    return torch.cat(words), torch.cat(factors)


def _slabs(rows: Tensor, gated: bool) -> Tensor:
    """(rows, blocks, ...) -> (slabs, 2, 8, blocks / 2, 2, ...); gated: the first half of a slab gate, the second up."""
    found = rows.view(2, -1, 8, *rows.shape[1:]).transpose(0, 1) if gated else rows.view(-1, 2, 8, *rows.shape[1:])
    return found.unflatten(3, (-1, 2))


def laid_out_on_card(codes: Tensor, scales: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    """`laid_out` in one kernel."""
    begin(codes.device).result()
    return _on_card(codes, scales, gated)


@cache
def begin(device: torch.device) -> Future[None]:
    """Launch the kernel for the first time, in a thread of its own: early, beside other work.

    Before the first launch of a process Triton hashes its own files, starts its driver, asks for the version of its assembler and
    looks into its cache: half a second or more. What goes wrong is raised where the result is asked for.

    Args:
        device: with its index.
    """
    pool = ThreadPoolExecutor(1, "slipstream-triton")
    made = pool.submit(_first, device)
    pool.shutdown(wait=False)
    return made


def _first(device: torch.device) -> None:
    codes = torch.zeros(1, 16, 2, 16, dtype=torch.uint8, device=device)
    for gated in (False, True):
        _on_card(codes, codes[..., 0].contiguous(), gated)


def _on_card(codes: Tensor, scales: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    experts, rows, blocks, _ = codes.shape
    words = torch.empty(experts * rows * blocks * 4, dtype=torch.int32, device=codes.device)
    factors = torch.empty(scales.numel(), dtype=torch.uint8, device=codes.device)
    size = 1024
    grid: Any = (triton.cdiv(rows * blocks * 4, size), experts)
    with torch.cuda.device_of(codes):  # Triton launches on the current device
        _lay_out[grid](
            codes.view(-1).view(torch.int16), scales, words, factors, rows, blocks, MOVES=MOVES, GATED=gated, SIZE=size
        )
    return words, factors


@triton.jit(do_not_specialize=["rows", "blocks"])  # so that the first launches are of all the kernels that there are
def _lay_out(  # type: ignore[no-untyped-def]
    codes, scales, words, factors, rows, blocks, MOVES: tl.constexpr, GATED: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """A word is two blocks' (slab, two blocks, g, quarter, block, half); those of the first quarter bring their scales."""
    total = rows * blocks
    own = tl.program_id(1).to(tl.int64) * total
    word = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = word < total * 4
    half, quarter, g = word & 1, (word >> 2) & 3, (word >> 4) & 7
    slab, two = (word >> 7) // (blocks // 2), (word >> 7) % (blocks // 2)
    row = half * (rows // 2) + slab * 8 + g if GATED else slab * 16 + half * 8 + g
    at = own + row * blocks + two * 2 + ((word >> 1) & 1)
    low = tl.load(codes + at * 8 + quarter, mask=inside, other=0).to(tl.uint32) & 0xFFFF
    high = tl.load(codes + at * 8 + quarter + 4, mask=inside, other=0).to(tl.uint32) << 16
    scale = tl.load(scales + at, mask=inside, other=0)
    plain = low | high
    moved = tl.zeros((SIZE,), tl.uint32)
    for i in tl.static_range(len(MOVES)):
        if MOVES[i][0] == 0:
            moved |= plain & MOVES[i][1]
        else:
            moved |= ((plain << MOVES[i][0]) | (plain >> (32 - MOVES[i][0]))) & MOVES[i][1]
    moved = tl.where(scale == 255, 0, moved)
    tl.store(words + own * 4 + word, moved.to(tl.int32, bitcast=True), mask=inside)
    to = own + (word >> 7) * 32 + g * 4 + (word & 3)
    tl.store(factors + to, tl.where(scale == 255, scale, scale + 126), mask=inside & (quarter == 0))
