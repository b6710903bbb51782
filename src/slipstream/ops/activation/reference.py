"""Gated activations in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def activation(gate_up: Tensor, kind: str, limit: float = 7.0, dtype: torch.dtype | None = None) -> Tensor:
    return _gated(gate_up, kind, limit).to(dtype or gate_up.dtype)


def _gated(gate_up: Tensor, kind: str, limit: float) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    if kind == "silu":
        return F.silu(gate).mul_(up)
    if kind == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    if kind == "gelu":
        return F.gelu(gate) * up
    if kind == "swiglu_clamped":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    raise ValueError(f"no activation is called {kind!r}")
