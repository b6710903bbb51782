"""What a model is, in the terms of this code: the content of config.json, checked and with every default filled in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

LayerKind = Literal["full_attention", "sliding_attention"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: base, scaling rule and its numbers (names as in transformers' `rope_parameters`)."""

    theta: float = 10000.0
    kind: str = "default"  # default, linear, llama3, yarn
    dim: int = 0  # rotated part of each head
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What differs between layers. `window` counts the visible keys including the token itself."""

    kind: LayerKind
    window: int | None
    rope: RopeConfig | None
    moe: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only language model as its config.json describes it, checked."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    attention_scale: float = 0.0
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    swiglu_limit: float = 7.0
    dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    quantization: str | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The different rotations of this model's layers, in the order of first use."""
        return tuple(dict.fromkeys(layer.rope for layer in self.layers if layer.rope is not None))

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read the content of a config.json, in the spelling of transformers 4 or 5.

        Raises:
            CheckpointError: a value is missing, of the wrong type, or makes no sense.
        """
        from slipstream.config.reader import Reader

        return Reader(raw).read()
