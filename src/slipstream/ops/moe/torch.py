"""One expert at a time, with all tokens that were sent to it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.ops.activation.reference import activation


def experts(
    x: Tensor,  # (tokens, hidden)
    ids: Tensor,  # (tokens, top_k) int64
    weights: Tensor,  # (tokens, top_k)
    gate_up: Tensor,  # (experts, 2 * intermediate, hidden)
    down: Tensor,  # (experts, hidden, intermediate)
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    kind: str,
    limit: float = 7.0,
) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        h = F.linear(x[token], gate_up[expert], None if gate_up_bias is None else gate_up_bias[expert])
        h = F.linear(activation(h, kind, limit), down[expert], None if down_bias is None else down_bias[expert])
        out.index_add_(0, token, h.float() * weights[token, slot, None].float())
    return out.to(x.dtype)
