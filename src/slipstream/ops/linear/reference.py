"""x @ weight.T + bias, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.ops.formats import Weight


class Reference:
    def prepare(self, weight: Weight, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (weight.data.to(dtype),)

    def __call__(self, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
        out = x.float() @ packed[0].float().T
        return (out if bias is None else out + bias.float()).to(x.dtype)
