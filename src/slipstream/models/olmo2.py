"""OLMo 2: norms after attention and MLP instead of before, and one over all heads of the queries and of the keys."""

from __future__ import annotations

from slipstream.cache.spec import group_layers
from slipstream.checkpoint.rules import Weight
from slipstream.config import ModelConfig
from slipstream.layers.attention import Attention
from slipstream.layers.mlp import MLP
from slipstream.layers.norm import Norm
from slipstream.layers.ops import Ops
from slipstream.layers.transformer import Layer, Transformer
from slipstream.models.llama import DENSE, ENDS, PROJECTIONS, QK_NORMS

_L = "model.layers.{layer}."
NORMS = (
    Weight("norm.weight", ("model.norm.weight",)),
    Weight("layers.{layer}.after_attention.weight", (_L + "post_attention_layernorm.weight",)),
    Weight("layers.{layer}.after_mlp.weight", (_L + "post_feedforward_layernorm.weight",)),
)
WEIGHTS = ENDS + NORMS + PROJECTIONS + QK_NORMS + DENSE
cache_spec = group_layers


def build(ops: Ops, config: ModelConfig) -> Transformer:
    def layer(i: int) -> Layer:
        bias = config.attention_bias
        attention = Attention(ops, config, i, qk_norm="all", qkv_bias=bias, out_bias=bias)
        norms = [Norm(ops, config.hidden_size, config.rms_norm_eps) for _ in range(2)]
        return Layer(attention, MLP(ops, config), after_attention=norms[0], after_mlp=norms[1])

    return Transformer(ops, config, layer)
