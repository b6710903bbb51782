"""Multiply by GGUF blocks as they are, in a C kernel; nothing is laid out again at load.

Few tokens are multiplied by the blocks directly. For many, rows of blocks are turned into numbers, a slice at a time
so that it stays in the processor's cache, and multiplied by torch.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.errors import KernelError
from slipstream.ops.formats import Weight
from slipstream.ops.native import build

KINDS = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 8}
FEW = 16  # tokens up to which the blocks are multiplied directly
SLICE = 1 << 21  # numbers unpacked at a time


class Blocks:
    """Activations are float32 or bfloat16; sums are float32."""

    def __init__(self) -> None:
        library = build("blocks")
        if isinstance(library, str):
            raise KernelError(f"linear[blocks]: {library}")
        size, pointer = ctypes.c_long, ctypes.c_void_p
        self._linear, self._unpack = library.slipstream_blocks_linear, library.slipstream_blocks_unpack
        self._linear.argtypes = [ctypes.c_int, *[pointer] * 4, size, size, size, ctypes.c_int, ctypes.c_int]
        self._unpack.argtypes = [ctypes.c_int, pointer, pointer, size, size, ctypes.c_int, ctypes.c_int]
        self._linear.restype = self._unpack.restype = None
        self._threads = torch.get_num_threads()

    def prepare(self, weight: Weight, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return weight.data.contiguous(), torch.tensor([KINDS[weight.format], weight.shape[1]])

    def __call__(self, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
        weight, (kind, width) = packed[0], packed[1].tolist()
        tokens, rows = x.shape[0], weight.shape[0]
        out = torch.empty(tokens, rows, dtype=x.dtype)
        if tokens <= FEW:
            x = x.contiguous()
            half = x.dtype == torch.bfloat16
            scratch = torch.empty(tokens * (width + width // 32))
            self._linear(
                kind,
                weight.data_ptr(),
                x.data_ptr(),
                out.data_ptr(),
                scratch.data_ptr(),
                tokens,
                rows,
                width,
                half,
                self._threads,
            )
        else:
            step = max(1, SLICE // width)
            if step >= rows:
                return F.linear(x, self.unpack(weight, kind, width, x.dtype), bias)
            for at in range(0, rows, step):
                out[:, at : at + step] = F.linear(x, self.unpack(weight[at : at + step], kind, width, x.dtype))
        return out if bias is None else out.add_(bias)

    def unpack(
        self, blocks: Tensor, kind: int, width: int, dtype: torch.dtype
    ) -> Tensor:  # (rows, bytes) -> (rows, width)
        out = torch.empty(blocks.shape[0], width, dtype=dtype)
        self._unpack(
            kind, blocks.data_ptr(), out.data_ptr(), blocks.shape[0], width, dtype == torch.bfloat16, self._threads
        )
        return out
