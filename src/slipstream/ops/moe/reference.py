"""Every (token, expert) pair by itself."""

from __future__ import annotations

import torch
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
    for token in range(x.shape[0]):
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            h = gate_up[expert].float() @ x[token].float()
            h = h if gate_up_bias is None else h + gate_up_bias[expert].float()
            h = down[expert].float() @ activation(h, kind, limit)
            h = h if down_bias is None else h + down_bias[expert].float()
            out[token] += weight.float() * h
    return out.to(x.dtype)
