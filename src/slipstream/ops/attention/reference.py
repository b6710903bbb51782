"""Attention written out, one sequence at a time, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.batch import Batch, GroupBatch


def attention(
    q: Tensor,  # (tokens, heads, head_dim)
    keys: Tensor,  # (num_slots, kv_heads, head_dim)
    values: Tensor,
    batch: Batch,
    group: GroupBatch,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (heads,)
) -> Tensor:
    out = torch.empty_like(q)
    repeat = q.shape[1] // keys.shape[1]
    for i, context in enumerate(group.contexts):
        rows = slice(batch.query_starts[i], batch.query_starts[i + 1])
        start = batch.starts[i]
        query = q[rows].float().transpose(0, 1)  # (heads, queries, head_dim)
        key = context.take(keys).float().repeat_interleave(repeat, 1).permute(1, 2, 0)  # (heads, head_dim, keys)
        value = context.take(values).float().repeat_interleave(repeat, 1).transpose(0, 1)  # (heads, keys, head_dim)
        scores = query @ key * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(~group.mask(i, start, start + rows.stop - rows.start), float("-inf"))
        if sinks is not None:  # one more score a head, which takes weight and gives no value
            extra = sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
            weights = torch.cat((scores, extra), -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        out[rows] = (weights @ value).transpose(0, 1).to(q.dtype)
    return out
