"""The architectures. A short file each (or a family): `build(ops, config)`, the table `WEIGHTS`, `cache_spec(config)`.

A file may also have `rename(name)`, for checkpoints that hold more than the language model.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from slipstream.errors import CheckpointError

# model_type in config.json -> module here
ARCHITECTURES = {
    "gemma2": "gemma",
    "gemma3_text": "gemma",
    "gpt_oss": "gpt_oss",
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "mixtral",
    "olmo2": "olmo2",
    "phi3": "phi3",
    "qwen2": "llama",
    "qwen3": "llama",
    "qwen3_moe": "qwen3_moe",
    "smollm3": "llama",
}


def architecture(model_type: str) -> ModuleType:
    """The module of an architecture.

    Raises:
        CheckpointError: it is not one of the known ones, which the message lists.
    """
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise CheckpointError(f"architecture {model_type!r} is not supported; known are {known}")
    return import_module(f"slipstream.models.{ARCHITECTURES[model_type]}")
