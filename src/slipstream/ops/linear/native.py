"""Floats, int8 and int4 in a C kernel whose result for a token has the same bits in any batch; nothing is laid out again.

Every sum is taken in one order, whatever the number of tokens: torch's products choose theirs by the shape. Few tokens
run as fast as memory gives the weights; many take longer than torch's.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from slipstream.ops.formats import Weight
from slipstream.ops.native import load

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.uint8: 4}  # the numbers in dense.c
HALVES = 5


class Native:
    """Activations are float32, bfloat16 or float16; sums are float32."""

    def __init__(self) -> None:
        library = load("dense", strict=True)
        self._linear = library.slipstream_dense_linear
        size, pointer = ctypes.c_long, ctypes.c_void_p
        self._linear.argtypes = [ctypes.c_int, *[pointer] * 4, *[size] * 5, ctypes.c_int]
        self._linear.restype = None
        self._halves = bool(library.slipstream_dense_has_halves())
        self._threads = torch.get_num_threads()

    def prepare(self, weight: Weight, dtype: torch.dtype) -> tuple[Tensor, ...]:
        if weight.scales is None:
            return (weight.data.to(dtype).contiguous(),)
        return weight.data.contiguous(), weight.scales.to(torch.bfloat16).contiguous()

    def __call__(self, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
        data, scales = packed if len(packed) == 2 else (packed[0], None)
        (tokens, width), rows = x.shape, len(data)
        halves = self._halves and data.dtype == torch.bfloat16
        numbers = (x if halves else x.float()).contiguous()
        out = torch.empty(tokens, rows)
        pointers = (data.data_ptr(), 0 if scales is None else scales.data_ptr(), numbers.data_ptr(), out.data_ptr())
        sizes = tokens, rows, width, data.shape[1] * data.itemsize, 0 if scales is None else scales.shape[1]
        self._linear(HALVES if halves else KINDS[data.dtype], *pointers, *sizes, self._threads)
        out = out.to(x.dtype)
        return out if bias is None else out.add_(bias)
