"""Weight-only integers: int8 with one scale a row, int4 with one scale a group of 32, 64 or 128 weights.

Both are symmetric: the scale is max|w| / 127.5 or max|w| / 7.5, rounded to bfloat16, and the code is w / scale (in float32)
rounded to nearest, ties to even, clamped to [-128, 127] or [-8, 7]. Packed as the compressed-tensors library packs them:
codes of int4 are stored plus 8, low nibble first. What stands at the edges:

- zeros: a row or group of nothing but zeros has the scale 1.
- NaN and infinities: a row or group that holds one gets the scale NaN, and all codes 0: never hidden.
- subnormal and other tiny numbers: the scale ends at 2^-126, the smallest normal bfloat16.
- float64 is rounded to float32 first, where it may become infinite; every other float is exact in float32.

Decoding is exact in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 20  # values at a time
_SMALLEST = torch.finfo(torch.bfloat16).smallest_normal


def encode8(values: Tensor) -> tuple[Tensor, Tensor]:
    """(..., out, in) floats -> (..., out, in) int8 and (..., out, 1) bfloat16."""
    codes = torch.empty(values.shape, dtype=torch.int8, device=values.device)
    scales = torch.empty(*values.shape[:-1], 1, dtype=torch.bfloat16, device=values.device)
    flat, flat_codes = values.reshape(-1, values.shape[-1]), codes.view(-1, values.shape[-1])
    flat_scales = scales.view(-1)
    step = max(1, _CHUNK // values.shape[-1])
    for at in range(0, flat.shape[0], step):
        part, scale = _encode(flat[at : at + step].float(), 127.5)
        flat_codes[at : at + step], flat_scales[at : at + step] = part, scale
    return codes, scales


def decode8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse: (..., out, in) of `dtype`."""
    return codes.float().mul_(scales.float()).to(dtype)


def encode4(values: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(..., out, in) floats -> (..., out, in / 2) uint8 and (..., out, in / group) bfloat16."""
    *outer, width = values.shape
    flat = values.reshape(-1, group)
    packed = torch.empty(flat.shape[0], group // 2, dtype=torch.uint8, device=values.device)
    scales = torch.empty(flat.shape[0], dtype=torch.bfloat16, device=values.device)
    step = _CHUNK // group
    for at in range(0, flat.shape[0], step):
        part, scale = _encode(flat[at : at + step].float(), 7.5)
        packed[at : at + step], scales[at : at + step] = pack((part + 8).view(torch.uint8)), scale
    return packed.view(*outer, width // 2), scales.view(*outer, width // group)


def decode4(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse: (..., out, in) of `dtype`."""
    codes = unpack(packed).unflatten(-1, (scales.shape[-1], -1))
    return codes.float().sub_(8).mul_(scales.float()[..., None]).to(dtype).flatten(-2)


def pack(codes: Tensor) -> Tensor:
    """(..., n) uint8 below 16 -> (..., n / 2) uint8, low half first."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """The inverse."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def _encode(rows: Tensor, steps: float) -> tuple[Tensor, Tensor]:  # (rows, width) float32 -> int8, (rows) bfloat16
    largest = rows.abs().amax(1)
    exact = largest / largest.new_full(
        (1,), steps
    )  # by a number CUDA multiplies with the reciprocal, which rounds twice
    scale = torch.where(largest == 0, 1.0, exact).bfloat16().clamp_(_SMALLEST)
    scale.masked_fill_(~largest.isfinite(), torch.nan)
    codes = (rows / scale.float()[:, None]).round_().clamp_(-steps - 0.5, steps - 0.5)
    return codes.nan_to_num_(0).to(torch.int8), scale
