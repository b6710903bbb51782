"""Head norms, rotation and the write into the cache in one kernel; it makes cos and sin itself.

A program has some heads of one token, and knows by their numbers whether they are queries, keys or values. Numbers are
rounded to the dtype of the model where the reference rounds cos, sin and what was normalised, and else only at the end.
"""

from __future__ import annotations

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
    positions, freq, factor = (None, None, 1.0) if turns is None else (turns.positions, turns.frequencies, turns.factor)
    q_weight, k_weight, eps = norms or (None, None, 0.0)
    size = triton.next_power_of_2(head_dim)
    heads = max(1, 512 // size)
    groups = triton.cdiv(all_heads, heads)
    each = groups if tokens >= MANY else 1
    if tokens:
        with torch.cuda.device_of(qkv):  # Triton launches on the current device
            _attention_input[(tokens, triton.cdiv(groups, each))](
                qkv, positions, freq, q_weight, k_weight, slots, q, keys, values, factor, eps, qkv.stride(0),
                all_heads - 2 * kv_heads, kv_heads, each, HEAD_DIM=head_dim, HALF=0 if freq is None else len(freq),
                HEADS=heads, SIZE=size, **chain(qkv.device),
            )  # fmt: skip
    return q


@triton.jit(do_not_specialize=["each"])
def _attention_input(  # type: ignore[no-untyped-def]
    qkv, positions, freq, q_weight, k_weight, slots, q, keys, values, factor, eps, stride, heads, kv_heads, each,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """`each` groups of HEADS heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)[None, :]
    slot = tl.load(slots + token)
    if positions is not None:
        partner = tl.where(at < HALF, at + HALF, at - HALF)
        if HALF % 8 == 0:  # which the compiler does not see, and would load one by one
            partner = tl.max_contiguous(tl.multiple_of(partner, [1, 8]), [1, 8])
        turned = at < 2 * HALF
        angle = tl.load(positions + token).to(tl.float32) * tl.load(freq + at % HALF, mask=turned, other=0)
        cos, sin = tl.cos(angle) * factor, tl.sin(angle) * factor
        sin = tl.where(at < HALF, -sin, sin)
        cos, sin = cos.to(q.dtype.element_ty).to(tl.float32), sin.to(q.dtype.element_ty).to(tl.float32)
    if CHAIN:
        gdc_launch_dependents()
        gdc_wait()
    for group in range(tl.program_id(1) * each, (tl.program_id(1) + 1) * each):
        head = group * HEADS + tl.arange(0, HEADS)[:, None]
        real = (head < heads + 2 * kv_heads) & (at < HEAD_DIM)
        source = qkv + token * stride + head * HEAD_DIM
        x = tl.load(source + at, mask=real, other=0)
        y = x.to(tl.float32)
        if q_weight is not None:
            root = tl.sqrt_rn(tl.sum(y * y, 1) / HEAD_DIM + eps)[:, None]
            y = _normalised(y, root, q_weight, k_weight, head < heads, at, HEAD_DIM, x.dtype)
        if positions is not None:
            z = tl.load(source + partner, mask=real & turned, other=0).to(tl.float32)
            if q_weight is not None:
                there = tl.where(turned, partner, 0)
                z = _normalised(z, root, q_weight, k_weight, head < heads, there, HEAD_DIM, x.dtype)
            y = tl.where(turned, y * cos + z * sin, y)
        y = y.to(x.dtype)
        tl.store(q + (token * heads + head) * HEAD_DIM + at, y, mask=real & (head < heads))
        k = head - heads
        tl.store(keys + (slot * kv_heads + k) * HEAD_DIM + at, y, mask=real & (k >= 0) & (k < kv_heads))
        k -= kv_heads
        tl.store(values + (slot * kv_heads + k) * HEAD_DIM + at, x, mask=real & (k >= 0))


@triton.jit
def _normalised(x, root, q_weight, k_weight, is_q, at, HEAD_DIM: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    wq = tl.load(q_weight + at, mask=at < HEAD_DIM, other=0).to(tl.float32)
    wk = tl.load(k_weight + at, mask=at < HEAD_DIM, other=0).to(tl.float32)
    return (x / root * tl.where(is_q, wq, wk)).to(dtype).to(tl.float32)
