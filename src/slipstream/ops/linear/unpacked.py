"""Any dtype on any CPU without a compiler: rows are decoded a slice at a time and multiplied by torch.

Never more than a slice is held as numbers. Slow for few tokens, as every call decodes the whole weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.ops.formats import Weight, decode
from slipstream.ops.linear.slices import in_slices

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

        def numbers(part: slice) -> Tensor:
            rows = data[part]
            return decode(Weight(format, rows, (len(rows), x.shape[1]), scales[part]), x.dtype)

        out = in_slices(x, len(data), numbers, SLICE)
        return out if bias is None else out.add_(bias)
