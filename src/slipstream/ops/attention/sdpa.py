"""Attention by torch's scaled_dot_product_attention.

A decoding query is short work, so the query heads that share a key head go in as the rows of one query matrix, and
all decoding sequences in one padded call. Prompts go one sequence at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.batch import Batch, GroupBatch

QUERIES = 128


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
    if batch.decode_only and group.padding_is_small:
        return _decode(q, keys, values, group, scale, sinks)
    out = torch.empty_like(q)
    for i, context in enumerate(group.contexts):
        rows = slice(batch.query_starts[i], batch.query_starts[i + 1])
        count, start = rows.stop - rows.start, batch.starts[i]
        query = q[rows].transpose(0, 1)[None]  # (1, heads, queries, head_dim)
        repeat = q.shape[1] // keys.shape[1]
        key = context.take(keys).repeat_interleave(repeat, 1).transpose(0, 1)[None]
        value = context.take(values).repeat_interleave(repeat, 1).transpose(0, 1)[None]
        at = rows.start
        for first, last in _blocks(start, start + count):
            low = 0 if group.window is None else max(0, first - group.window + 1 - context.first)
            high = last - context.first
            mask = group.mask(i, first, last, q.dtype)[None, None, :, low:high]
            block = _sdpa(
                query[:, :, first - start : last - start],
                key[:, :, low:high],
                value[:, :, low:high],
                mask,
                scale,
                sinks,
            )
            out[at : at + last - first] = block[0].transpose(0, 1)
            at += last - first
    return out


def _decode(q: Tensor, keys: Tensor, values: Tensor, group: GroupBatch, scale: float, sinks: Tensor | None) -> Tensor:
    sequences, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    mask = None
    if sequences == 1:
        key, value = (group.contexts[0].take(cache)[None] for cache in (keys, values))
    else:
        index, real = group.decode_index
        key, value = (cache[index] for cache in (keys, values))  # (sequences, keys, kv_heads, head_dim)
        mask = real[:, None, None, :]
    query = q.view(sequences, kv_heads, heads // kv_heads, head_dim)
    sinks = None if sinks is None else sinks.view(kv_heads, heads // kv_heads)
    out = _sdpa(query, key.transpose(1, 2), value.transpose(1, 2), mask, scale, sinks)
    return out.reshape(sequences, heads, head_dim)


def _blocks(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Queries a few at a time, so that keys which none of them sees are left out, and a mask stays small."""
    for first in range(start, end, QUERIES):
        yield first, min(first + QUERIES, end)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, sinks: Tensor | None) -> Tensor:
    if sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if mask is not None and mask.dtype == torch.bool:  # this operator wants the mask as numbers
        mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, False, attn_mask=mask, scale=scale
    )
    # A sink is one more score without a value: it takes 1 - sigmoid(lse - sink) of the weight.
    share = torch.sigmoid(lse.view(q.shape[:3]) - (sinks if sinks.dim() == 2 else sinks[:, None]).float())
    return out * share[..., None].to(out.dtype)
