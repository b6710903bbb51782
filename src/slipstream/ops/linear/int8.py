"""int8 with one scale a row, through torch's packed operator for CPUs; nothing is laid out again at load.

The operator multiplies few tokens. It does so in bfloat16 only: in other dtypes it is ten times slower than floats. For
many tokens, codes (exact in bfloat16) are turned into numbers, a slice at a time so that it stays in the processor's
cache, and the scales are applied to the result. One thread of a Zen 4 core, 3072 x 576, microseconds of the operator and
of slices: 1 token 110 and 453, 8 tokens 422 and 566, 16 tokens 758 and 610, 32 tokens 1519 and 879.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.ops.formats import Weight
from slipstream.ops.linear.slices import in_slices

FEW = 12  # tokens up to which the operator is used
SLICE = 1 << 20  # numbers unpacked at a time


class Int8:
    def prepare(self, weight: Weight, dtype: torch.dtype) -> tuple[Tensor, ...]:
        if weight.scales is None:
            raise AssertionError("int8 has scales")
        return weight.data.contiguous(), weight.scales.reshape(-1).to(dtype)

    def __call__(self, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
        codes, scales = packed
        if x.shape[0] <= FEW:
            out = torch.ops.aten._weight_int8pack_mm(x.contiguous(), codes, scales)
        else:
            out = in_slices(x, len(codes), lambda part: codes[part].to(x.dtype), SLICE).mul_(scales)
        return out if bias is None else out.add_(bias)
