"""From the product of an attention layer to its queries: attention_input(qkv, turns, norms, keys, values, slots) -> q.

qkv (tokens, heads + 2 kv_heads, head_dim): queries, keys, values; turns: `ops/rope.py:Turns`, or None where nothing is turned;
norms: weights of RMSNorms of each head of the queries and of the keys, (head_dim,), and their eps, or None;
keys, values (num_slots, kv_heads, head_dim); slots (tokens,) int64. q (tokens, heads, head_dim).
This is where a token's key enters the cache.
"""

from __future__ import annotations

from typing import Any

from slipstream.ops.choose import Case, Impl, needs_triton


def _reference() -> Any:
    from slipstream.ops.attention_input.reference import attention_input

    return attention_input


def _torch() -> Any:
    from slipstream.ops.attention_input.torch import attention_input

    return attention_input


def _triton() -> Any:
    from slipstream.ops.attention_input.triton import attention_input

    return attention_input


def _reject_torch(case: Case) -> str | None:
    if case.batch_invariant and case.device == "cpu":
        return "whether addcmul rounds between its product and its sum depends on the place of a number"
    if case.batch_invariant:
        return "how torch's operator for norms sums is not documented, and may depend on the rows"
    return None


def _always(case: Case) -> str | None:
    return None


IMPLS = (
    Impl("triton", _triton, needs_triton),
    Impl("torch", _torch, _reject_torch),
    Impl("reference", _reference, _always),
)
