"""The Triton kernels of a router: all of it at once for few tokens; for more, the product in parts of the width, and the choice.

`at_once` has a program for each token and a few experts, and the last one of a token to come chooses. That it sees what the others
stored follows from the memory model of PTX: their stores, a barrier of the program, one thread's atomic add that releases what
stands before it to the whole card, the last program's that acquires it, a barrier again, its loads. Who comes last is left to
chance, what it does is not: it reads all logits and adds nothing up. Of one token the experts' kernels choose, where they can, and
what takes 2 us here goes: then nobody counts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.ops.norm.triton import added
from slipstream.ops.router.choice import best, numbers, store


@triton.jit(do_not_specialize=["experts", "num_pairs"])
def at_once(  # type: ignore[no-untyped-def]
    x, delta, scale, weight, bias, total, out, logits, arrived, ids, weights, x_stride, delta_stride, w_stride, width, experts,
    top_k, eps, sums, left_ids, shares, places, num_pairs, LEFT_K: tl.constexpr, PARTS: tl.constexpr,
    SOFTMAX_FIRST: tl.constexpr, RENORMALIZE: tl.constexpr, EXPERTS: tl.constexpr, WARPS: tl.constexpr,
    BLOCK_N: tl.constexpr, SIZE: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """x + delta, its norm, the product and the choice; without a `scale` x is normalised already. Every program of a token makes
    the sum and the norm for itself, as that is faster than to wait for another's. arrived (tokens) is zero before and after; without
    it nobody chooses here."""
    token, at = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    inside = at < width
    expert = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (expert < experts)[:, None] & inside[None, :]
    held = tl.load(weight + expert[:, None] * w_stride + at[None, :], mask=mask, other=0)
    if scale is not None:
        factors = tl.load(scale + at, mask=inside, other=0).to(tl.float32)
    if bias is not None:
        more = tl.load(bias + expert, mask=expert < experts, other=0).to(tl.float32)
    if CHAIN:
        gdc_launch_dependents()
        gdc_wait()
    h = added(
        x, delta, token, at, inside, x_stride, delta_stride, width, sums, left_ids, shares, places, num_pairs, LEFT_K, PARTS
    )  # fmt: skip
    if scale is not None:
        first = inside & (tl.program_id(1) == 0)
        if total is not None:
            tl.store(total + token * width + at, h, mask=first)
        h = h.to(tl.float32)
        h = (h / tl.sqrt_rn(tl.sum(h * h) / width + eps) * factors).to(out.dtype.element_ty)
        tl.store(out + token * width + at, h, mask=first)
    y = tl.sum(held.to(tl.float32) * h.to(tl.float32)[None, :], 1)
    if bias is not None:
        y += more
    tl.store(logits + token * experts + expert, y, mask=expert < experts)
    if arrived is not None:
        tl.debug_barrier()
        if tl.atomic_add(arrived + token, 1, sem="acq_rel", scope="gpu") == tl.num_programs(1) - 1:
            tl.store(arrived + token, 0)
            number = numbers(WARPS, EXPERTS)
            all = tl.load(
                logits + token * experts + number, number < experts, other=float("-inf"), cache_modifier=".cg"
            )
            all = all.to(weight.dtype.element_ty).to(tl.float32)
            all, order, _ = best(all, number, experts, top_k, SOFTMAX_FIRST)
            store(all, order, number, token, ids, weights, top_k, SOFTMAX_FIRST, RENORMALIZE)


@triton.jit(do_not_specialize=["tokens"])
def part(  # type: ignore[no-untyped-def]
    x, weight, out, x_stride, w_stride, tokens, experts, hidden,
    STEPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    """Logits of a part of the width, out (parts, tokens, experts)."""
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


@triton.jit(do_not_specialize=["experts", "stride", "part_stride"])
def choice(  # type: ignore[no-untyped-def]
    logits, bias, ids, weights, stride, part_stride, experts, top_k, ROUND: tl.constexpr, PARTS: tl.constexpr,
    SOFTMAX_FIRST: tl.constexpr, RENORMALIZE: tl.constexpr, EXPERTS: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """A token's experts, once the parts of its logits are added."""
    if CHAIN:
        gdc_launch_dependents()
        gdc_wait()
    row, expert = tl.program_id(0).to(tl.int64), numbers(1, EXPERTS)
    x = tl.load(logits + row * stride + expert, mask=expert < experts, other=float("-inf")).to(tl.float32)
    for i in tl.static_range(1, PARTS):
        x += tl.load(logits + i * part_stride + row * stride + expert, mask=expert < experts, other=0)
    if bias is not None:
        x += tl.load(bias + expert, mask=expert < experts, other=0).to(tl.float32)
    x, order, _ = best(x.to(ROUND).to(tl.float32), expert, experts, top_k, SOFTMAX_FIRST)
    store(x, order, expert, row, ids, weights, top_k, SOFTMAX_FIRST, RENORMALIZE)
