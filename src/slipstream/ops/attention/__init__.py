"""Attention over the paged cache.

attention(q, keys, values, batch, group, scale=, softcap=, sinks=) -> (tokens, heads, head_dim)
  q (tokens, heads, head_dim); keys, values (num_slots, kv_heads, head_dim); sinks (heads,) or None.
The keys of this step are already in the cache. Query head h looks at key head h // (heads // kv_heads).
"""

from __future__ import annotations

from typing import Any

from slipstream.ops.choose import Case, Impl


def _reference() -> Any:
    from slipstream.ops.attention.reference import attention

    return attention


def _sdpa() -> Any:
    from slipstream.ops.attention.sdpa import attention

    return attention


def _reject_sdpa(case: Case) -> str | None:
    if case.get("softcap"):
        return "torch's scaled_dot_product_attention has no soft-capping of the scores"
    if case.get("sinks") and case.device != "cpu":
        return "attention sinks need the log-sum-exp that only torch's CPU operator returns for every dtype"
    return None


def _always(case: Case) -> str | None:
    return None


IMPLS = (Impl("sdpa", _sdpa, _reject_sdpa), Impl("reference", _reference, _always))
