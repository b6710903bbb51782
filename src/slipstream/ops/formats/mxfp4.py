"""MXFP4: E2M1 elements in blocks of 32 along the input dimension, with one E8M0 scale a block.

Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.3 (formats), 5.4 (scale) and 6.3 (conversion). Packed
as in the gpt-oss checkpoints: byte j of a block holds element 2j in its low half and element 2j + 1 in its high half.

Encoding: the scale is 2^(floor(log2 max|x|) - 2), as 2 is the largest exponent of E2M1; elements are x / scale, rounded to
nearest, ties to even, and what is above 6 becomes 6. What stands at the edges:

- zeros: -0 keeps its sign; a block of nothing but zeros has the scale byte 0.
- overflow: cannot happen to the scale (the largest float32 has the scale byte 252); elements saturate at 6.
- NaN and infinities: a block that holds one gets the scale byte 255, which is NaN, and all codes 0: never hidden.
- subnormal and other tiny numbers: the scale byte ends at 0 (2^-127), below which elements are rounded to steps of 2^-128.
- float64 is rounded to float32 first; every other float is exact in float32.

Decoding: scale byte s is 2^(s - 127); byte 0 is 2^-127 (a float32 subnormal, exact); byte 255 is NaN, and makes the whole
block NaN, its zeros too. What is beyond float32 (4 * 2^126 and up) becomes infinite.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0 to 7; codes 8 to 15 are their negatives
_EMAX = 2
_CHUNK = 1 << 20  # values at a time, so that temporaries stay near the cache


def encode(values: Tensor) -> tuple[Tensor, Tensor]:
    """(..., in) floats -> (..., in / 32, 16) and (..., in / 32) uint8."""
    flat = values.reshape(-1, BLOCK)
    blocks = torch.empty(flat.shape[0], BLOCK // 2, dtype=torch.uint8, device=values.device)
    scales = torch.empty(flat.shape[0], dtype=torch.uint8, device=values.device)
    step = _CHUNK // BLOCK
    for at in range(0, flat.shape[0], step):
        _encode(flat[at : at + step].float(), blocks[at : at + step], scales[at : at + step])
    outer = (*values.shape[:-1], values.shape[-1] // BLOCK)
    return blocks.view(*outer, BLOCK // 2), scales.view(outer)


def _encode(x: Tensor, blocks: Tensor, scales: Tensor) -> None:  # (blocks, 32) float32
    size = x.abs()
    largest = size.amax(1)
    broken = ~largest.isfinite()  # NaN is the largest of all
    exponent = torch.frexp(largest).exponent - 1 - _EMAX  # frexp's mantissa is in [0.5, 1)
    scale = torch.where(largest > 0, exponent + 127, 0).clamp_(0, 254)
    size = torch.ldexp(size, 127 - scale[:, None])  # exact, but for what is far below 0.25 anyway
    # Each comparison steps to the next code; which bounds belong to it is "ties to even".
    code = (size > 0.25).to(torch.uint8)
    for bound, tie in ((0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False)):
        code += size >= bound if tie else size > bound
    code |= x.signbit().to(torch.uint8) << 3
    code.masked_fill_(broken[:, None], 0)
    blocks.copy_(code[:, ::2] | code[:, 1::2] << 4)
    scales.copy_(scale.masked_fill_(broken, 255))


def decode(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., in / 32, 16) and (..., in / 32) uint8 -> (..., in) of `dtype`."""
    out = torch.empty(*scales.shape, BLOCK, dtype=dtype, device=blocks.device)
    flat, packed, sizes = out.view(-1, BLOCK), blocks.reshape(-1, BLOCK // 2), scales.reshape(-1)
    table = torch.tensor(VALUES + tuple(-v for v in VALUES), device=blocks.device)
    step = _CHUNK // BLOCK
    for at in range(0, flat.shape[0], step):
        part = packed[at : at + step]
        codes = torch.stack((part & 15, part >> 4), -1).view(-1, BLOCK)
        flat[at : at + step] = table[codes.int()] * scale_values(sizes[at : at + step])[:, None]
    return out.view(*scales.shape[:-1], -1)


def scale_values(scales: Tensor) -> Tensor:
    """E8M0 bytes as float32."""
    bits = scales.int() << 23
    bits = torch.where(scales == 0, 0x00400000, torch.where(scales == 255, 0x7FC00000, bits))
    return bits.view(torch.float32)
