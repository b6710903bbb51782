"""RMSNorm on a GPU with one program a row, so that a row's sum is the same whatever stands beside it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.ops.chain import chain
from slipstream.ops.moe import Pairs
from slipstream.ops.moe.kernels import summed

REGISTERS = 128  # of a thread, at most, for 16 warps
EARLY = 64  # of 8 warps, which find room beside the experts' programs
ALONE = 128  # rows


def add_norm(
    x: Tensor, delta: Tensor | Pairs | None, weight: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:  # (..., width)
    rows = _rows(x)
    pairs = delta if isinstance(delta, Pairs) else None
    more = _rows(delta) if isinstance(delta, Tensor) else None
    out = torch.empty(rows.shape, dtype=dtype or x.dtype, device=x.device)
    total = None if delta is None else torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    size = triton.next_power_of_2(rows.shape[1])
    if len(rows):
        with torch.cuda.device_of(x):  # Triton launches on the current device
            _add_norm[(len(rows),)](
                rows, more, weight, total, out, rows.stride(0), 0 if more is None else more.stride(0), rows.shape[1], eps,
                *left(pairs), SIZE=size, num_warps=warps(size, pairs), maxnreg=EARLY if _early(pairs) else registers(size, pairs),
                **chain(x.device),
            )  # fmt: skip
    return x if total is None else total.view(x.shape), out.view(x.shape)


def left(pairs: Pairs | None) -> tuple[Any, ...]:
    """What a kernel is told of a sum that experts left."""
    if pairs is None:
        return None, None, None, None, 0, 0, 0
    return (
        pairs.sums, pairs.ids, pairs.weights, pairs.places, pairs.sums.shape[1], pairs.ids.shape[1], len(pairs.sums)
    )  # fmt: skip


def warps(size: int, pairs: Pairs | None) -> int:
    """Of a program for a row. One that reads what experts left has several numbers to fetch for each that it makes."""
    if _early(pairs) or not _alone(pairs):
        return min(8, max(1, size // 256))
    return min(16, max(1, size // 128))


def registers(size: int, pairs: Pairs | None) -> int | None:
    """Of a thread. Not told so, the assembler takes 64, and so waits for some of what experts left before it asks for more."""
    return REGISTERS if _alone(pairs) and size <= 4096 else None


def _alone(pairs: Pairs | None) -> bool:
    """Whether each program has a multiprocessor to itself, and nothing else to wait for than what it reads."""
    return pairs is not None and len(pairs) <= ALONE


def _early(pairs: Pairs | None) -> bool:
    """Whether it has little to read: then it counts more that it starts beside the experts, and what follows reads ahead."""
    return pairs is not None and len(pairs) == 1 and pairs.ids.shape[1] * len(pairs.sums) <= 4


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@triton.jit
def added(  # type: ignore[no-untyped-def]
    x, delta, row, at, real, x_stride, delta_stride, width, sums, ids, shares, places, num_pairs,
    TOP_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A row of x + delta, or of x and what experts left, as it goes on to the next layer: the norm is of that."""
    h = tl.load(x + row * x_stride + at, mask=real, other=0)
    if delta is not None:
        h = (h.to(tl.float32) + tl.load(delta + row * delta_stride + at, mask=real, other=0).to(tl.float32)).to(h.dtype)
    if sums is not None:
        y = summed(sums, ids, shares, places, row, at, real, width, num_pairs, TOP_K, PARTS)
        h = (h.to(tl.float32) + y.to(h.dtype).to(tl.float32)).to(h.dtype)  # elsewhere their answer is a tensor
    return h


@triton.jit(do_not_specialize=["num_pairs"])
def _add_norm(  # type: ignore[no-untyped-def]
    x, delta, weight, total, out, x_stride, delta_stride, width, eps, sums, ids, shares, places, num_pairs,
    TOP_K: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    real = at < width
    scale = tl.load(weight + at, mask=real, other=0).to(tl.float32)
    if CHAIN:
        gdc_launch_dependents()
        gdc_wait()
    h = added(
        x, delta, row, at, real, x_stride, delta_stride, width, sums, ids, shares, places, num_pairs, TOP_K, PARTS
    )
    if total is not None:
        tl.store(total + row * width + at, h, mask=real)
    h = h.to(tl.float32)
    h = h / tl.sqrt_rn(tl.sum(h * h) / width + eps)
    tl.store(out + row * width + at, (h * scale).to(out.dtype.element_ty), mask=real)
