"""Attention by a C kernel that reads keys and values in their pages: no context is copied, whatever is in the batch.

A query's result has the same bits alone and in any batch, chunk or layout of pages (ops/native/attention.c says how), for
decode and prompts alike.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from slipstream.batch import Batch, GroupBatch
from slipstream.ops.native import load


class Call(ctypes.Structure):
    """As in attention.c."""

    _fields_ = [
        ("bf16", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("q", "keys", "values", "out", "sinks")),
        *((name, ctypes.c_void_p) for name in ("pages", "first", "query_starts", "starts")),
        *((name, ctypes.c_long) for name in ("most_pages", "page_size", "heads", "kv_heads", "dim", "q_stride", "window")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    ]  # fmt: skip


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
    library = load("attention", strict=True)
    tokens, heads, head_dim = q.shape
    if q.stride()[1:] != (head_dim, 1):
        q = q.contiguous()
    keys, values = keys.contiguous(), values.contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    out = q.new_empty(tokens, heads, head_dim)
    tensors = (q, keys, values, out, sinks, *group.page_table, *batch.bounds)
    pointers = (None if t is None else t.data_ptr() for t in tensors)
    most_pages = group.page_table[0].shape[1]
    sizes = (most_pages, group.page_size, heads, keys.shape[1], head_dim, q.stride(0), group.window or 0)
    call = Call(q.dtype == torch.bfloat16, *pointers, *sizes, scale, softcap or 0)
    if library.slipstream_attention(ctypes.byref(call), len(batch.starts), torch.get_num_threads()):
        raise MemoryError("attention[native]: there is no memory for its scratch")
    return out
