"""Attention over the paged cache by FlashAttention 3, from a repository of kernels.

Two public functions look into pages, and either will do:

- `flash_attn_with_kvcache(q, k_cache, v_cache, ..., cache_seqlens, ..., page_table, cu_seqlens_q, ..., max_seqlen_q, ...,
  softmax_scale, causal, window_size, softcap, ..., s_aux)`: read from vllm-flash-attn3 and flash-attn3 (the latter without s_aux) of
  github.com/huggingface/kernels-community. Its own `flash_attn_varlen_func` takes no pages.
- `flash_attn_varlen_func(q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, ..., seqused_k, ..., softmax_scale, causal, window_size,
  softcap, ..., block_table, ..., s_aux)`: as in vLLM's own package.

Both align the causal mask to the end of the keys, so a table that begins with a later page (those before it have left a window)
only means that there are fewer keys. A window is (visible keys - 1, 0). s_aux are the sinks, (heads,), in the queries' dtype, as
transformers/integrations/flash_attention.py gives them. Everything stays on the device, so a CUDA graph can hold it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import Tensor

from slipstream.batch import Batch, GroupBatch
from slipstream.errors import KernelError
from slipstream.ops.candidate import function
from slipstream.ops.choose import Case

if TYPE_CHECKING:
    from slipstream.ops.hub import Opened

SHARED = ("cu_seqlens_q", "max_seqlen_q", "softmax_scale", "causal", "window_size", "softcap")


def reject(case: Case) -> str | None:
    if case.dtype not in ("bfloat16", "float16"):
        return f"takes bfloat16 and float16, not {case.dtype}"
    if case.get("head_dim", 8) > 256 or case.get("head_dim", 8) % 8:
        return f"takes heads of up to 256 numbers, in multiples of 8, not {case.get('head_dim')}"
    if case.capability is not None and case.capability < (8, 0):
        return f"needs compute capability 8.0, and this device has {'.'.join(map(str, case.capability))}"
    return None


def adapt(opened: Opened, case: Case) -> Any:
    sinks = ("s_aux",) if case.get("sinks") else ()
    if hasattr(opened.module, "flash_attn_with_kvcache"):
        pages = ("k_cache", "v_cache", "cache_seqlens", "page_table")
        return _Attention(function(opened.module, "flash_attn_with_kvcache", *SHARED, *pages, *sinks), cached=True)
    if not hasattr(opened.module, "flash_attn_varlen_func"):
        raise KernelError(
            "has neither flash_attn_with_kvcache nor flash_attn_varlen_func, so it is not attention over pages"
        )
    found = function(
        opened.module, "flash_attn_varlen_func", *SHARED, "k", "v", "max_seqlen_k", "seqused_k", "block_table", *sinks
    )
    return _Attention(found, cached=False)


class _Attention:
    """The op, by one of the two functions."""

    def __init__(self, fn: Any, *, cached: bool) -> None:
        self.fn, self.cached = fn, cached

    def __call__(
        self,
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
        size, (rows, starts), (table, first_pages) = group.page_size, batch.bounds, group.page_table
        lengths = starts + (rows[1:] - rows[:-1]) - first_pages * size  # keys from the first page of the table on
        keys, values = (t.unflatten(0, (-1, size)) for t in (keys, values))  # (pages, page_size, kv_heads, head_dim)
        options: dict[str, Any] = {
            "cu_seqlens_q": rows, "softmax_scale": scale, "causal": True, "softcap": softcap or 0.0,
            "max_seqlen_q": 1 if batch.decode_only else max(b - a for a, b in pairwise(batch.query_starts)),
            "window_size": (-1, -1) if group.window is None else (group.window - 1, 0),
        }  # fmt: skip
        if sinks is not None:
            options["s_aux"] = sinks.to(q.dtype)
        if self.cached:
            out = self.fn(q=q, k_cache=keys, v_cache=values, cache_seqlens=lengths, page_table=table, **options)
        else:
            longest = table.shape[1] * size
            out = self.fn(q=q, k=keys, v=values, max_seqlen_k=longest, seqused_k=lengths, block_table=table, **options)
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found
