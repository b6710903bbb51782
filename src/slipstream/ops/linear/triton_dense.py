"""Floats on a GPU in tiles of one shape: a token's result has the same bits whatever the number of tokens.

Every sum runs over the width from left to right in steps of BLOCK_K, in one program. Steps of float32 are products of
float32 (no TF32).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.ops.formats import Weight
from slipstream.ops.linear.triton import STAGES

# Rows are the left side of the product: the tensor cores want 64 there, and a few tokens would not fill them.
TILE = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": STAGES}


class TritonDense:
    """Activations and weights are of one dtype: float32, bfloat16 or float16; sums are float32."""

    def prepare(self, weight: Weight, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (weight.data.to(dtype).contiguous(),)

    def wide(
        self, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        if out is None:
            out = torch.empty(len(x), len(packed[0]), dtype=torch.float32, device=x.device)
        return self(x, packed, bias, out)

    def __call__(self, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        (tokens, width), rows = x.shape, len(packed[0])
        x = x.contiguous()
        if out is None:
            out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
        if tokens:
            grid: Any = triton.cdiv(rows, TILE["BLOCK_N"]) * triton.cdiv(tokens, TILE["BLOCK_M"])
            with torch.cuda.device_of(x):  # Triton launches on the current device
                _dense[(grid,)](x, packed[0], bias, out, tokens, rows, width, **TILE)
        return out


@triton.jit(do_not_specialize=["tokens"])
def _dense(  # type: ignore[no-untyped-def]
    x, weight, bias, out, tokens, num_rows, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M tokens by BLOCK_N rows. Programs that run together share their rows of the weight."""
    tiles = tl.cdiv(tokens, BLOCK_M)
    token = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    x += tl.minimum(token, tokens - 1).to(tl.int64)[None, :] * width
    weight += tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None] * width
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, width, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        w = tl.load(weight + at[None, :], mask=(at < width)[None, :], other=0)
        v = tl.load(x + at[:, None], mask=(at < width)[:, None], other=0)
        total = tl.dot(w, v, total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + tl.minimum(rows, num_rows - 1)).to(tl.float32)[:, None]
    mask = (rows < num_rows)[:, None] & (token < tokens)[None, :]
    at = token.to(tl.int64)[None, :] * num_rows + rows[:, None]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)
