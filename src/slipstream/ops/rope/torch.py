"""Rotary position embedding in three operators where the whole head is rotated."""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.ops.rope.reference import rope as reference


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (tokens, heads, head_dim), (tokens, 1, dim)
    dim = cos.shape[-1]
    if dim != x.shape[-1]:
        return reference(x, cos, sin)
    return torch.addcmul(x * cos, x.roll(dim // 2, -1), sin)
