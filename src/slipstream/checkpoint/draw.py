"""Random weights in the place of a checkpoint's: drawn on the device, in the format in which they are held."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from slipstream.checkpoint.tensors import DENSE, TensorInfo
from slipstream.ops.formats import Weight, packed_shapes

_CODE = {"mxfp4": 2.93, "int8": 74.0, "int4": 4.6}  # root mean square of the code of a random byte, or half of one


def draw(info: TensorInfo, *, seed: int, device: torch.device) -> Weight:
    """A weight of mean 0 that leaves the size of what it multiplies as it is; norms are near 1, biases small.

    The same for the same seed, name and kind of device, whatever else is drawn.
    """
    source = torch.Generator(device).manual_seed(seed ^ zlib.crc32(info.name.encode()))

    def integers(shape: tuple[int, ...], low: int = 0, high: int = 256, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.randint(low, high, shape, generator=source, dtype=dtype, device=device)

    if not info.parts:
        dtype: torch.dtype = getattr(torch, DENSE[info.dtype][1])
        values = torch.empty(info.shape, dtype=dtype, device=device).normal_(generator=source)
        small = len(info.shape) == 1 or info.name.endswith("bias")
        values *= 0.1 if small else info.shape[-1] ** -0.5
        return Weight("dense", values.add_(1) if "norm" in info.name else values, info.shape)
    data, scales = packed_shapes(info.format, info.shape, info.group)
    size = info.shape[-1] ** -0.5 / _CODE[info.format]
    if info.format == "mxfp4":
        exponent = 127 + round(math.log2(size))
        return Weight("mxfp4", integers(data), info.shape, integers(scales, exponent - 1, exponent + 2))
    codes = integers(data) if info.format == "int4" else integers(data, -128, 128, torch.int8)
    return Weight(info.format, codes, info.shape, torch.full(scales, size, dtype=torch.bfloat16, device=device))
