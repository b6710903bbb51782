"""Head norms, rotation and the write into the cache in one kernel; it makes cos and sin itself.

A program has some heads of one token, and knows by their numbers whether they are queries, keys or values. Numbers are
rounded to the dtype of the model where the reference rounds cos, sin and what was normalised, and else only at the end.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.ops.chain import chain
from slipstream.ops.rope import Turns

MANY = 256  # tokens from which on a program has all heads of one: their cos and sin are the same


def attention_input(
    qkv: Tensor,  # (tokens, heads + 2 * kv_heads, head_dim)
    turns: Turns | None,
    norms: tuple[Tensor, Tensor, float] | None,
    keys: Tensor,  # (num_slots, kv_heads, head_dim)
    values: Tensor,
    slots: Tensor,  # (tokens,) int64
) -> Tensor:  # (tokens, heads, head_dim)
    tokens, all_heads, head_dim = qkv.shape
    kv_heads = keys.shape[1]
    qkv = qkv if qkv.stride(2) == 1 and qkv.stride(1) == head_dim else qkv.contiguous()
    q = torch.empty(tokens, all_heads - 2 * kv_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    size = triton.next_power_of_2(head_dim)
    heads = max(1, 512 // size)
    groups = triton.cdiv(all_heads, heads)
    each = groups if tokens >= MANY else 1
    if tokens:
        with torch.cuda.device_of(qkv):  # Triton launches on the current device
            _attention_input[(tokens, triton.cdiv(groups, each))](
                qkv, slots, q, keys, values, *arguments(turns, norms), qkv.stride(0), all_heads - 2 * kv_heads, kv_heads, each,
                HEAD_DIM=head_dim, HEADS=heads, SIZE=size, **chain(qkv.device),
            )  # fmt: skip
    return q


def arguments(turns: Turns | None, norms: tuple[Tensor, Tensor, float] | None) -> tuple[Any, ...]:
    """positions, freq, q_weight, k_weight, factor, eps and HALF of a kernel."""
    positions, freq, factor = (None, None, 1.0) if turns is None else (turns.positions, turns.frequencies, turns.factor)
    q_weight, k_weight, eps = norms or (None, None, 0.0)
    return positions, freq, q_weight, k_weight, factor, eps, 0 if freq is None else len(freq)


@triton.jit(do_not_specialize=["each"])
def _attention_input(  # type: ignore[no-untyped-def]
    qkv, slots, q, keys, values, positions, freq, q_weight, k_weight, factor, eps, HALF: tl.constexpr,
    stride, heads, kv_heads, each, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """`each` groups of HEADS heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)[None, :]
    slot = tl.load(slots + token)
    cos, sin, partner = angles(positions, freq, token, factor, HALF, HEADS, SIZE, q.dtype.element_ty)
    wq, wq_there = (None, None) if q_weight is None else weights(q_weight, at, partner, HALF, HEAD_DIM)
    wk, wk_there = (None, None) if k_weight is None else weights(k_weight, at, partner, HALF, HEAD_DIM)
    if CHAIN:
        gdc_launch_dependents()
        gdc_wait()
    for group in range(tl.program_id(1) * each, (tl.program_id(1) + 1) * each):
        head = group * HEADS + tl.arange(0, HEADS)[:, None]
        real = (head < heads + 2 * kv_heads) & (at < HEAD_DIM)
        x, z = fetch(qkv + token * stride + head * HEAD_DIM, at, partner, real, HALF)
        weight = None if q_weight is None else tl.where(head < heads, wq, wk)
        there = None if q_weight is None else tl.where(head < heads, wq_there, wk_there)
        y = enter(x, z, weight, there, eps, cos, sin, at, HALF, HEAD_DIM)
        tl.store(q + (token * heads + head) * HEAD_DIM + at, y, mask=real & (head < heads))
        k = head - heads
        tl.store(keys + (slot * kv_heads + k) * HEAD_DIM + at, y, mask=real & (k >= 0) & (k < kv_heads))
        k -= kv_heads
        tl.store(values + (slot * kv_heads + k) * HEAD_DIM + at, x, mask=real & (k >= 0))


@triton.jit
def angles(  # type: ignore[no-untyped-def]
    positions, freq, token, factor, HALF: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, dtype: tl.constexpr
):
    """cos and sin of the first 2 * HALF numbers of a head, and which number each is turned with, for HEADS heads: so nothing
    moves between threads when the heads are there."""
    at = tl.arange(0, SIZE)[None, :]
    cos, sin, partner = at, at, at
    if HALF > 0:
        partner = tl.where(at < HALF, at + HALF, at - HALF)
        if HALF % 8 == 0:  # which the compiler does not see, and would load one by one
            partner = tl.max_contiguous(tl.multiple_of(partner, [1, 8]), [1, 8])
        angle = tl.load(positions + token).to(tl.float32) * tl.load(freq + at % HALF, mask=at < 2 * HALF, other=0)
        cos, sin = tl.cos(angle) * factor, tl.sin(angle) * factor
        sin = tl.where(at < HALF, -sin, sin)
        cos, sin = cos.to(dtype).to(tl.float32), sin.to(dtype).to(tl.float32)
    return (
        tl.broadcast_to(cos, (HEADS, SIZE)),
        tl.broadcast_to(sin, (HEADS, SIZE)),
        tl.broadcast_to(partner, (HEADS, SIZE)),
    )


@triton.jit
def weights(weight, at, partner, HALF: tl.constexpr, HEAD_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Those of a norm, and of what each number is turned with."""
    at = tl.broadcast_to(at, partner.shape)
    there = tl.load(weight + partner, mask=at < 2 * HALF, other=0)
    return tl.load(weight + at, mask=at < HEAD_DIM, other=0).to(tl.float32), there.to(tl.float32)


@triton.jit
def fetch(source, at, partner, real, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Heads as the product gave them, and for each number that with which it is turned."""
    x = tl.load(source + at, mask=real, other=0)
    z = x
    if HALF > 0:
        z = tl.load(source + partner, mask=real & (at < 2 * HALF), other=0)
    return x, z


@triton.jit
def enter(x, z, weight, there, eps, cos, sin, at, HALF: tl.constexpr, HEAD_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """What was fetched, normalised and turned."""
    y, z = x.to(tl.float32), z.to(tl.float32)
    if weight is not None:
        root = tl.sqrt_rn(tl.sum(y * y, 1) / HEAD_DIM + eps)[:, None]
        y, z = (y / root * weight).to(x.dtype).to(tl.float32), (z / root * there).to(x.dtype).to(tl.float32)
    if HALF > 0:
        y = tl.where(at < 2 * HALF, y * cos + z * sin, y)
    return y.to(x.dtype)
