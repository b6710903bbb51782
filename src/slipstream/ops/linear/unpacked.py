"""Any dtype on any CPU without a compiler: rows are decoded a slice at a time and multiplied by torch.

Never more than a slice is held as numbers. Slow for few tokens, as every call decodes the whole weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.ops.formats import Weight, decode

SLICE = 1 << 20  # numbers decoded at a time


class Unpacked:
    """Takes mxfp4, int8 and int4."""

    def prepare(self, weight: Weight, dtype: torch.dtype) -> tuple[Tensor, ...]:
        if weight.scales is None:
            raise AssertionError(f"{weight.format} has no scales")
        return weight.data, weight.scales

    def __call__(self, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
        data, scales = packed
        format = "int8" if data.dtype == torch.int8 else "mxfp4" if scales.dtype == torch.uint8 else "int4"
        rows, width = data.shape[0], x.shape[1]
        out = torch.empty(x.shape[0], rows, dtype=x.dtype)
        step = max(1, SLICE // width)
        for at in range(0, rows, step):
            part = data[at : at + step]
            weight = Weight(format, part, (part.shape[0], width), scales[at : at + step])
            out[:, at : at + step] = F.linear(x, decode(weight, x.dtype))
        return out if bias is None else out.add_(bias)
