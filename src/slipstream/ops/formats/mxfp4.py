"""MXFP4: E2M1 elements in blocks of 32 along the input dimension, with one E8M0 scale a block.

Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.3 (formats), 5.4 (scale) and 6.3 (conversion). Packed
as in the gpt-oss checkpoints: byte j of a block holds element 2j in its low half and element 2j + 1 in its high half.

Encoding: the scale is 2^(floor(log2 max|x|) - 2), as 2 is the largest exponent of E2M1; elements are x / scale, rounded to
nearest, ties to even, and what is above 6 becomes 6. What stands at the edges:

- zeros: -0 keeps its sign; a block of nothing but zeros has the scale byte 0.
- overflow: cannot happen to the scale (the largest float32 has the scale byte 252); elements saturate at 6.
- NaN and infinities: a block that holds one gets the scale byte 255, which is NaN, and all codes 0: never hidden.
- subnormal and other tiny numbers: the scale byte ends at 0 (2^-127), where elements are rounded to steps of 2^-128.
- float64 is rounded to float32 first, where it may become infinite; every other float is exact in float32.

Decoding: scale byte s is 2^(s - 127); byte 0 is 2^-127 (a float32 subnormal, exact); byte 255 is NaN, and makes the whole
block NaN, its zeros too. What is 2^128 and up (scale bytes 253 and 254 have such) is beyond float32 and becomes infinite.
All else is exact in float32.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from slipstream.ops.formats.integers import pack

BLOCK = 32
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0 to 7; codes 8 to 15 are their negatives
# Values at a time. On a CPU the temporaries are to stay in its cache; on a GPU each of them is a launch.
_CHUNK = {"cpu": 1 << 17}
_CHUNK_GPU = 1 << 24


def encode(values: Tensor) -> tuple[Tensor, Tensor]:
    """(..., in) floats -> (..., in / 32, 16) and (..., in / 32) uint8."""
    flat = values.reshape(-1, BLOCK)
    blocks = torch.empty(flat.shape[0], BLOCK // 2, dtype=torch.uint8, device=values.device)
    scales = torch.empty(flat.shape[0], dtype=torch.uint8, device=values.device)
    step = _CHUNK.get(values.device.type, _CHUNK_GPU) // BLOCK
    for at in range(0, flat.shape[0], step):
        _encode(flat[at : at + step].float(), blocks[at : at + step], scales[at : at + step])
    outer = (*values.shape[:-1], values.shape[-1] // BLOCK)
    return blocks.view(*outer, BLOCK // 2), scales.view(outer)


def _encode(x: Tensor, blocks: Tensor, scales: Tensor) -> None:  # (blocks, 32) float32
    size = x.abs()
    exponent = size.amax(1).view(torch.int32) >> 23 & 255  # as float32 has it: floor(log2) + 127; 255 is not finite
    broken = exponent == 255
    scale = (exponent - 2).clamp_(0)
    size *= scale_values(254 - scale)[:, None]  # by 1 / scale: exact, but for what is far below 0.25 anyway
    # Each comparison steps to the next code; which bounds belong to it is "ties to even".
    code = (size > 0.25).to(torch.uint8)
    for bound, tie in ((0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False)):
        code += size >= bound if tie else size > bound
    code |= x.signbit().to(torch.uint8) << 3
    blocks.copy_(pack(code.masked_fill_(broken[:, None], 0)))
    scales.copy_(scale.masked_fill_(broken, 255))


def decode(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., in / 32, 16) and (..., in / 32) uint8 -> (..., in) of `dtype`."""
    out = torch.empty(*scales.shape, BLOCK, dtype=dtype, device=blocks.device)
    flat, packed, sizes = out.view(-1, BLOCK), blocks.reshape(-1, BLOCK // 2), scales.reshape(-1)
    pairs = _pairs(blocks.device)
    step = _CHUNK.get(blocks.device.type, _CHUNK_GPU) // BLOCK
    for at in range(0, flat.shape[0], step):
        part = pairs[packed[at : at + step].int()].view(torch.float32)
        flat[at : at + step] = part.mul_(scale_values(sizes[at : at + step])[:, None])
    return out.flatten(-2)


@cache
def _pairs(device: torch.device) -> Tensor:
    """What a byte stands for, low half first, as one number of eight bytes: one look-up finds two values."""
    values = torch.tensor(VALUES + tuple(-v for v in VALUES), device=device)
    return torch.stack((values.repeat(16), values.repeat_interleave(16)), 1).view(torch.int64).view(256)


def scale_values(scales: Tensor) -> Tensor:
    """E8M0 bytes as float32."""
    bits = scales.int() << 23
    bits = torch.where(scales == 0, 0x00400000, torch.where(scales == 255, 0x7FC00000, bits))
    return bits.view(torch.float32)
