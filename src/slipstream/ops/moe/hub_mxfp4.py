"""Experts in MXFP4 by OpenAI's Triton kernels (`matmul_ogs`), from a repository of kernels.

What is called and how is taken from transformers/integrations/mxfp4.py (Mxfp4GptOssExperts, swizzle_mxfp4, routing_torch_dist), which
runs kernels-community/gpt-oss-triton-kernels: weights are transposed and laid out by `tensor.convert_layout`; two products, the first
with the activation (`swiglu.swiglu_fn`), gate and up in turn; gather and scatter by `routing.RoutingData`, which is made here of the
experts that were picked, as the router is an op of its own. The weights stay in MXFP4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slipstream.errors import KernelError
from slipstream.ops.candidate import function
from slipstream.ops.choose import Case
from slipstream.ops.formats import Weight
from slipstream.ops.moe import ExpertsKernel
from slipstream.ops.moe.hub import alternate

PARAMETERS = (
    "x", "w", "bias", "routing_data", "gather_indx", "scatter_indx", "precision_config", "gammas", "fused_activation",
)  # fmt: skip


def adapt(module: Any, case: Case) -> ExpertsKernel:
    if case.dtype not in ("bfloat16", "float16"):
        raise KernelError(f"takes bfloat16 and float16 activations, not {case.dtype}")
    if other := sorted(f for f in case.get("formats", ()) if f != "mxfp4"):
        raise KernelError(f"takes mxfp4, and these weights are {other[0]}")
    function(module, "matmul_ogs.matmul_ogs", *PARAMETERS)
    for name in ("tensor.convert_layout", "tensor.wrap_torch_tensor", "routing.RoutingData", "swiglu.swiglu_fn"):
        function(module, name)
    kernels = _Kernels(module)
    return ExpertsKernel(kernels.experts, kernels.prepare, waits=not kernels.stays)


class _Kernels:
    """The two halves of an ExpertsKernel, by the repository's module.

    Attributes:
        stays: nothing comes to the host; without the repository's own kernel for the schedule, its torch code may do that.
    """

    def __init__(self, module: Any) -> None:
        self.module, self.ogs, self.routing = module, module.matmul_ogs, module.routing
        self.stays = hasattr(module.routing, "compute_expt_data")
        self._schedule = module.routing.compute_expt_data if self.stays else module.routing.compute_expt_data_torch

    def prepare(self, weight: Weight, dtype: torch.dtype, *, gated: bool = False) -> tuple[Any, ...]:
        assert weight.scales is not None
        number, rows, width = weight.shape
        data = alternate(weight.data.view(number, rows, width // 2), gated).contiguous().transpose(1, 2)
        scales = alternate(weight.scales.view(number, rows, width // 32), gated).contiguous().transpose(1, 2)
        tensor, layout = self.module.tensor, self.module.tensor_details.layout
        kind, options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
        packed = tensor.convert_layout(tensor.wrap_torch_tensor(data, dtype=tensor.FP4), kind, **options)
        packed.shape = torch.Size((number, width, rows))
        held = tensor.convert_layout(tensor.wrap_torch_tensor(scales), layout.StridedLayout)
        context = self.ogs.FlexCtx(rhs_data=self.ogs.InFlexData())
        return packed, self.ogs.PrecisionConfig(weight_scale=held, flex_ctx=context)

    def experts(
        self,
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
        number, ogs = gate_up.shape[0], self.ogs
        picked = ids.flatten()
        order = torch.argsort(picked, stable=True).int()  # pairs of a token and an expert, by expert
        back = torch.argsort(order).int()
        counts = torch.zeros(number, dtype=torch.int32, device=x.device)
        counts.index_add_(0, picked.long(), torch.ones_like(order))
        shares = weights.flatten()[order.long()].to(x.dtype)
        schedule = self._schedule(counts, number, picked.numel())
        routed = self.routing.RoutingData(shares, counts, number, ids.shape[1], schedule)
        gather = self.routing.GatherIndx(src_indx=order, dst_indx=back)
        scatter = self.routing.ScatterIndx(src_indx=back, dst_indx=order)
        act = ogs.FusedActivation(
            ogs.FnSpecs("swiglu", self.module.swiglu.swiglu_fn, ("alpha", "limit")), (1.702, limit), 2
        )
        (w1, first), (w2, second) = gate_up.stack, down.stack
        b1, b2 = (
            None if s.bias is None else alternate(s.bias.float(), s is gate_up).contiguous() for s in (gate_up, down)
        )
        between = ogs.matmul_ogs(
            x, w1, b1, routed, gather_indx=gather, precision_config=first, gammas=None, fused_activation=act
        )
        out: Tensor = ogs.matmul_ogs(
            between, w2, b2, routed, scatter_indx=scatter, precision_config=second, gammas=shares
        )
        return out
