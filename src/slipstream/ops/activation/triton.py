"""Gated activations on a GPU: one kernel, in float32, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from slipstream.ops.chain import chain

BLOCK = 512


def activation(gate_up: Tensor, kind: str, limit: float = 7.0, dtype: torch.dtype | None = None) -> Tensor:
    if kind not in ("silu", "gelu", "gelu_tanh", "swiglu_clamped"):
        raise ValueError(f"no activation is called {kind!r}")
    *outer, width = gate_up.shape
    x, inner = gate_up.reshape(-1, width), width // 2
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(*outer, inner, dtype=dtype or x.dtype, device=x.device)
    if out.numel():
        with torch.cuda.device_of(x):  # Triton launches on the current device
            _gate[(len(x), triton.cdiv(inner, BLOCK))](
                x, out, x.stride(0), inner, limit, KIND=kind, BLOCK=BLOCK, **chain(x.device)
            )
    return out


@triton.jit
def _gate(  # type: ignore[no-untyped-def]
    x, out, stride, inner, limit, KIND: tl.constexpr, BLOCK: tl.constexpr, CHAIN: tl.constexpr
):
    if CHAIN:
        gdc_launch_dependents()
        gdc_wait()
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + row * stride + at, mask=at < inner).to(tl.float32)
    up = tl.load(x + row * stride + inner + at, mask=at < inner).to(tl.float32)
    if KIND == "swiglu_clamped":  # comparisons, as minimum and maximum would drop a NaN
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        gate, up = gate * tl.sigmoid(1.702 * gate), up + 1
    elif KIND == "gelu":
        gate *= 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
    elif KIND == "gelu_tanh":  # (1 + tanh(a)) / 2 is sigmoid(2 a)
        gate *= tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        gate *= tl.sigmoid(gate)
    tl.store(out + row * inner + at, (gate * up).to(out.dtype.element_ty), mask=at < inner)
