"""Gated activations from a repository of kernels.

kernels-community/activation has `silu_and_mul(out, x)`, `gelu_and_mul(out, x)` and `gelu_tanh_and_mul(out, x)`: x (..., 2 * inner)
with the gate first, out (..., inner), which is written and returned (read from activation/torch-ext/activation/__init__.py of
github.com/huggingface/kernels-community; vLLM's operators of the same names take the same). It has none for gpt-oss. For that
a repository may offer `swiglu_clamped_and_mul(out, x, limit)`, by the same rule, as its `fatrelu_and_mul(out, x, threshold)` has it;
we know of no public one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slipstream.ops.candidate import function
from slipstream.ops.choose import Case

if TYPE_CHECKING:
    from slipstream.ops.hub import Opened

NAMES = {
    "silu": "silu_and_mul",
    "gelu": "gelu_and_mul",
    "gelu_tanh": "gelu_tanh_and_mul",
    "swiglu_clamped": "swiglu_clamped_and_mul",
}


def reject(case: Case) -> str | None:
    return None


def adapt(opened: Opened, case: Case) -> Any:
    wants = {
        kind: ("out", "x", "limit") if kind == "swiglu_clamped" else ("out", "x")
        for kind in case.get("kinds", ("silu",))
    }
    kernels = {kind: function(opened.module, NAMES[kind], *names) for kind, names in wants.items()}

    def activation(gate_up: Tensor, kind: str, limit: float = 7.0, dtype: torch.dtype | None = None) -> Tensor:
        gate_up = gate_up.to(dtype or gate_up.dtype)  # it has one dtype for both
        *outer, width = gate_up.shape
        out = torch.empty(*outer, width // 2, dtype=gate_up.dtype, device=gate_up.device)
        numbers = (limit,) if kind == "swiglu_clamped" else ()
        kernels[kind](out, gate_up.contiguous(), *numbers)
        return out

    return activation
