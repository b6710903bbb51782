"""Multiply by blocks as they are (MXFP4 and GGUF's), in a C kernel; nothing is laid out again at load.

Few tokens are multiplied by the blocks directly. For many, rows of blocks are turned into numbers, a slice at a time
so that it stays in the processor's cache, and multiplied by torch. Where a token's result must have the same bits in any
batch, many are multiplied by the blocks directly too, as torch's product sums in an order of its own.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.ops.formats import Weight
from slipstream.ops.linear.slices import in_slices
from slipstream.ops.native import load

KINDS = {"mxfp4": 0, "Q4_0": 1, "Q4_1": 2, "Q8_0": 3, "Q4_K": 4, "Q5_K": 5, "Q6_K": 6}  # the numbers in formats.h
FEW = 16  # tokens up to which the blocks are multiplied directly
PIECE = 64  # tokens multiplied directly at a time, so that they stay in the processor's cache
SLICE = 1 << 21  # numbers unpacked at a time


class Blocks:
    """Activations are float32 or bfloat16; sums are float32.

    Args:
        invariant: the result for a token has the same bits in any batch.
    """

    def __init__(self, invariant: bool = False) -> None:
        library = load("blocks", strict=invariant)
        self.invariant = invariant
        size, pointer = ctypes.c_long, ctypes.c_void_p
        self._linear, self._unpack = library.slipstream_blocks_linear, library.slipstream_blocks_unpack
        self._linear.argtypes = [ctypes.c_int, *[pointer] * 5, size, size, size, ctypes.c_int, ctypes.c_int]
        self._unpack.argtypes = [ctypes.c_int, *[pointer] * 3, size, size, ctypes.c_int, ctypes.c_int]
        self._linear.restype = self._unpack.restype = None
        self._threads = torch.get_num_threads()

    def prepare(self, weight: Weight, dtype: torch.dtype) -> tuple[Tensor, ...]:
        out, width = weight.shape
        data = weight.data.contiguous().view(out, -1)
        scales = data[:, :0] if weight.scales is None else weight.scales.contiguous()
        return data, scales, torch.tensor([KINDS[weight.format], width])

    def __call__(self, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
        data, scales, (kind, width) = packed[0], packed[1], packed[2].tolist()
        tokens, rows = x.shape[0], data.shape[0]
        if tokens <= FEW or self.invariant:
            out = x.new_empty(tokens, rows)
            x = x.contiguous()
            # Room for as many float32.
            scratch = x.new_empty(min(tokens, PIECE) * (width + width // 32) * 4 // x.itemsize)
            for part, to in zip(x.split(PIECE), out.split(PIECE), strict=True):
                pointers = [t.data_ptr() for t in (data, scales, part, to, scratch)]
                self._linear(kind, *pointers, len(part), rows, width, x.dtype == torch.bfloat16, self._threads)
        else:
            if rows * width <= SLICE:
                return F.linear(x, self._numbers(data, scales, kind, width, x.dtype), bias)
            out = in_slices(x, rows, lambda p: self._numbers(data[p], scales[p], kind, width, x.dtype), SLICE)
        return out if bias is None else out.add_(bias)

    def _numbers(self, data: Tensor, scales: Tensor, kind: int, width: int, dtype: torch.dtype) -> Tensor:
        """Some rows as (rows, width) of `dtype`."""
        out = torch.empty(data.shape[0], width, dtype=dtype)
        pointers = (t.data_ptr() for t in (data, scales, out))  # the pointer of an empty tensor is NULL
        self._unpack(kind, *pointers, data.shape[0], width, dtype == torch.bfloat16, self._threads)
        return out
