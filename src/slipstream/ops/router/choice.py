"""How a token's experts are chosen from its logits, for any kernel that does it: a router's, or that of the experts themselves.

The same numbers are added in the same order in each of them, so all have the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


def room(experts: int) -> int:
    """EXPERTS of the kernels."""
    return max(32, triton.next_power_of_2(experts))


@triton.jit
def numbers(WARPS: tl.constexpr, EXPERTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of experts, (32, WARPS, EXPERTS / 32). In this shape Triton gives each warp all of them, so that none waits for another, as
    long as it does not know of rows that they begin at a multiple of anything."""
    number = tl.arange(0, 32)[:, None, None] + 32 * tl.arange(0, EXPERTS // 32)[None, None, :]
    return tl.broadcast_to(number, (32, WARPS, EXPERTS // 32))


@triton.jit
def _max(x):  # type: ignore[no-untyped-def]
    return tl.max(tl.max(x, 2), 0)[None, :, None]


@triton.jit
def _sum(x):  # type: ignore[no-untyped-def]
    return tl.sum(tl.sum(x, 2), 0)[None, :, None]


@triton.jit
def best(x, number, experts, count, SOFTMAX_FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
    """The `count` best of a row's logits x, by the `number` of experts, -inf beyond them.

    Returns:
        x, or the probabilities; `order`, -0x7FFFFFFF for the first that was taken, one more for the next; the number of the last.
    """
    if SOFTMAX_FIRST:
        x = tl.exp(x - _max(x))
        x = x / _sum(x)
    # A float's bits order as an integer's do once those of negative ones are turned; NaN stands above all, as in a sort. Below
    # -inf there is room: for what is beyond the experts, and above that for those that were taken, by when.
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(x != x, 0x7FFFFFFF, order)
    order = tl.where(number < experts, order, -0x80000000)
    last = tl.zeros((1, x.shape[1], 1), tl.int32)
    for i in range(count):
        highest = order == _max(order)
        last = -_max(tl.where(highest, -number, -experts))  # of equal ones the first
        order = tl.where(number == last, i - 0x7FFFFFFF, order)
    return x, order, last


@triton.jit
def store(  # type: ignore[no-untyped-def]
    x, order, number, row, ids, weights, top_k, SOFTMAX_FIRST: tl.constexpr, RENORMALIZE: tl.constexpr
):
    """A row's experts and their shares, of what `best` gave for top_k."""
    taken = (order > -0x80000000) & (order < top_k - 0x7FFFFFFF)
    if SOFTMAX_FIRST:
        x = tl.where(taken, x, 0.0)
    else:
        x = tl.where(taken, x, float("-inf"))
        x = tl.exp(x - _max(x))
    if RENORMALIZE or not SOFTMAX_FIRST:
        x = x / _sum(x)
    taken &= tl.arange(0, x.shape[1])[None, :, None] == 0
    at = row * top_k + order + 0x7FFFFFFF
    tl.store(ids + at, number, mask=taken)
    tl.store(weights + at, x, mask=taken)


@triton.jit
def picked(  # type: ignore[no-untyped-def]
    logits, ids, weights, experts, LAST: tl.constexpr, ROUND: tl.constexpr, SOFTMAX_FIRST: tl.constexpr,
    RENORMALIZE: tl.constexpr, EXPERTS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """The expert of the only token for this program, of a grid (any, top_k, any) of the experts' kernels. Triton must not know of the
    logits that they begin at a multiple of anything.

    The LAST product stores all of them and their shares, and reads logits, before it waits. It may, as ops/chain.py says: when it
    starts, all programs of the first product have waited, so what is earlier has ended; and that product does not touch ids and
    shares. PTX itself promises such an order only behind a wait.
    """
    slot, top_k, number = tl.program_id(1), tl.num_programs(1), numbers(WARPS, EXPERTS)
    # From the L2: those of the layer before stood at the same address.
    x = tl.load(logits + number, number < experts, other=float("-inf"), cache_modifier=".cg")
    x, order, last = best(x.to(ROUND).to(tl.float32), number, experts, slot + 1, SOFTMAX_FIRST)
    if LAST and (slot == top_k - 1) & (tl.program_id(0) == 0) & (tl.program_id(2) == 0):
        store(x, order, number, 0, ids, weights, top_k, SOFTMAX_FIRST, RENORMALIZE)
    return tl.max(last)
