"""The router on a GPU: the product in parts of the width, then a program a token counts for each expert how many are better.

For few tokens cuBLAS takes 6 us for a product as small as this and the choice 2 more; both are 4 us here. Tiles and parts do not
depend on the number of tokens, so neither do a token's bits while there are at most `few`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.ops.chain import chain

FEW = 512  # tokens, from which on tiles as small as these are slower than cuBLAS
COUNT = 256  # experts up to which that is faster than to look for the best one top_k times
TILE = {"BLOCK_M": 16, "BLOCK_K": 64}


def router(
    x: Tensor,  # (tokens, hidden)
    linear: Callable[[Tensor], Tensor],
    top_k: int,
    *,
    softmax_first: bool,
    renormalize: bool = True,
    few: int | None = FEW,  # None: the product is done here for any number of tokens
) -> tuple[Tensor, Tensor]:  # each (tokens, top_k)
    weight: Tensor | None = getattr(linear, "dense", None)
    if few is not None and len(x) > few:
        weight = None
    sums = linear(x)[None] if weight is None else _product(x, weight)
    bias = None if weight is None else linear.bias  # type: ignore[attr-defined]
    parts, tokens, experts = sums.shape
    sums = sums if sums.stride(2) == 1 else sums.contiguous()
    size = triton.next_power_of_2(experts)
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=x.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=x.device)
    if tokens:
        with torch.cuda.device_of(x):  # Triton launches on the current device
            _router[(tokens,)](
                sums, bias, ids, weights, sums.stride(1), sums.stride(0), experts, top_k, ROUND=DTYPES[x.dtype],
                PARTS=parts, SOFTMAX_FIRST=softmax_first, RENORMALIZE=renormalize or not softmax_first,
                EXPERTS=size, TOP_K=triton.next_power_of_2(top_k), COUNT=size <= COUNT,
                num_warps=max(1, size // 32) if size <= COUNT else 1, **chain(x.device),
            )  # fmt: skip
    return ids, weights


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
            _part[grid](
                x, weight, out, x.stride(0), weight.stride(0), tokens, experts, hidden, STEPS=steps_each, BLOCK_N=size,
                **TILE, **chain(x.device),
            )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["tokens"])
def _part(  # type: ignore[no-untyped-def]
    x, weight, out, x_stride, w_stride, tokens, experts, hidden,
    STEPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    expert = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    held = ()  # the weights, before the tokens are there
    for i in tl.static_range(STEPS):
        at = (tl.program_id(1) * STEPS + i) * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = (expert < experts)[None, :] & (at < hidden)[:, None]
        held += (tl.load(weight + expert[None, :] * w_stride + at[:, None], mask=mask, other=0),)  # type: ignore[assignment]
    if CHAIN:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.static_range(STEPS):
        at = (tl.program_id(1) * STEPS + i) * BLOCK_K + tl.arange(0, BLOCK_K)
        v = tl.load(x + token * x_stride + at[None, :], mask=(token < tokens) & (at < hidden)[None, :], other=0)
        total = tl.dot(v, held[i], total, input_precision="ieee")
    at = (tl.program_id(1) * tokens + token) * experts + expert[None, :]
    tl.store(out + at, total, mask=(token < tokens) & (expert < experts)[None, :])


# What is known of a stride shapes the layout, and so the order of sums: bits are not to depend on it.
@triton.jit(do_not_specialize=["stride", "part_stride"])
def _router(  # type: ignore[no-untyped-def]
    logits, bias, ids, weights, stride, part_stride, experts, top_k, ROUND: tl.constexpr, PARTS: tl.constexpr,
    SOFTMAX_FIRST: tl.constexpr, RENORMALIZE: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, COUNT: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    if CHAIN:
        gdc_launch_dependents()
        gdc_wait()
    row, expert, slot = tl.program_id(0).to(tl.int64), tl.arange(0, EXPERTS), tl.arange(0, TOP_K)
    x = tl.load(logits + row * stride + expert, mask=expert < experts, other=float("-inf")).to(tl.float32)
    for i in tl.static_range(1, PARTS):
        x += tl.load(logits + i * part_stride + row * stride + expert, mask=expert < experts, other=0)
    if bias is not None:
        x += tl.load(bias + expert, mask=expert < experts, other=0).to(tl.float32)
    x = x.to(ROUND).to(tl.float32)
    if SOFTMAX_FIRST:
        x = tl.exp(x - tl.max(x))
        x = x / tl.sum(x)
    # One integer that orders as (number, lower expert): a float's bits order as an integer's do once those of negative ones
    # are turned; NaN stands above all, as in a sort; what is beyond the experts below all.
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(x != x, 0x7FFFFFFF, order).to(tl.int64)
    order = tl.where(expert < experts, order * 65536 + (65535 - expert), -0x7FFFFFFFFFFFFFFF)
    if COUNT:  # all at once: one look at the best after the other is a chain of reductions
        slot = tl.sum((order[None, :] > order[:, None]).to(tl.int32), 1)
        best_ids, best = expert, tl.where(slot < top_k, x, float("-inf"))
    else:
        best_ids, best = tl.zeros((TOP_K,), tl.int32), tl.full((TOP_K,), float("-inf"), tl.float32)
        for i in range(top_k):
            first = 65535 - (tl.max(order) & 65535).to(tl.int32)
            value = tl.sum(tl.where(expert == first, x, 0.0))
            best_ids, best = tl.where(slot == i, first, best_ids), tl.where(slot == i, value, best)
            order = tl.where(expert == first, -0x7FFFFFFFFFFFFFFF, order)
    if not SOFTMAX_FIRST:
        best = tl.exp(best - tl.max(best))
    else:
        best = tl.where(slot < top_k, best, 0.0)
    if RENORMALIZE:
        best = best / tl.sum(best)
    tl.store(ids + row * top_k + slot, best_ids, mask=slot < top_k)
    tl.store(weights + row * top_k + slot, best, mask=slot < top_k)
