"""Mixtral: Mistral with a mixture of experts, which the Hub stores matrix by matrix: w1 (gate), w3 (up), w2 (down)."""

from __future__ import annotations

from slipstream.checkpoint.rules import Weight, stack_experts, stack_gate_up
from slipstream.models.llama import ENDS, NORMS, PROJECTIONS, build, cache_spec

__all__ = ["WEIGHTS", "build", "cache_spec"]

_M = "model.layers.{layer}.block_sparse_moe."
_E = _M + "experts.{expert}."
EXPERTS = (
    Weight("layers.{layer}.mlp.router.weight", (_M + "gate.weight",)),
    Weight("layers.{layer}.mlp.gate_up.weight", (_E + "w1.weight", _E + "w3.weight"), "expert", stack_gate_up),
    Weight("layers.{layer}.mlp.down.weight", (_E + "w2.weight",), "expert", stack_experts),
)
WEIGHTS = ENDS + NORMS + PROJECTIONS + EXPERTS
