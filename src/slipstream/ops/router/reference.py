"""Top experts by a stable sort: torch.topk leaves open which of two equal numbers it takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def router(
    x: Tensor,  # (tokens, hidden)
    linear: Callable[[Tensor], Tensor],
    top_k: int,
    *,
    softmax_first: bool,
    renormalize: bool = True,
) -> tuple[Tensor, Tensor]:  # each (tokens, top_k)
    logits = linear(x).float()
    values, ids = (logits.softmax(-1) if softmax_first else logits).sort(dim=-1, descending=True, stable=True)
    weights, ids = values[:, :top_k], ids[:, :top_k].to(torch.int32)
    if not softmax_first:
        weights = weights.softmax(-1)
    elif renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids.contiguous(), weights.contiguous()
