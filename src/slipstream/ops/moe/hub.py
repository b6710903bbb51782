"""A mixture of experts from a repository of kernels: MegaBlocks for dense weights, OpenAI's Triton kernels for MXFP4 (hub_mxfp4.py).

`layers.forward_once(x, expert_weights, top_experts, w1, w2, w1_bias, w2_bias, ...)` of kernels-community/megablocks is what its
layer MegaBlocksMoeMLP calls after the router (read from megablocks/torch-ext/megablocks/layers.py of
github.com/huggingface/kernels-community): x (tokens, 1, hidden); w1 (experts, hidden, 2 * inner) with gate and up in turn; it
computes gpt-oss's activation, with limit 7 always. With moe_capacity_factor=0 no token is dropped, for which it asks the device
how many each expert has: no CUDA graphs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slipstream.errors import KernelError
from slipstream.ops.candidate import function
from slipstream.ops.choose import Case
from slipstream.ops.formats import Weight
from slipstream.ops.moe import ExpertsKernel

if TYPE_CHECKING:
    from slipstream.ops.hub import Opened

PARAMETERS = (
    "x", "expert_weights", "top_experts", "w1", "w2", "w1_bias", "w2_bias", "alpha", "sort_end_bit", "top_k", "num_experts",
    "moe_capacity_factor",
)  # fmt: skip


def reject(case: Case) -> str | None:
    if other := [kind for kind in case.get("kinds", ()) if kind != "swiglu_clamped"]:
        return f"computes gpt-oss's swiglu_clamped, not {other[0]}"
    if case.get("limit", 7.0) != 7.0:
        return f"clamps at 7, not at {case.get('limit')}"
    return "has all experts on each rank" if case.get("spread") else None


def adapt(opened: Opened, case: Case) -> ExpertsKernel:
    if hasattr(opened.module, "matmul_ogs"):
        from slipstream.ops.moe.hub_mxfp4 import adapt as adapt_mxfp4

        return adapt_mxfp4(opened.module, case)
    forward_once = function(opened.module, "layers.forward_once", *PARAMETERS)
    if packed := sorted(f for f in case.get("formats", ()) if f != "dense"):
        raise KernelError(f"takes dense weights, and these are {packed[0]}; quantization='dequantize' would widen them")

    def experts(
        x: Tensor,  # (tokens, hidden)
        ids: Tensor,  # (tokens, top_k)
        weights: Tensor,
        gate_up: Any,
        down: Any,
        activation: object,
        *,
        kind: str,
        limit: float = 7.0,
    ) -> Tensor:
        (w1,), (w2,) = gate_up.stack, down.stack
        number = len(w1)
        out, _ = forward_once(
            x=x.contiguous()[:, None], expert_weights=weights.to(x.dtype), top_experts=ids, w1=w1, w2=w2,
            w1_bias=in_turn(gate_up.bias, w1, 2).to(x.dtype), w2_bias=in_turn(down.bias, w2, 1).to(x.dtype), alpha=1.702,
            sort_end_bit=max(1, (number - 1).bit_length()), top_k=ids.shape[1], num_experts=number, moe_capacity_factor=0.0,
        )  # fmt: skip
        found: Tensor = out
        return found.view(x.shape)

    return ExpertsKernel(experts, prepare, waits=True)


def prepare(weight: Weight, dtype: torch.dtype, *, gated: bool = False) -> tuple[Tensor, ...]:
    """(experts, out, in) -> (experts, in, out), of a gated stack with gate and up in turn."""
    return (alternate(weight.data.to(dtype), gated).transpose(1, 2).contiguous(),)


def alternate(rows: Tensor, gated: bool) -> Tensor:
    """(experts, gate rows and then up rows, ...) -> a row of the gate and one of up in turn."""
    return rows.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2) if gated else rows


def in_turn(bias: Tensor | None, weight: Tensor, parts: int) -> Tensor:  # (experts, out) or None; (experts, in, out)
    """The bias as the weight has its rows, and zeros where there is none."""
    if bias is None:
        return weight.new_zeros(weight.shape[0], weight.shape[2])
    return alternate(bias, parts == 2)
