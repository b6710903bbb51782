"""RMSNorm with its weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slipstream.layers.ops import Ops
from slipstream.parallel.collectives import Delta, Parts, whole


class Norm(nn.Module):
    """`plus_one`: the checkpoint stores weight - 1 (Gemma), so one is added at load and the sum is kept in float32."""

    def __init__(self, ops: Ops, width: int, eps: float, *, plus_one: bool = False) -> None:
        super().__init__()
        self.add_norm, self.eps, self.dtype = ops.add_norm, eps, ops.dtype
        dtype = torch.float32 if plus_one else ops.dtype
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype, device="meta"), requires_grad=False)

    def forward(self, x: Delta) -> Tensor:  # (..., width), like x
        return self.add_norm(whole(x), None, self.weight, self.eps)[1]

    def add(self, x: Tensor, delta: Delta | None) -> tuple[Tensor, Tensor]:
        """x + delta, like x, and the norm of it, in the dtype that the layers take."""
        if isinstance(delta, Parts):
            return delta.add_norm(x, self.weight, self.eps, self.dtype)
        return self.add_norm(x, delta, self.weight, self.eps, self.dtype)


def add(norm: Norm | None, x: Tensor, delta: Delta | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x + delta, and the norm of it if there is one, in `dtype`."""
    if norm is not None:
        return norm.add(x, delta)
    x = x if delta is None else x + whole(delta)
    return x, x.to(dtype)
