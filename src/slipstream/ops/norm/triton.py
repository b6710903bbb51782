"""RMSNorm on a GPU with one program a row, so that a row's sum is the same whatever stands beside it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.ops.chain import chain


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # (..., width)
    rows, more = _rows(x), None if delta is None else _rows(delta)
    out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    total = None if more is None else torch.empty_like(out)
    size = triton.next_power_of_2(rows.shape[1])
    if len(rows):
        with torch.cuda.device_of(x):  # Triton launches on the current device
            _add_norm[(len(rows),)](
                rows, more, weight, total, out, rows.stride(0), 0 if more is None else more.stride(0), rows.shape[1], eps,
                SIZE=size, num_warps=min(8, max(1, size // 256)), **chain(x.device),
            )  # fmt: skip
    return x if total is None else total.view(x.shape), out.view(x.shape)


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@triton.jit
def _add_norm(  # type: ignore[no-untyped-def]
    x, delta, weight, total, out, x_stride, delta_stride, width, eps, SIZE: tl.constexpr, CHAIN: tl.constexpr
):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    real = at < width
    scale = tl.load(weight + at, mask=real, other=0).to(tl.float32)
    if CHAIN:
        gdc_launch_dependents()
        gdc_wait()
    h = tl.load(x + row * x_stride + at, mask=real, other=0).to(tl.float32)
    if delta is not None:
        h += tl.load(delta + row * delta_stride + at, mask=real, other=0).to(tl.float32)
        h = h.to(total.dtype.element_ty)  # the norm is of the sum as it goes on to the next layer
        tl.store(total + row * width + at, h, mask=real)
        h = h.to(tl.float32)
    h = h / tl.sqrt_rn(tl.sum(h * h) / width + eps)
    tl.store(out + row * width + at, (h * scale).to(out.dtype.element_ty), mask=real)
