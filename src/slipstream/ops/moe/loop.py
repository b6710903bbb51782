"""One expert at a time, with all tokens that were sent to it; a token's experts are added in the order of their numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.ops.moe import Activation, Expert


def experts(
    x: Tensor,  # (tokens, hidden)
    ids: Tensor,  # (tokens, top_k) int64
    weights: Tensor,  # (tokens, top_k)
    gate_up: Expert,
    down: Expert,
    activation: Activation,
    *,
    kind: str,
    limit: float = 7.0,
) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in ids.unique().tolist():
        if expert < 0:
            continue
        token, slot = (ids == expert).nonzero(as_tuple=True)
        h = down(activation(gate_up(x[token], expert), kind, limit), expert)
        out.index_add_(0, token, h.float() * weights[token, slot, None].float())
    return out.to(x.dtype)
