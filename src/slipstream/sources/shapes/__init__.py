"""Well-known models of which only the config.json is here, so that `weights="random"` needs no network for them.

Each folder's config.json says what the published one says about shapes and formats; vocabulary, text and weights are not here.
"""

from __future__ import annotations

from pathlib import Path

# The name, and where the whole model is.
SHAPES = {
    "gpt-oss-20b": "openai/gpt-oss-20b",
    "gpt-oss-120b": "openai/gpt-oss-120b",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
}


def folder(name: str) -> Path:
    """The folder with the config.json of one of SHAPES."""
    return Path(__file__).parent / name
