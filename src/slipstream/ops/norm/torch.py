"""RMSNorm by torch's fused operator."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # (..., width)
    x = x if delta is None else x + delta
    return x, norm(x, weight, eps)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # (..., width), (width,)
    if weight.dtype != x.dtype:  # a weight kept in float32 because it was shifted by one (Gemma)
        return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps)
