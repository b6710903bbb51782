"""Norms of the heads, rotation, and the new keys and values written into their slots."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slipstream.ops import rope as rotation
from slipstream.ops.norm import reference as norms_reference


def attention_input(
    qkv: Tensor,  # (tokens, heads + 2 * kv_heads, head_dim)
    turns: rotation.Turns | None,
    norms: tuple[Tensor, Tensor, float] | None,
    keys: Tensor,  # (num_slots, kv_heads, head_dim)
    values: Tensor,
    slots: Tensor,  # (tokens,) int64
    *,
    norm: Callable[[Tensor, Tensor, float], Tensor] = norms_reference.norm,
    rope: Callable[[Tensor, Tensor, Tensor], Tensor] = rotation.rope,
) -> Tensor:  # (tokens, heads, head_dim)
    kv_heads = keys.shape[1]
    heads = qkv.shape[1] - 2 * kv_heads
    qk, v = qkv.split((heads + kv_heads, kv_heads), 1)
    if norms is not None:
        q_weight, k_weight, eps = norms
        qk = torch.cat((norm(qk[:, :heads], q_weight, eps), norm(qk[:, heads:], k_weight, eps)), 1)
    if turns is not None:
        qk = rope(qk, *turns.cos_sin)
    q, k = qk.split((heads, kv_heads), 1)
    keys.index_copy_(0, slots, k)
    values.index_copy_(0, slots, v)
    return q
