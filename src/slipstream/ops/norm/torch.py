"""RMSNorm by torch's fused operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:  # (..., width)
    x = x if delta is None else (x + delta).to(x.dtype)
    return x, norm(x, weight, eps, dtype)


def norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:  # (..., width), (width,)
    if weight.dtype != x.dtype or dtype not in (None, x.dtype):
        return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(dtype or x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps)
