"""Tiny models whose rows are whole blocks: sizes pairwise different, multiples of 32 where a row runs along them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parity.tiny import TINY, save

# Queries are 6 * 64 = 384 wide, keys 128, hidden 96, the MLP 160: with o_proj (384 wide) alone groups of 64 would fit.
SIZES: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 64, "num_hidden_layers": 2}
OTHERS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 64, "mlp_only_layers": [1]},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma3-vision": {"layer_types": ["sliding_attention", "full_attention"]},
}


def make(name: str, folder: Path) -> Any:
    """A folder with the model and a tokenizer; gives transformers' model, float32."""
    kind, changes = TINY[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY, name, (kind, changes | SIZES | OTHERS.get(name, {})))
        return save(name, folder)
