"""Write new keys and values into their slots: store_kv(k, v, keys, values, slots).

k, v (tokens, kv_heads, head_dim); keys, values (num_slots, kv_heads, head_dim); slots (tokens,) int64.
This is where a token's key enters the cache.
"""

from __future__ import annotations

from typing import Any

from slipstream.ops.choose import Case, Impl


def _reference() -> Any:
    from slipstream.ops.store_kv.reference import store_kv

    return store_kv


def _torch() -> Any:
    from slipstream.ops.store_kv.torch import store_kv

    return store_kv


def _always(case: Case) -> str | None:
    return None


IMPLS = (Impl("torch", _torch, _always), Impl("reference", _reference, _always))
