"""RMSNorm (Zhang and Sennrich 2019), in float32 whatever comes in."""

from __future__ import annotations

import torch
from torch import Tensor


def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:  # (..., width)
    x = x if delta is None else (x + delta).to(x.dtype)
    return x, norm(x, weight, eps, dtype)


def norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:  # (..., width), (width,)
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (h * weight.float()).to(dtype or x.dtype)
