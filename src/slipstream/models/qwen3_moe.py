"""Qwen 3 with a mixture of experts; `mlp_only_layers` and `decoder_sparse_step` may leave some layers dense."""

from __future__ import annotations

from slipstream.checkpoint.rules import Weight, stack_experts, stack_gate_up
from slipstream.models.llama import DENSE, ENDS, NORMS, PROJECTIONS, QK_NORMS, build, cache_spec

__all__ = ["WEIGHTS", "build", "cache_spec"]

_M = "model.layers.{layer}.mlp."
_E = _M + "experts.{expert}."
EXPERTS = (
    Weight("layers.{layer}.mlp.router.weight", (_M + "gate.weight",)),
    Weight(
        "layers.{layer}.mlp.gate_up.weight", (_E + "gate_proj.weight", _E + "up_proj.weight"), "expert", stack_gate_up
    ),
    Weight("layers.{layer}.mlp.down.weight", (_E + "down_proj.weight",), "expert", stack_experts),
)
WEIGHTS = ENDS + NORMS + PROJECTIONS + QK_NORMS + DENSE + EXPERTS
