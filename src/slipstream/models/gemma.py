"""Gemma 2 and 3: four norms a layer (stored as weight - 1), scaled embeddings, windows on most layers.

Gemma 2 soft-caps scores and logits; Gemma 3 normalises queries and keys, and its sliding layers rotate in another way.
Of a Gemma 3 that also sees images, the text part is taken.
"""

from __future__ import annotations

from slipstream.cache.spec import group_layers
from slipstream.checkpoint.rules import Weight, plus_one
from slipstream.config import ModelConfig
from slipstream.layers.attention import Attention
from slipstream.layers.mlp import MLP
from slipstream.layers.norm import Norm
from slipstream.layers.ops import Ops
from slipstream.layers.transformer import Layer, Transformer
from slipstream.models.llama import DENSE, ENDS, PROJECTIONS

_L = "model.layers.{layer}."
NORMS = (
    Weight("norm.weight", ("model.norm.weight",), transform=plus_one),
    Weight("layers.{layer}.before_attention.weight", (_L + "input_layernorm.weight",), transform=plus_one),
    Weight("layers.{layer}.after_attention.weight", (_L + "post_attention_layernorm.weight",), transform=plus_one),
    Weight("layers.{layer}.before_mlp.weight", (_L + "pre_feedforward_layernorm.weight",), transform=plus_one),
    Weight("layers.{layer}.after_mlp.weight", (_L + "post_feedforward_layernorm.weight",), transform=plus_one),
    Weight("layers.{layer}.attention.q_norm.weight", (_L + "self_attn.q_norm.weight",), transform=plus_one),
    Weight("layers.{layer}.attention.k_norm.weight", (_L + "self_attn.k_norm.weight",), transform=plus_one),
)
WEIGHTS = ENDS + NORMS + PROJECTIONS + DENSE
cache_spec = group_layers


def rename(name: str) -> str | None:
    """A tensor of a Gemma 3 with vision, as the text model alone would call it; None belongs to the vision part."""
    name = name.removeprefix("model.") if name.startswith("model.language_model.") else name
    if name.removeprefix("model.").startswith(("vision_tower.", "multi_modal_projector.")):
        return None
    if name.startswith("language_model."):
        name = name.removeprefix("language_model.")
        return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
    return name


def build(ops: Ops, config: ModelConfig) -> Transformer:
    def norm() -> Norm:
        return Norm(ops, config.hidden_size, config.rms_norm_eps, plus_one=True)

    def layer(i: int) -> Layer:
        bias = config.attention_bias
        attention = Attention(
            ops,
            config,
            i,
            qk_norm="head" if config.model_type == "gemma3_text" else None,
            plus_one=True,
            qkv_bias=bias,
            out_bias=bias,
        )
        return Layer(
            attention,
            MLP(ops, config),
            before_attention=norm(),
            after_attention=norm(),
            before_mlp=norm(),
            after_mlp=norm(),
        )

    return Transformer(ops, config, layer, embed_scale=config.hidden_size**0.5, plus_one=True)
