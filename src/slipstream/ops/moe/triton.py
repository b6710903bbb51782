"""A mixture of experts on a GPU in three or four kernels: the schedule, gate and up with the activation, down, the sum.

Everything happens on the device, and the shapes of all launches follow from the number of tokens, so a CUDA graph can hold
it. A token's experts are added in the order in which they were picked, in float32, and no sum is left to chance.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.errors import KernelError
from slipstream.ops.formats import Weight
from slipstream.ops.moe import kernels

PRE = True
FEW = 32  # pairs of a token and an expert up to which each is a tile of its own, and nothing is sorted
# Where a word of 8 codes has each one's sign and its exponent and mantissa: kernels.py rotates them to bits 15 and 8 to 6.
PLACES = ((15, (8, 7, 6)), (9, (2, 1, 0)), (3, (28, 27, 26)), (13, (14, 5, 4)))


class Tiles(NamedTuple):
    left: bool  # the weights are the left side of the product
    pairs: int  # in a tile
    slabs: int  # of 16 rows of weights
    blocks: int  # of 32 inputs a step
    warps: int
    stages: int

    @property
    def mixed(self) -> bool:
        return self.left and self.warps >= 4


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
            f"moe[triton]: takes dense and mxfp4 experts of 16 n rows by 32 n inputs, not {weight.format} {rows} x {width}"
        )
    if weight.scales is None:
        data = weight.data.to(dtype).contiguous()
        if gated:
            for one in data:  # one expert at a time, so that there is never a second stack
                one.copy_(_slabs(one, gated).reshape(rows, width).clone())
        return (data,)
    data, scales = weight.data.contiguous(), weight.scales.contiguous()
    if ((scales > 128) & (scales != 255)).any():
        raise KernelError("moe[triton]: an mxfp4 scale is above 2; choose another implementation of moe")
    for words, factors in zip(data.view(torch.int32).view(number, rows, width // 32, 4), scales, strict=True):
        broken = factors == 255
        new = _places(words).masked_fill_(broken[..., None], 0)  # 0 times infinity: NaN, as 255 means
        factors.copy_(torch.where(broken, factors, factors + 126).view_as(factors))
        words.view(-1).copy_(_slabs(new, gated).permute(0, 3, 2, 4, 1).reshape(-1))
        factors.view(-1).copy_(_slabs(factors, gated).permute(0, 3, 2, 1).reshape(-1))
    shape = number, rows // 16, width // 32
    return data.view(torch.int32).view(*shape, 64), scales.view(*shape, 16)


def _slabs(rows: Tensor, gated: bool) -> Tensor:
    """(rows, ...) -> (slabs, 2, 8, ...); gated: the first half of each slab gate, the second up."""
    if gated:
        return rows.view(2, -1, 8, *rows.shape[1:]).transpose(0, 1)
    return rows.view(-1, 2, 8, *rows.shape[1:])


def _places(words: Tensor) -> Tensor:
    """int32 with code i at bits 4 i -> int32 with its bits in their PLACES; the second of a pair is a half-word on."""
    new = torch.zeros_like(words)
    for i in range(8):
        sign, rest = PLACES[i // 2]
        for bit, to in zip((3, 2, 1, 0), (sign, *rest), strict=True):
            new |= (words >> (4 * i + bit) & 1) << (to + i % 2 * 16) % 32
    return new


def experts(
    x: Tensor,  # (tokens, hidden)
    ids: Tensor,  # (tokens, top_k) integers
    weights: Tensor,  # (tokens, top_k)
    gate_up: tuple[Tensor, ...],  # what prepare(gated=True) gave
    gate_up_bias: Tensor | None,  # (experts, 2 * intermediate), gate first
    down: tuple[Tensor, ...],
    down_bias: Tensor | None,  # (experts, hidden)
    *,
    kind: str,  # "swiglu_clamped" or "silu"
    limit: float = 7.0,
) -> Tensor:
    """The weighted sum of each token's experts, like x. x is bfloat16 or float32."""
    (tokens, hidden), top_k, number = x.shape, ids.shape[1], down[0].shape[0]
    out = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    pairs, chain = tokens * top_k, x.is_cuda
    x, ids, weights = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, ids.contiguous(), weights.contiguous()))
    inner = down[0].shape[2] * 32 if len(down) == 2 else down[0].shape[2]
    tiles = choose_tiles(pairs, number, x.dtype, len(down) == 2)
    parts = choose_parts(pairs, hidden // 16, inner // 32, tiles, x.device)
    between = torch.empty(pairs, inner, dtype=x.dtype, device=x.device)
    sums = torch.empty(parts, pairs, hidden, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        schedule = _schedule(ids, number, tiles.pairs) if pairs > FEW else (ids.view(-1), None)
        if tiles.mixed:
            x = x.view(tokens, hidden // 32, 4, 4, 2).transpose(2, 3).reshape(tokens, hidden)
        _product(x, gate_up, gate_up_bias, schedule, between, tiles, top_k, kind, limit)
        _product(between, down, down_bias, schedule, sums, tiles, 1, None, limit)
        size = min(1024, triton.next_power_of_2(hidden))
        kernels.add[(tokens, triton.cdiv(hidden, size))](
            sums, weights, out, hidden, pairs, parts, top_k, size, CHAIN=chain, launch_pdl=chain
        )
    return out


def _schedule(ids: Tensor, number: int, size: int) -> tuple[Tensor, Tensor]:
    """The expert of each tile, and its pairs: as many tiles as the worst case needs."""
    pairs = ids.numel()
    busy = min(pairs, number)
    most = busy + (pairs - busy) // size
    order = torch.empty(most * size, dtype=torch.int32, device=ids.device)
    tiles = torch.empty(most, dtype=torch.int32, device=ids.device)
    kernels.schedule[(number,)](
        ids, tiles, order, pairs, most,
        BINS=triton.next_power_of_2(number + 1), BLOCK_M=size, SIZE=min(1024, triton.next_power_of_2(pairs)),
        CHAIN=ids.is_cuda, launch_pdl=ids.is_cuda,
    )  # fmt: skip
    return tiles, order


def _product(
    x: Tensor,
    stack: tuple[Tensor, ...],
    bias: Tensor | None,
    schedule: tuple[Tensor, Tensor | None],
    out: Tensor,
    tiles: Tiles,
    share: int,
    kind: str | None,
    limit: float,
) -> None:
    data, scales = stack if len(stack) == 2 else (*stack, None)
    slabs, blocks = (data.shape[1] // 16, data.shape[2] // 32) if scales is None else data.shape[1:3]
    parts, pairs = (out.shape[0], out.shape[1]) if kind is None else (1, out.shape[0])
    steps = triton.cdiv(triton.cdiv(blocks, tiles.blocks), parts)
    kernels.tiles[(triton.cdiv(slabs, tiles.slabs), schedule[0].numel(), parts)](
        x, data, scales, bias, *schedule, out, x.stride(0), slabs, blocks, pairs, share, steps, limit, KIND=kind,
        LEFT=tiles.left, BLOCK_M=tiles.pairs, SLABS=tiles.slabs, BLOCKS=tiles.blocks,
        COMPUTE=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float32,
        MIXED=tiles.mixed, EVEN=blocks % tiles.blocks == 0, CHAIN=x.is_cuda, launch_pdl=x.is_cuda,
        PREFETCH=triton.next_power_of_2(steps * tiles.blocks * 2) if schedule[1] is None and PRE else 0,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def choose_tiles(pairs: int, number: int, dtype: torch.dtype, packed: bool) -> Tiles:
    if dtype != torch.bfloat16:
        return Tiles(False, 16, 2, 1, 4, 2)
    if pairs <= FEW:
        return Tiles(True, 8, 8, 4, 2, 4)
    each = pairs / number
    if each <= 12:
        return Tiles(True, 16, 8, 4, 2, 4)
    if each <= 48:
        return Tiles(False, 64, 8, 2, 4, 3)
    return Tiles(False, 128, 16, 2, 8, 3)


def choose_parts(pairs: int, slabs: int, blocks: int, tiles: Tiles, device: torch.device) -> int:
    """Where tiles alone leave the device idle, several programs share a tile, each with a part of the sum."""
    programs = triton.cdiv(slabs, tiles.slabs) * pairs
    return max(1, min(4 * _processors(device) // programs, blocks // tiles.blocks // 2)) if pairs <= FEW else 1


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
