"""Multiply by mxfp4 in bfloat16 on Hopper: with the kernels of a mixture of experts, of which there is one.

Those start before the kernel before them has ended (ops/chain.py), and a weight goes from its load straight into a product.
A part of the sum in a program each, where rows alone leave the device idle; a second kernel adds the parts, in order. The norm
that comes next can do that as well, and then there are as many parts as are fastest: a warp decodes its weights slower than
memory brings them, so that few programs would be slow, whatever they read ahead.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
from torch import Tensor

from slipstream.ops.chain import chain, processors
from slipstream.ops.formats import Weight
from slipstream.ops.moe import Pairs, kernels
from slipstream.ops.moe.layout import held_bytes, prepare
from slipstream.ops.moe.triton import FEW, TABLE, Alone, Tiles, choose_alone, choose_parts, mix, run_tiles

MOST = 1 << 17  # tokens at a time
# By tokens: as for experts that each have so many, but with less of the weight a program, as there are fewer programs.
STEPS = (
    (8, TABLE["up to 5"]),
    (16, Tiles(True, 16, 2, 4, 2, 4)),
    (32, Tiles(True, 32, 4, 2, 4, 4)),
    (64, Tiles(True, 64, 4, 2, 4, 4)),
)


class Slabs:
    """Activations are bfloat16; float32 is for tests."""

    def prepare(self, weight: Weight, dtype: torch.dtype) -> tuple[Tensor, ...]:
        _numbers(weight.data.device)  # before any graph is recorded
        return prepare(weight.map(lambda t: t[None], (1, *weight.shape)), dtype)

    def held_bytes(self, format: str, shape: tuple[int, ...], dtype: torch.dtype, packed: int) -> int | None:
        """Blocks in twos."""
        return held_bytes(format, (math.prod(shape[:-2]), *shape[-2:]), dtype)

    def wide(
        self, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        rows = packed[0].shape[1] * 16
        out = torch.empty(len(x), rows, dtype=torch.float32, device=x.device) if out is None else out
        return self(x, packed, bias, out)

    def __call__(self, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        (_, slabs, twos, _), tokens = packed[0].shape, len(x)
        if out is None:
            out = torch.empty(tokens, slabs * 16, dtype=x.dtype, device=x.device)
        if not tokens:
            return out
        if tokens > MOST:
            for some, to in zip(x.split(MOST), out.split(MOST), strict=True):
                self(some, packed, bias, to)
            return out
        tiles, alone = choose_tiles(tokens, x.dtype), choose_alone(packed, x.dtype, 1, None) if tokens == 1 else None
        programs = triton.cdiv(slabs, tiles.slabs) * triton.cdiv(tokens, tiles.pairs)
        parts = max(1, min(processors(x.device) // (2 * programs), triton.cdiv(2 * twos, tiles.blocks) // 2))
        parts = 1 if alone else parts
        sums = out if parts == 1 else torch.empty(parts, tokens, slabs * 16, dtype=torch.float32, device=x.device)
        _multiply(x, packed, bias, sums.view(parts, tokens, -1), alone or tiles)
        if parts > 1:
            zeros, _, ones = _numbers(x.device)
            size = 1024
            with torch.cuda.device_of(x):  # Triton launches on the current device
                kernels.add[(tokens, triton.cdiv(slabs * 16, size))](
                    sums, zeros, ones, None, out, slabs * 16, tokens, 1, parts, size, **chain(x.device)
                )
        return out

    def left(self, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None) -> Tensor | Pairs:
        (_, slabs, twos, _), tokens = packed[0].shape, len(x)
        tiles, few = choose_tiles(tokens, x.dtype), 2 if twos >= 32 else 1
        alone = choose_alone(packed, x.dtype, 1, None, few) if tokens == 1 else None
        parts = few if alone else choose_parts(1, slabs, 2 * twos, tiles, x.device)
        if not 0 < tokens <= FEW or parts == 1:
            return self(x, packed, bias)
        sums = torch.empty(parts, tokens, slabs * 16, dtype=torch.float32, device=x.device)
        _multiply(x, packed, bias, sums, alone or tiles)
        zeros, _, ones = _numbers(x.device)
        return Pairs(sums, zeros[:tokens, None], ones[:tokens, None], None, x.dtype)


def _multiply(x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None, out: Tensor, tiles: Tiles | Alone) -> None:
    """To out, (parts, tokens, rows)."""
    x = mix(x, tiles, packed)
    x = x if x.stride(1) == 1 else x.contiguous()
    zeros, order, _ = _numbers(x.device)
    schedule = zeros[: triton.cdiv(len(x), tiles.pairs)], None if len(x) == 1 else order
    with torch.cuda.device_of(x):  # Triton launches on the current device
        run_tiles(x, packed, bias, schedule, out, tiles, 1, None, 0.0)


def choose_tiles(tokens: int, dtype: torch.dtype) -> Tiles:
    if dtype != torch.bfloat16:
        return TABLE["float32"]
    if tokens == 1:
        return TABLE["few"]
    return next((tiles for most, tiles in STEPS if tokens <= most), TABLE["more"])


@cache
def _numbers(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What a mixture's schedule is for one expert: all tiles are the first one's, and have all tokens in order. And ones."""
    order = torch.arange(MOST, dtype=torch.int32, device=device)
    return torch.zeros_like(order), order, torch.ones(MOST, dtype=torch.float32, device=device)
