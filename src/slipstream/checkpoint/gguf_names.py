"""From GGUF tensor names to those of Hugging Face, and what the conversion did to the values.

The names are those of gguf.constants.TENSOR_NAMES; tests hold them against gguf.tensor_mapping.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from slipstream.checkpoint.files import MAX_TENSORS
from slipstream.checkpoint.gguf import GGUF
from slipstream.checkpoint.gguf_config import ARCHITECTURES, read_config
from slipstream.checkpoint.tensors import TensorInfo
from slipstream.errors import CheckpointError

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# Already turned into config, or (inverse frequencies) computed anew.
_CONSUMED = re.compile(r"(rope_freqs|rope_factors_long|rope_factors_short|blk\.\d+\.attn_rot_embd)\.weight")
_LAYER = re.compile(r"blk\.(\d{1,4})\.(\w+)\.(weight|bias)")
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_GEMMA2 = _BLOCK | _POST_NORMS | {"ffn_norm": "pre_feedforward_layernorm"}
_EXPERTS = {f"ffn_{part}_exps": f"mlp.experts.{{}}.{part}_proj" for part in ("gate", "up", "down")}
# by model_type: the parts of a layer; "{}" stands for the number of an expert
_PARTS = {
    "llama": _BLOCK,
    "mistral": _BLOCK,
    "mixtral": _BLOCK
    | {
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
        "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
        "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    },
    "qwen2": _BLOCK,
    "qwen3": _BLOCK | _QK_NORM,
    "qwen3_moe": _BLOCK | _QK_NORM | _EXPERTS | {"ffn_gate_inp": "mlp.gate"},
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2 | _QK_NORM,
    "phi3": _BLOCK | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    "olmo2": _BLOCK | _QK_NORM | _POST_NORMS,
    "smollm3": _BLOCK,
    "gpt_oss": _BLOCK
    | _EXPERTS
    | {
        "ffn_gate_inp": "mlp.router",
        "attn_sinks": "self_attn.sinks",
        "post_attention_norm": "post_attention_layernorm",
    },
}
_INTERLEAVED = ("llama", "mistral", "mixtral", "smollm3")  # query and key rows, for llama.cpp's kind of rotation


def to_hugging_face(gguf: GGUF) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The config and the tensors as transformers would name them.

    Stacked experts (experts, out, in) become one tensor an expert, in the same bytes. gpt-oss keeps gate and up
    apart (`mlp.experts.0.gate_proj.weight`), where its safetensors interleave them in one `gate_up_proj`.

    Raises:
        CheckpointError: the architecture is not one of ours, or something of it cannot be mapped faithfully.
    """
    arch = gguf.metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise CheckpointError(
            f"{gguf.path}: GGUF of architecture {str(arch)[:80]!r} cannot be read; known are "
            f"{', '.join(ARCHITECTURES)}. Try the safetensors form of this model"
        )
    config = read_config(gguf, arch)
    tensors: dict[str, TensorInfo] = {}
    for info in gguf.tensors.values():
        if _CONSUMED.fullmatch(info.name):
            continue
        for renamed in _rename(info, config):
            if renamed.name in tensors:
                raise CheckpointError(f"{gguf.path}: two tensors would be {renamed.name}")
            tensors[renamed.name] = renamed
        if len(tensors) > MAX_TENSORS:
            raise CheckpointError(f"{gguf.path}: has over {MAX_TENSORS:,} tensors, each expert counted")
    return config, tensors


def _rename(info: TensorInfo, config: dict[str, Any]) -> list[TensorInfo]:
    kind = config["model_type"]
    found = _LAYER.fullmatch(info.name)
    part = _PARTS[kind].get(found[2]) if found else None
    name = f"model.layers.{int(found[1])}.{part}.{found[3]}" if found and part else _TOP.get(info.name)
    if name is None or (found and int(found[1]) >= config["num_hidden_layers"]):
        raise CheckpointError(f"{info.file}: the tensor {info.name} has no place in {kind}; try the safetensors form")
    name = name.replace("self_attn.sinks.weight", "self_attn.sinks")
    if "{}" in name:
        return _experts(info, name, config.get("num_local_experts", config.get("num_experts", 0)))
    heads = None
    if kind in _INTERLEAVED and found and found[2] in ("attn_q", "attn_k"):
        heads = config["num_attention_heads" if found[2] == "attn_q" else "num_key_value_heads"]
        if info.shape[0] % (2 * heads):
            raise CheckpointError(f"{info.file}: {info.name} of {info.shape} does not divide into {heads} heads")
    add = -1.0 if kind in ("gemma2", "gemma3_text") and name.endswith("norm.weight") else 0.0
    if add and info.is_quantized:
        raise CheckpointError(f"{info.file}: {info.name} is quantized to {info.dtype}, which a norm never is")
    return [dataclasses.replace(info, name=name, row_permute=heads, add=add)]


def _experts(info: TensorInfo, name: str, count: int) -> list[TensorInfo]:
    if len(info.shape) < 2 or info.shape[0] != count:
        raise CheckpointError(f"{info.file}: {info.name} of shape {info.shape} must hold {count} experts")
    shape, nbytes = info.shape[1:], info.nbytes // count
    return [
        dataclasses.replace(info, name=name.format(e), shape=shape, nbytes=nbytes, offset=info.offset + e * nbytes)
        for e in range(count)
    ]
