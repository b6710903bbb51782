"""Llama, and what differs from it in a flag or two: Mistral, Qwen 2 and 3, Phi 3, SmolLM 3."""

from __future__ import annotations

from slipstream.checkpoint.rules import Weight
from slipstream.config import ModelConfig
from slipstream.layers.attention import Attention
from slipstream.layers.mlp import MLP
from slipstream.layers.norm import Norm
from slipstream.layers.ops import Ops
from slipstream.layers.transformer import Layer, Transformer

_A = "model.layers.{layer}.self_attn."
_M = "model.layers.{layer}.mlp."
EDGES = (
    Weight("embed.weight", ("model.embed_tokens.weight",), "vocab"),
    Weight("norm.weight", ("model.norm.weight",)),
    Weight("head.weight", ("lm_head.weight",), "vocab"),
)
ATTENTION = (
    Weight("layers.{layer}.attention.qkv.weight", (_A + "q_proj.weight", _A + "k_proj.weight", _A + "v_proj.weight"), "heads"),
    Weight("layers.{layer}.attention.qkv.bias", (_A + "q_proj.bias", _A + "k_proj.bias", _A + "v_proj.bias"), "heads"),
    Weight("layers.{layer}.attention.out.weight", (_A + "o_proj.weight",), "row"),
    Weight("layers.{layer}.attention.out.bias", (_A + "o_proj.bias",)),
    Weight("layers.{layer}.attention.q_norm.weight", (_A + "q_norm.weight",)),
    Weight("layers.{layer}.attention.k_norm.weight", (_A + "k_norm.weight",)),
)
NORMS = (
    Weight("layers.{layer}.before_attention.weight", ("model.layers.{layer}.input_layernorm.weight",)),
    Weight("layers.{layer}.before_mlp.weight", ("model.layers.{layer}.post_attention_layernorm.weight",)),
)
DENSE = (
    Weight("layers.{layer}.mlp.gate_up.weight", (_M + "gate_proj.weight", _M + "up_proj.weight"), "column"),
    Weight("layers.{layer}.mlp.gate_up.bias", (_M + "gate_proj.bias", _M + "up_proj.bias"), "column"),
    Weight("layers.{layer}.mlp.down.weight", (_M + "down_proj.weight",), "row"),
    Weight("layers.{layer}.mlp.down.bias", (_M + "down_proj.bias",)),
)
WEIGHTS = EDGES + ATTENTION + NORMS + DENSE


def build(ops: Ops, config: ModelConfig) -> Transformer:
    qwen2 = config.model_type == "qwen2"  # biases on queries, keys and values only

    def layer(i: int) -> Layer:
        attention = Attention(
            ops,
            config,
            i,
            qk_norm="head" if config.model_type == "qwen3" else None,
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias and not qwen2,
        )
        norms = [Norm(ops, config.hidden_size, config.rms_norm_eps) for _ in range(2)]
        mlp = MLP(ops, config, bias=config.mlp_bias)
        return Layer(attention, mlp, before_attention=norms[0], before_mlp=norms[1])

    return Transformer(ops, config, layer)
