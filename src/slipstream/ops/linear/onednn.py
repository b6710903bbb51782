"""oneDNN with the weight laid out once in its own blocked format, instead of at every call."""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.ops.formats import Weight


class OneDNN:
    def prepare(self, weight: Weight, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (torch.ops.mkldnn._reorder_linear_weight(weight.data.to(dtype).contiguous(), 128),)

    def __call__(self, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, packed[0], bias, "none", [], "")
