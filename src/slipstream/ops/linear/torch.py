"""torch's own linear: cuBLAS on CUDA, oneDNN or MKL on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.ops.formats import Weight


class Dense:
    def prepare(self, weight: Weight, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (weight.data.to(dtype),)

    def __call__(self, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
        return F.linear(x, packed[0], bias)

    def wide(
        self, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        if bias is not None:  # which would be a kernel more
            return self(x, packed, bias)
        if not x.is_cuda or x.dtype == torch.float32:
            return torch.mm(x, packed[0].t(), out=out)
        if out is None:
            return torch.mm(x, packed[0].t(), torch.float32)
        return torch.mm(x, packed[0].t(), torch.float32, out=out)
