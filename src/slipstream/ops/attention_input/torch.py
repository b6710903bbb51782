"""The same with torch's fused norm, and a rotation in three operators, and one more where only a part of each head turns."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from slipstream.ops.attention_input import reference
from slipstream.ops.norm.torch import norm


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (tokens, heads, head_dim), (tokens, 1, dim)
    dim = cos.shape[-1]
    part = x[..., :dim]
    turned = torch.addcmul(part * cos, part.roll(dim // 2, -1), sin)
    return turned if dim == x.shape[-1] else torch.cat((turned, x[..., dim:]), -1)


attention_input = partial(reference.attention_input, norm=norm, rope=rope)
