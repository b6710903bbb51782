"""Floats on a GPU: few tokens in kernels of our own, more by cuBLAS.

For few tokens a product is as fast as its weight is read, and what counts is that reading never pauses. These kernels
start while the one before them still runs (ops/chain.py), which cuBLAS does not. Measured on an H100 in bfloat16, in us
with the norm before it (weights of 5120 x 2880 / 2880 x 4096 / 28672 x 4096 / 4096 x 14336, which take 9.8 / 7.9 / 78 / 39
to read at 3 TB/s):

| tokens | here | cuBLAS |
|---|---|---|
| 1 | 12.3 / 11.1 / 79 / 45 | 14.9 / 15.4 / 86 / 49 |
| 8 | 14.0 / 12.1 / 84 / 47 | 15.9 / 15.5 / 87 / 49 |
| 32 | 15.7 / 13.1 / 91 / 50 | 16.4 / 16.4 / 89 / 51 |

From 64 tokens on cuBLAS is faster. Fetching more of a weight ahead, into the L2, was slower: the kernels before wait
behind it for their own loads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.ops.chain import chain
from slipstream.ops.formats import Weight
from slipstream.ops.linear.torch import Dense

FEW = 32  # tokens up to which these kernels are used, if ops/tuned.py does not know better
ONE = {"BLOCK_N": 8, "BLOCK_K": 1024, "HELD": 2, "num_warps": 4, "maxnreg": 96}  # so that 5 fit on a processor
SOME = {"BLOCK_N": 32, "BLOCK_K": 256, "num_warps": 2, "num_stages": 4}  # no wgmma, so no step runs into the next


class Few(Dense):
    """The weight stays (out, in), as cuBLAS takes it. Sums are float32.

    Attributes:
        few: tokens up to which cuBLAS is slower.
    """

    few = FEW

    def prepare(self, weight: Weight, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (weight.data.to(dtype).contiguous(),)

    def wide(
        self, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        if not 0 < len(x) <= self.few:
            return super().wide(x, packed, bias, out)
        if out is None:
            out = torch.empty(len(x), len(packed[0]), dtype=torch.float32, device=x.device)
        return self.own(x, packed[0], bias, out)

    def __call__(self, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
        if 0 < len(x) <= self.few:
            return self.own(x, packed[0], bias)
        return F.linear(x, packed[0], bias)

    def own(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        """In a kernel of our own, whatever the number of tokens."""
        (tokens, width), rows = x.shape, len(weight)
        out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device) if out is None else out
        x = x if x.stride(1) == 1 else x.contiguous()
        tile = ONE if tokens == 1 else SOME
        grid: Any = (triton.cdiv(rows, tile["BLOCK_N"]),)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            if tokens == 1:
                _one[grid](x, weight, bias, out, rows, width, **tile, **chain(x.device))
            else:
                size = max(8, triton.next_power_of_2(tokens))
                _some[grid](
                    x, weight, bias, out, x.stride(0), tokens, rows, width, BLOCK_M=size, **tile, **chain(x.device)
                )
        return out


@triton.jit
def _one(  # type: ignore[no-untyped-def]
    x, weight, bias, out, num_rows, width,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HELD: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """One token by BLOCK_N rows, in pieces of BLOCK_K inputs, of which HELD are in registers before the token is there."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = tl.minimum(rows, num_rows - 1).to(tl.int64)  # the rows beyond the last repeat it, and are not stored
    weight += real[:, None] * width
    held = ()
    for i in tl.static_range(HELD):
        at = i * BLOCK_K + tl.arange(0, BLOCK_K)
        held += (tl.load(weight + at[None, :], mask=(at < width)[None, :], other=0),)  # type: ignore[assignment]
    y = tl.zeros((BLOCK_N,), tl.float32)
    if bias is not None:
        y += tl.load(bias + real).to(tl.float32)
    if CHAIN:
        gdc_wait()
        gdc_launch_dependents()  # not before: what is read far ahead is in the way of what is needed now
    total = tl.zeros((BLOCK_N, BLOCK_K // 8), tl.float32)
    for i in tl.static_range(HELD):
        total += _piece(x, held[i], i * BLOCK_K, width)
    for start in range(HELD * BLOCK_K, width, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        total += _piece(x, tl.load(weight + at[None, :], mask=(at < width)[None, :], other=0), start, width)
    y += tl.sum(total, 1)
    tl.store(out + rows, y.to(out.dtype.element_ty), mask=rows < num_rows)


@triton.jit
def _piece(x, weight, start, width):  # type: ignore[no-untyped-def]
    """Sums of 8 products: those that a thread has of a row."""
    ROWS: tl.constexpr = weight.shape[0]
    SIZE: tl.constexpr = weight.shape[1]
    at = start + tl.arange(0, SIZE)
    products = weight.to(tl.float32) * tl.load(x + at, mask=at < width, other=0).to(tl.float32)[None, :]
    return tl.sum(products.reshape(ROWS, SIZE // 8, 8), 2)


@triton.jit(do_not_specialize=["tokens"])
def _some(  # type: ignore[no-untyped-def]
    x, weight, bias, out, x_stride, tokens, num_rows, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Up to BLOCK_M tokens by BLOCK_N rows. The weights are the left side of the product: the tensor cores want 16 rows
    there, and few tokens would not fill them."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = tl.minimum(rows, num_rows - 1).to(tl.int64)
    weight += real[:, None] * width
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if bias is not None:
        total += tl.load(bias + real).to(tl.float32)[:, None]
    if CHAIN:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.arange(0, BLOCK_M)
    x += tl.minimum(token, tokens - 1).to(tl.int64)[None, :] * x_stride
    for start in range(0, width, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        w = tl.load(weight + at[None, :], mask=(at < width)[None, :], other=0)
        v = tl.load(x + at[:, None], mask=(at < width)[:, None], other=0)
        total = tl.dot(w, v, total, input_precision="ieee")
    mask = (rows < num_rows)[:, None] & (token < tokens)[None, :]
    tl.store(out + token[None, :] * num_rows + rows[:, None], total.to(out.dtype.element_ty), mask=mask)
