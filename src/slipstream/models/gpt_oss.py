"""gpt-oss: a mixture of experts with biases and a clamped SwiGLU, attention sinks, every other layer with a window.

As published the experts are MXFP4, (experts, out, in), and rows of gate and up alternate; so a share of the rows must be cut
in pairs. In bfloat16 safetensors they are transposed, (experts, in, out). In GGUF, and where `slipstream quantize` made
int8 or int4 of them, each part stands by itself. A bias after a row split belongs to one rank only. The router takes the
softmax of the chosen logits, after the choice.
"""

from __future__ import annotations

from slipstream.cache.spec import group_layers
from slipstream.checkpoint.rules import Weight, part_gate_up, part_rows, stack_experts, stack_gate_up, transpose_experts
from slipstream.config import ModelConfig
from slipstream.layers.attention import Attention
from slipstream.layers.mlp import MoE
from slipstream.layers.norm import Norm
from slipstream.layers.ops import Ops
from slipstream.layers.transformer import Layer, Transformer
from slipstream.models.llama import ENDS, NORMS, PROJECTIONS

_M = "model.layers.{layer}.mlp."
_E = _M + "experts.{expert}."
EXPERTS = (
    Weight("layers.{layer}.attention.sinks", ("model.layers.{layer}.self_attn.sinks",), "heads"),
    Weight("layers.{layer}.mlp.router.weight", (_M + "router.weight",)),
    Weight("layers.{layer}.mlp.router.bias", (_M + "router.bias",)),
    Weight("layers.{layer}.mlp.gate_up.weight", (_M + "experts.gate_up_proj",), "expert", part_gate_up),
    Weight("layers.{layer}.mlp.gate_up.bias", (_M + "experts.gate_up_proj_bias",), "expert", part_gate_up),
    Weight("layers.{layer}.mlp.down.weight", (_M + "experts.down_proj",), "expert", transpose_experts),
    Weight("layers.{layer}.mlp.down.bias", (_M + "experts.down_proj_bias",), "expert"),
)
PACKED_EXPERTS = (
    Weight("layers.{layer}.mlp.gate_up.weight", (_M + "experts.gate_up_proj_blocks",), "expert", part_rows),
    Weight("layers.{layer}.mlp.down.weight", (_M + "experts.down_proj_blocks",), "expert"),
)
GGUF_EXPERTS = (
    Weight(
        "layers.{layer}.mlp.gate_up.weight", (_E + "gate_proj.weight", _E + "up_proj.weight"), "expert", stack_gate_up
    ),
    Weight("layers.{layer}.mlp.gate_up.bias", (_E + "gate_proj.bias", _E + "up_proj.bias"), "expert", stack_gate_up),
    Weight("layers.{layer}.mlp.down.weight", (_E + "down_proj.weight",), "expert", stack_experts),
    Weight("layers.{layer}.mlp.down.bias", (_E + "down_proj.bias",), "expert", stack_experts),
)
WEIGHTS = ENDS + NORMS + PROJECTIONS + EXPERTS + PACKED_EXPERTS + GGUF_EXPERTS
cache_spec = group_layers


def build(ops: Ops, config: ModelConfig) -> Transformer:
    def layer(i: int) -> Layer:
        bias = config.attention_bias
        attention = Attention(ops, config, i, qkv_bias=bias, out_bias=bias, sinks=True)
        norms = [Norm(ops, config.hidden_size, config.rms_norm_eps) for _ in range(2)]
        mlp = MoE(ops, config, kind="swiglu_clamped", softmax_first=False, bias=True)
        return Layer(attention, mlp, before_attention=norms[0], before_mlp=norms[1])

    return Transformer(ops, config, layer)
