"""The router on a GPU: for a few tokens one kernel, which can make the residual and the norm before it as well; for more a product
in parts of the width, and a program a token that takes its best experts. From `FEW` on cuBLAS multiplies.

A step of few tokens is as fast as its kernels follow each other, about 2 us each, whatever they do. For 16 tokens and more cuBLAS
takes 6 us for a product as small as this and the choice 2 more; both are 4 us here.

In each of the three ways tiles and parts do not depend on the number of tokens, so neither do a token's bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.ops.chain import chain
from slipstream.ops.moe import Pairs
from slipstream.ops.norm.triton import REGISTERS, left
from slipstream.ops.router import Logits, fits, kernels
from slipstream.ops.router.choice import room

FEW = 512  # tokens, from which on tiles as small as these are slower than cuBLAS
TILE = {"BLOCK_M": 16, "BLOCK_K": 64}
BLOCK = 4  # experts of a program that does all


def router(
    x: Tensor,  # (tokens, hidden)
    linear: Callable[[Tensor], Tensor],
    top_k: int,
    *,
    softmax_first: bool,
    renormalize: bool = True,
    few: int | None = FEW,  # None: the product is done here for any number of tokens
    logits: Logits | None = None,  # of one token: to be left here, and nothing chosen
) -> tuple[Tensor, Tensor]:  # each (tokens, top_k)
    if logits is not None or (few is not None and fits(len(x), linear)):
        return _at_once(x, None, None, 0.0, linear, top_k, softmax_first, renormalize, logits)[2:]
    weight: Tensor | None = getattr(linear, "dense", None)
    if few is not None and len(x) > few:
        weight = None
    sums = linear(x)[None] if weight is None else _product(x, weight)
    bias = None if weight is None else linear.bias  # type: ignore[attr-defined]
    parts, tokens, experts = sums.shape
    sums = sums if sums.stride(2) == 1 else sums.contiguous()
    ids, weights = _picks(tokens, top_k, x.device)
    if tokens:
        with torch.cuda.device_of(x):  # Triton launches on the current device
            kernels.choice[(tokens,)](
                sums, bias, ids, weights, sums.stride(1), sums.stride(0), experts, top_k, ROUND=DTYPES[x.dtype],
                PARTS=parts, SOFTMAX_FIRST=softmax_first, RENORMALIZE=renormalize,
                EXPERTS=room(experts), num_warps=1, maxnreg=REGISTERS, **chain(x.device),
            )  # fmt: skip
    return ids, weights


def add_norm_router(
    x: Tensor,  # (tokens, hidden)
    delta: Tensor | Pairs | None,
    norm: Tensor,  # (hidden,)
    eps: float,
    linear: Any,
    top_k: int,
    *,
    softmax_first: bool,
    renormalize: bool = True,
    logits: Logits | None = None,  # as above
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """add_norm(x, delta, norm, eps), then router of the norm, which has the dtype of the router's weight. For what `fits`."""
    return _at_once(x, delta, norm, eps, linear, top_k, softmax_first, renormalize, logits)


def _at_once(
    x: Tensor,
    delta: Tensor | Pairs | None,
    norm: Tensor | None,
    eps: float,
    linear: Any,
    top_k: int,
    softmax_first: bool,
    renormalize: bool,
    logits: Logits | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, the norm, and what was picked; without `norm` x itself twice."""
    weight: Tensor = linear.dense
    (tokens, hidden), experts = x.shape, len(weight)
    x = x if x.stride(1) == 1 else x.contiguous()
    pairs, more = (delta, None) if isinstance(delta, Pairs) else (None, delta)
    more = more if more is None or more.stride(1) == 1 else more.contiguous()
    total = None if delta is None else torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    out = None if norm is None else torch.empty(tokens, hidden, dtype=weight.dtype, device=x.device)
    shape = tokens, experts
    values = torch.empty(shape, dtype=torch.float32, device=x.device) if logits is None else logits.values
    ids, weights = _picks(tokens, top_k, x.device)
    size = triton.next_power_of_2(hidden)
    warps = max(1, min(8 if size <= 4096 else 16, size // 256))
    if tokens:
        with torch.cuda.device_of(x):
            kernels.at_once[(tokens, triton.cdiv(experts, BLOCK))](
                x, more, norm, weight, linear.bias, total, out, values, None if logits is not None else linear.arrived,
                ids, weights, x.stride(0), 0 if more is None else more.stride(0), weight.stride(0), hidden, experts, top_k, eps,
                *left(pairs), SOFTMAX_FIRST=softmax_first, RENORMALIZE=renormalize, EXPERTS=room(experts),
                WARPS=warps, BLOCK_N=BLOCK, SIZE=size, num_warps=warps, maxnreg=REGISTERS, **chain(x.device),
            )  # fmt: skip
    return x if total is None else total, x if out is None else out, ids, weights


def _picks(tokens: int, top_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    shape = tokens, top_k
    return torch.empty(shape, dtype=torch.int32, device=device), torch.empty(shape, dtype=torch.float32, device=device)


DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """(parts, tokens, experts) float32, still to be added."""
    x = x if x.stride(1) == 1 else x.contiguous()
    (tokens, hidden), experts = x.shape, len(weight)
    steps = triton.cdiv(hidden, TILE["BLOCK_K"])
    steps_each = max(3, triton.cdiv(steps, 16))
    parts = triton.cdiv(steps, steps_each)
    out = torch.empty(parts, tokens, experts, dtype=torch.float32, device=x.device)
    if tokens:
        size = max(16, min(64, triton.next_power_of_2(experts)))
        grid = triton.cdiv(tokens, TILE["BLOCK_M"]), parts, triton.cdiv(experts, size)
        with torch.cuda.device_of(x):
            kernels.part[grid](
                x, weight, out, x.stride(0), weight.stride(0), tokens, experts, hidden, STEPS=steps_each, BLOCK_N=size,
                **TILE, **chain(x.device),
            )  # fmt: skip
    return out
