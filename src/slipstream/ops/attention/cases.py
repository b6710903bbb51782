"""Calls of attention over pages, to check and to time an implementation: decoding, and with a prompt beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from slipstream.batch import build_batch
from slipstream.cache.spec import CacheGroup
from slipstream.config import ModelConfig
from slipstream.ops.choose import Case
from slipstream.ops.sample import Run, Sample, draw
from slipstream.request import Chunk, PageTable

SMALL = {"heads": 6, "kv_heads": 2, "head_dim": 64, "context": 50, "window": None, "page_size": 16, "prompt": 0}


def checks(case: Case, shape: Mapping[str, Any]) -> list[dict[str, Any]]:
    size = {"head_dim": case.get("head_dim")} if case.get("head_dim") else {}
    return [{**size}, {**size, "prompt": 21}, {**size, "window": 19, "prompt": 21}]


def shape_of(config: ModelConfig) -> dict[str, Any]:
    return {"heads": config.num_heads, "kv_heads": config.num_kv_heads, "head_dim": config.head_dim, "context": 1024}


def facts(shape: Mapping[str, Any]) -> dict[str, Any]:
    return {"head_dim": shape["head_dim"], "sinks": bool(shape.get("sinks")), "softcap": shape.get("softcap")}


def sample(case: Case, tokens: int, shape: Mapping[str, Any]) -> Sample:
    """As many decoding sequences as tokens, each with `context` keys before; `prompt`: tokens of one more, from its start on."""
    heads, kv_heads, head_dim, size = (shape[name] for name in ("heads", "kv_heads", "head_dim", "page_size"))
    group = CacheGroup(shape["window"], (0,), kv_heads, head_dim)
    dtype, context, prompt = getattr(torch, case.dtype), shape["context"], shape["prompt"]
    lengths = [(context, 1)] * tokens + ([(0, prompt)] if prompt else [])
    chunks, used = [], 0
    for i, (start, count) in enumerate(lengths):
        first = group.first_visible(start) // size
        pages = -(-(start + count) // size) - first
        table = PageTable(first, tuple(reversed(range(used, used + pages))))  # never in order
        chunks.append(Chunk(i, start, (0,) * count, (table,), True))
        used += pages
    batch = build_batch(chunks, [group], size, torch.device(case.device))
    q = draw(5, tokens + prompt, heads, head_dim, dtype=dtype, device=case.device)
    keys, values = (draw(s, used * size, kv_heads, head_dim, dtype=dtype, device=case.device) for s in (6, 7))
    sinks = draw(8, heads, dtype=torch.float32, device=case.device) if case.get("sinks") else None

    def bind(attention: Any) -> Run:
        return lambda: attention(
            q, keys, values, batch, batch.groups[0], scale=head_dim**-0.5, softcap=case.get("softcap"), sinks=sinks
        )

    seen = min(context, shape["window"] or context) * tokens
    return Sample(bind, (q, keys, values), 2 * seen * kv_heads * head_dim * dtype.itemsize + 2 * q.nbytes)
