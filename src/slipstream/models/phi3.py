"""Phi 3: Llama with fused projections, stored as we hold them, and a rotation of a part of each head."""

from __future__ import annotations

from slipstream.checkpoint.rules import Weight
from slipstream.models.llama import ENDS, NORMS, build, cache_spec

__all__ = ["WEIGHTS", "build", "cache_spec"]

_L = "model.layers.{layer}."
FUSED = (
    Weight("layers.{layer}.attention.qkv.weight", (_L + "self_attn.qkv_proj.weight",), "heads"),
    Weight("layers.{layer}.attention.out.weight", (_L + "self_attn.o_proj.weight",), "row"),
    Weight("layers.{layer}.mlp.gate_up.weight", (_L + "mlp.gate_up_proj.weight",), "column"),
    Weight("layers.{layer}.mlp.down.weight", (_L + "mlp.down_proj.weight",), "row"),
)
WEIGHTS = ENDS + NORMS + FUSED
