"""Rotary position embedding in three operators, and one more where only a part of each head is rotated."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (tokens, heads, head_dim), (tokens, 1, dim)
    dim = cos.shape[-1]
    part = x[..., :dim]
    turned = torch.addcmul(part * cos, part.roll(dim // 2, -1), sin)
    return turned if dim == x.shape[-1] else torch.cat((turned, x[..., dim:]), -1)
