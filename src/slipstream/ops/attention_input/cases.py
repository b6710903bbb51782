"""Calls of what stands between the product of an attention layer and its queries, to check and to time an implementation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from slipstream.config import ModelConfig
from slipstream.ops.choose import Case
from slipstream.ops.rope import Turns
from slipstream.ops.sample import Run, Sample, draw

SMALL = {"heads": 6, "kv_heads": 2, "head_dim": 64, "rotated": 64}


def checks(case: Case, shape: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{}, {"rotated": shape["head_dim"] // 4 * 2}]


def shape_of(config: ModelConfig) -> dict[str, Any]:
    ropes = [rope.dim for rope in config.ropes] or [config.head_dim]
    return {
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rotated": ropes[0],
    }


def facts(shape: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def sample(case: Case, tokens: int, shape: Mapping[str, Any]) -> Sample:
    heads, kv_heads, head_dim = (shape[name] for name in ("heads", "kv_heads", "head_dim"))
    dtype, device = getattr(torch, case.dtype), case.device
    qkv = draw(9, tokens, heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)
    frequencies = 1e4 ** -torch.linspace(0, 1, shape["rotated"] // 2, device=device)
    turns = Turns(torch.arange(3, 3 + tokens, device=device), frequencies, 1.0, dtype)
    slots = torch.arange(tokens, device=device).flip(0)
    turns.cos_sin  # noqa: B018  # made once for all layers of a step

    def bind(attention_input: Any) -> Run:
        keys, values = (torch.zeros(tokens, kv_heads, head_dim, dtype=dtype, device=device) for _ in range(2))

        def run() -> tuple[Tensor, ...]:
            return attention_input(qkv, turns, None, keys, values, slots), keys, values

        return run

    return Sample(bind, (qkv,), 2 * qkv.nbytes)
