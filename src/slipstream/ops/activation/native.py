"""Gated activations in C, whose results depend on no other number of the call.

torch computes the last numbers of a tensor, and of each thread's share of it, by other code than the rest, and the last
bit of an exponential may differ between the two.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from slipstream.ops.native import load

KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "swiglu_clamped": 3}  # the numbers in activation.c


def activation(gate_up: Tensor, kind: str, limit: float = 7.0, dtype: torch.dtype | None = None) -> Tensor:
    if kind not in KINDS:
        raise ValueError(f"no activation is called {kind!r}")
    x = gate_up.float().contiguous()
    *outer, width = x.shape
    out = torch.empty(*outer, width // 2)
    pointers = x.data_ptr(), out.data_ptr()
    _function()(KINDS[kind], *pointers, out.numel() // (width // 2), width // 2, limit, torch.get_num_threads())
    return out.to(dtype or gate_up.dtype)


@cache
def _function() -> Any:
    found, size, pointer = load("activation", strict=True).slipstream_activation, ctypes.c_long, ctypes.c_void_p
    found.argtypes = [ctypes.c_int, pointer, pointer, size, size, ctypes.c_float, ctypes.c_int]
    found.restype = None
    return found
