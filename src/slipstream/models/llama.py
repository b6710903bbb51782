"""Llama, and what differs from it in a flag or two: Mistral, Qwen 2 and 3, SmolLM 3.

Their mixtures of experts (Mixtral, Qwen 3 MoE) and Phi 3 share `build` and have a table of names of their own.
"""

from __future__ import annotations

from slipstream.cache.spec import group_layers
from slipstream.checkpoint.rules import Weight
from slipstream.config import ModelConfig
from slipstream.layers.attention import Attention
from slipstream.layers.mlp import MLP, MoE
from slipstream.layers.norm import Norm
from slipstream.layers.ops import Ops
from slipstream.layers.transformer import Layer, Transformer

_A = "model.layers.{layer}.self_attn."
_M = "model.layers.{layer}.mlp."
ENDS = (
    Weight("embed.weight", ("model.embed_tokens.weight",), "vocab"),
    Weight("head.weight", ("lm_head.weight",), "vocab"),
)
NORMS = (
    Weight("norm.weight", ("model.norm.weight",)),
    Weight("layers.{layer}.before_attention.weight", ("model.layers.{layer}.input_layernorm.weight",)),
    Weight("layers.{layer}.before_mlp.weight", ("model.layers.{layer}.post_attention_layernorm.weight",)),
)
PROJECTIONS = (
    Weight("layers.{layer}.attention.qkv.weight", tuple(f"{_A}{p}_proj.weight" for p in "qkv"), "heads"),
    Weight("layers.{layer}.attention.qkv.bias", tuple(f"{_A}{p}_proj.bias" for p in "qkv"), "heads"),
    Weight("layers.{layer}.attention.out.weight", (_A + "o_proj.weight",), "row"),
    Weight("layers.{layer}.attention.out.bias", (_A + "o_proj.bias",)),
)
QK_NORMS = (
    Weight("layers.{layer}.attention.q_norm.weight", (_A + "q_norm.weight",)),
    Weight("layers.{layer}.attention.k_norm.weight", (_A + "k_norm.weight",)),
)
DENSE = (
    Weight("layers.{layer}.mlp.gate_up.weight", (_M + "gate_proj.weight", _M + "up_proj.weight"), "column"),
    Weight("layers.{layer}.mlp.gate_up.bias", (_M + "gate_proj.bias", _M + "up_proj.bias"), "column"),
    Weight("layers.{layer}.mlp.down.weight", (_M + "down_proj.weight",), "row"),
    Weight("layers.{layer}.mlp.down.bias", (_M + "down_proj.bias",)),
)
WEIGHTS = ENDS + NORMS + PROJECTIONS + QK_NORMS + DENSE
cache_spec = group_layers


def build(ops: Ops, config: ModelConfig) -> Transformer:
    qwen2 = config.model_type == "qwen2"  # biases on queries, keys and values only

    def layer(i: int) -> Layer:
        attention = Attention(
            ops,
            config,
            i,
            qk_norm="head" if config.model_type in ("qwen3", "qwen3_moe") else None,
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias and not qwen2,
        )
        norms = [Norm(ops, config.hidden_size, config.rms_norm_eps) for _ in range(2)]
        mlp: MLP | MoE
        if config.layers[i].moe:
            mlp = MoE(ops, config, kind=config.hidden_act, softmax_first=True, renormalize=config.norm_topk_prob)
        else:
            mlp = MLP(ops, config, bias=config.mlp_bias)
        return Layer(attention, mlp, before_attention=norms[0], before_mlp=norms[1])

    return Transformer(ops, config, layer)
