"""Every (token, expert) pair by itself."""

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
    for token in range(x.shape[0]):
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            if expert < 0:
                continue
            h = down(activation(gate_up(x[token, None], expert), kind, limit), expert)
            out[token] += weight.float() * h[0].float()
    return out.to(x.dtype)
