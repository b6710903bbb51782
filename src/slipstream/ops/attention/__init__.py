"""Attention over the paged cache.

attention(q, keys, values, batch, group, scale=, softcap=, sinks=) -> (tokens, heads, head_dim)
  q (tokens, heads, head_dim); keys, values (num_slots, kv_heads, head_dim); sinks (heads,) or None.
The keys of this step are already in the cache. Query head h looks at key head h // (heads // kv_heads).
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

from slipstream.ops.choose import Case, Impl, only_invariant

SPLIT = 512  # keys of a decoding sequence that one program of the Triton kernel looks at, at most
PAGED = ("triton", "native")  # what copies no keys and holds no scores


def scratch_bytes(name: str, sequences: int, heads: int, head_dim: int, longest: int) -> int:
    """What an implementation holds beside its inputs in a decoding step: sums of the splits of a sequence, in float32.

    Of few sequences they are shorter and so more (ops/attention/paged.py: splits), but then of one program a processor: two MB.
    """
    most = -(-longest // SPLIT)
    return sequences * heads * most * (head_dim + 2) * 4 if name == "triton" and most > 1 else 0


def fused(entry: str, name: str) -> Any:
    """The kernel that is attention_input as well in decoding steps, if both of these implementations are ours in Triton."""
    if (entry, name) != ("triton", "triton"):
        return None
    from slipstream.ops.attention.decode import decode

    return decode


def _reference() -> Any:
    from slipstream.ops.attention.reference import attention

    return attention


def _native() -> Any:
    from slipstream.ops.attention.native import attention

    return attention


def _reject_native(case: Case) -> str | None:
    if case.device != "cpu":
        return "is compiled for CPUs"
    if case.dtype not in ("bfloat16", "float32"):
        return f"takes bfloat16 and float32, not {case.dtype}"
    if case.get("head_dim", 0) > 512:
        return f"has room for 512 numbers a head, not {case.get('head_dim')}"
    from slipstream.ops.native import missing

    return missing("attention", strict=True)


def _sdpa() -> Any:
    from slipstream.ops.attention.sdpa import attention

    return attention


def _reject_sdpa(case: Case) -> str | None:
    if case.batch_invariant:
        return "torch chooses the order of its sums by the shapes of the call"
    if case.get("softcap"):
        return "torch's scaled_dot_product_attention has no soft-capping of the scores"
    if case.get("sinks") and case.device != "cpu":
        return "attention sinks need the log-sum-exp that only torch's CPU operator returns for every dtype"
    return None


def _triton() -> Any:
    from slipstream.ops.attention.triton import attention

    return attention


def _triton_invariant() -> Any:
    return partial(_triton(), invariant=True)


def _reject_triton(case: Case) -> str | None:
    if case.batch_invariant:
        return "a query has other bits alone than in a chunk of its prompt"
    return _reject_triton_invariant(case)


def _reject_triton_invariant(case: Case) -> str | None:
    if case.device != "cuda":
        return "is for CUDA devices"
    if case.dtype not in ("bfloat16", "float32", "float16"):
        return f"takes bfloat16, float32 and float16, not {case.dtype}"
    if case.get("head_dim", 0) > 256:
        return f"takes heads of up to 256 numbers, not {case.get('head_dim')}"
    if case.capability is not None and case.capability < (8, 0):
        return f"needs compute capability 8.0, and this device has {'.'.join(map(str, case.capability))}"
    return None if find_spec("triton") else "triton is not installed: pip install triton"


def _reject_reference(case: Case) -> str | None:
    return "torch chooses the order of a product's sums by the shapes of the call" if case.batch_invariant else None


IMPLS = (
    Impl("native", _native, _reject_native),
    Impl("triton", _triton, _reject_triton),
    Impl("triton_invariant", _triton_invariant, _reject_triton_invariant, only_invariant),
    Impl("sdpa", _sdpa, _reject_sdpa),
    Impl("reference", _reference, _reject_reference),
)
