"""The small files of the new folder: config.json, so that transformers, vLLM and slipstream load it, and the tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slipstream.checkpoint.files import member
from slipstream.checkpoint.open import Checkpoint
from slipstream.checkpoint.save import write_json, write_text
from slipstream.errors import CheckpointError
from slipstream.quantization.select import module_of
from slipstream.tokenizer import Tokenizer

# Text, and the vocabulary of sentencepiece; never code, nor what could hold some.
COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md",
)  # fmt: skip
_MOST = 256 << 20  # bytes of one of these

_CLASSES = {
    "gemma2": "Gemma2", "gemma3_text": "Gemma3", "gpt_oss": "GptOss", "llama": "Llama", "mistral": "Mistral",
    "mixtral": "Mixtral", "olmo2": "Olmo2", "phi3": "Phi3", "qwen2": "Qwen2", "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe", "smollm3": "SmolLM3",
}  # fmt: skip
# How the compressed-tensors library describes our formats
_WEIGHTS: dict[str, dict[str, Any]] = {
    "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8",
              "zp_dtype": "torch.uint8"},
    "int8": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "int4": {"num_bits": 4, "type": "int", "strategy": "group"},
}  # fmt: skip
_STORED = {"mxfp4": "mxfp4-pack-quantized", "int8": "pack-quantized", "int4": "pack-quantized"}
_PUBLISHED = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")


def config_of(
    checkpoint: Checkpoint, model_type: str, dtype: str, packed: Mapping[str, tuple[str, int]], published: bool
) -> dict[str, Any]:
    """The new config.json: the source's, with what it lacks and how weights are packed.

    Args:
        dtype: of a GGUF file's floats.
        packed: module -> (format, group of int4).
        published: experts are stored as gpt-oss publishes them.
    """
    config = dict(checkpoint.config)
    if not config.get("architectures") and model_type in _CLASSES:
        config["architectures"] = [f"{_CLASSES[model_type]}ForCausalLM"]
    if checkpoint.kind == "gguf":
        config["dtype"] = dtype
    others = [
        module_of(n)
        for n, i in checkpoint.tensors.items()
        if n.endswith(".weight") and len(i.shape) == 2 and "embed_tokens" not in n and module_of(n) not in packed
    ]
    if published:
        stacks = [n for n, i in checkpoint.tensors.items() if len(i.shape) == 3 and module_of(n) not in packed]
        kept = dict.fromkeys(n.rpartition(".")[0] for n in stacks)
        config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": [*_PUBLISHED, *kept]}
    else:
        config["quantization_config"] = _compressed(packed, others)
    return config


def _compressed(packed: Mapping[str, tuple[str, int]], others: Sequence[str]) -> dict[str, Any]:
    kinds = sorted(set(packed.values()))
    groups = {}
    for i, (format, group) in enumerate(kinds):
        weights = _WEIGHTS[format] | ({"group_size": group} if group else {}) | {"symmetric": True, "dynamic": False}
        mine = ["Linear"] if len(kinds) == 1 else [_target(m) for m, kind in packed.items() if kind == (format, group)]
        groups[f"group_{i}"] = {
            "targets": mine, "weights": weights, "input_activations": None, "output_activations": None,
            "format": _STORED[format],
        }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "config_groups": groups,
        "format": _STORED[kinds[0][0]] if len({f for f, _ in kinds}) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": list(dict.fromkeys([*map(_target, others), "lm_head"])),
    }


def _target(module: str) -> str:
    """How to name a module. In models with vision the prefixes that others give differ from the checkpoint's."""
    for part in ("vision_tower", "multi_modal_projector"):
        if part in module:
            return f"re:.*{part}.*"
    if "language_model." in module:
        return (
            f"re:.*language_model.*{re.escape(module[module.index('layers.') :])}$" if "layers." in module else module
        )
    return module


def write_beside(checkpoint: Checkpoint, folder: Path) -> None:
    """Tokenizer, chat template and generation_config: copied, or made from what a GGUF file says."""
    if checkpoint.kind == "gguf":
        Tokenizer.from_gguf(checkpoint.metadata).save(folder)
        if checkpoint.generation_config:
            write_json(folder / "generation_config.json", checkpoint.generation_config)
        return
    for path in beside(checkpoint):
        write_text(folder / path.name, member(checkpoint.path, path.name).read_bytes())


def beside(checkpoint: Checkpoint) -> list[Path]:
    """The files that are copied.

    Raises:
        CheckpointError: one is no plain file in the folder, or far too large.
    """
    if checkpoint.kind == "gguf":
        return []
    paths = [checkpoint.path / name for name in COPIED if (checkpoint.path / name).exists()]
    for path in paths:
        if member(checkpoint.path, path.name).stat().st_size > _MOST:
            raise CheckpointError(f"{path}: is larger than {_MOST >> 20} MiB, which such a file never is")
    return paths
