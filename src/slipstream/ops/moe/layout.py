"""Experts' weights as the kernels of a mixture want them: slabs of 16 rows, and mxfp4's bits where two instructions find them.

kernels.py says what the layout is and why. Bits are moved by tables, in the same way everywhere.
"""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.errors import KernelError
from slipstream.ops.formats import Weight

# Where a word of 8 codes has each one's sign and its exponent and mantissa: kernels.py rotates them to bits 15 and 8 to 6.
PLACES = ((15, (8, 7, 6)), (9, (2, 1, 0)), (3, (28, 27, 26)), (13, (14, 5, 4)))
# Bytes of experts that are laid out at a time, beside which the card has three times as many; one matrix is never cut.
TOGETHER = 128 << 20


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
                one.copy_(one.unflatten(0, (2, -1, 8)).transpose(0, 1).reshape(rows, width).clone())
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
    some = max(1, TOGETHER // data[0].nbytes) if data.is_cuda else 1
    for codes, factors in zip(data.split(some), scales.split(some), strict=True):  # there is never a second stack
        words, made = laid_out(codes, factors, gated)
        codes.view(torch.int32).view(words.shape).copy_(words)
        factors.view(made.shape).copy_(made)
    shape = number, rows // 16, -1
    return data.view(-1).view(torch.int32).view(*shape, 128), scales.view(-1).view(torch.int32).view(*shape, 8)


def held_bytes(format: str, shape: tuple[int, ...], dtype: torch.dtype) -> int | None:
    """What `prepare` makes of a stack (experts, out, in) of that format: blocks in twos."""
    number, rows, width = shape
    return number * rows * (width // 32 + width // 32 % 2) * 17 if format == "mxfp4" else None


def laid_out(codes: Tensor, scales: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    """Packed codes (experts, rows, blocks, 16) and scales (experts, rows, blocks), uint8, contiguous -> the words, scales.

    A word is four codes of a block's first half and four of its second; where the scale is 255, 0, as 0 times infinity is NaN,
    which that means.
    """
    halves = codes.view(torch.uint16).unflatten(-1, (2, 4)).unbind(-2)
    first, second = (
        table.index_select(0, _ordered(half, gated).to(torch.int32, memory_format=torch.contiguous_format).view(-1))
        for half, table in zip(halves, _tables(codes.device), strict=True)
    )
    factors = _ordered(scales, gated)
    found = first.add_(second).view(*factors.shape[:4], 4, 2, 2)
    found.masked_fill_((factors == 255).unsqueeze(4), 0)
    return found, torch.where(factors == 255, factors, factors + 126)


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the bits of four codes go, (65536,) int32 each: of the first half of a word of eight, and of the second.

    On a card they stay in its cache, so that a layout takes less time than the copy onto the card; and it needs nothing but torch:
    before its first kernel Triton hashes itself and looks for its assembler, for half a second in which weights would wait.
    """
    numbers = torch.arange(1 << 16, dtype=torch.int32, device=device)
    low, high = moved(torch.stack((numbers, numbers << 16)))
    if device.type == "cuda":  # other threads read them on streams of their own
        torch.cuda.current_stream(device).synchronize()
    return low, high


def _ordered(rows: Tensor, gated: bool) -> Tensor:
    """(experts, rows, blocks, ...) -> (experts, slabs, blocks / 2, 8, ..., 2, 2): last which block of two and half of a slab, whose
    first one is of gate and second of up if `gated`."""
    rows = rows.unflatten(2, (-1, 2))
    rows = rows.unflatten(1, (2, -1, 8)).transpose(1, 2) if gated else rows.unflatten(1, (-1, 2, 8))
    return rows.permute(0, 1, 4, 3, *range(6, rows.dim()), 5, 2)


def moved(words: Tensor) -> Tensor:
    """Words of 8 codes, int32, with all bits at their PLACES."""
    masks = (mask - (mask >> 31 << 32) for _, mask in MOVES)  # as signed numbers
    left, right, keep = torch.tensor(
        [[n, 32 - n, mask] for (n, _), mask in zip(MOVES, masks, strict=True)], dtype=torch.int32, device=words.device
    ).unbind(1)
    words = words[..., None]
    round = words >> right.clamp(max=31) & (1 << left) - 1
    return ((words << left | round) & keep).sum(-1, dtype=torch.int32)  # of which no two have a bit in common


@cache
def begin(device: torch.device) -> threading.Thread:
    """Use the kernels of loading for the first time, in a thread: early, beside other work. Nobody waits for it.

    CUDA brings a kernel's code onto the card when it is first launched, and holds its own locks for that. Beside copies that took
    300 ms for the twenty kernels of a layout, and the copies were half as fast meanwhile.

    Args:
        device: with its index.
    """
    thread = threading.Thread(target=_first, args=(device,), name="slipstream-begin")
    thread.start()
    return thread


def _first(device: torch.device) -> None:
    # A plan is nothing but Python: each of the calls below would wait for the interpreter for as long as one may keep it, 5 ms.
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 10)
    try:
        _use(device)
    finally:
        sys.setswitchinterval(before)


def _use(device: torch.device) -> None:
    with suppress(Exception):  # whoever needs it will be told
        codes = torch.zeros(2, 32, 3 * 16, dtype=torch.uint8, device=device)
        weight = Weight("mxfp4", codes, (2, 32, 96), torch.zeros(2, 32, 3, dtype=torch.uint8, device=device))
        prepare(weight, torch.bfloat16, gated=True)
        numbers = codes.view(torch.bfloat16)  # and what joins and turns floats
        torch.cat((numbers.float().to(torch.bfloat16), numbers.transpose(1, 2).contiguous().view(numbers.shape)))
