"""What was asked (`EngineConfig`) and what the checkpoint says (`ModelConfig`). Both frozen; no torch."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from slipstream.errors import CheckpointError, ConfigError

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

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read the content of a config.json, in the spelling of transformers 4 or 5.

        Raises:
            CheckpointError: a value is missing, of the wrong type, or makes no sense.
        """
        return _Reader(raw).read()


# What transformers' config classes assume where config.json is silent.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4096},
    "mixtral": {"rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2": {"attention_bias": True},
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False},
    "gemma2": {
        "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096, "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096, "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256, "rope_theta": 1e6, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6,
    },
    "phi3": {"rms_norm_eps": 1e-5},
    "olmo2": {"rms_norm_eps": 1e-5},
    "smollm3": {"rope_theta": 2e6, "no_rope_layer_interval": 4},
    "gpt_oss": {
        "head_dim": 64, "sliding_window": 128, "num_local_experts": 128, "num_experts_per_tok": 4, "rope_theta": 150000.0,
        "attention_bias": True, "rms_norm_eps": 1e-5, "swiglu_limit": 7.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                         "original_max_position_embeddings": 4096},
    },
}  # fmt: skip

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_DTYPES = {"float32", "bfloat16", "float16"}


class _Reader:
    """Reads config.json field by field; each getter checks type and range and names the field when it complains."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        kind = raw.get("model_type") if isinstance(raw, Mapping) else None
        if not isinstance(kind, str):
            raise CheckpointError("config.json has no model_type, so the architecture is unknown; is this a model folder?")
        if kind == "gemma3" and isinstance(raw.get("text_config"), Mapping):
            raw = {**raw["text_config"], "dtype": raw.get("dtype", raw.get("torch_dtype"))}
            kind = "gemma3_text"
        self.kind = kind
        self.raw = {**_DEFAULTS.get(kind, {}), **{k: v for k, v in raw.items() if v is not None}}
        if "sliding_window" in raw and raw["sliding_window"] is None:  # an explicit null switches the window off
            self.raw["sliding_window"] = None
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if name in raw and raw[name] is None:
                self.raw[name] = None

    def bad(self, name: str, value: Any, want: str) -> CheckpointError:
        return CheckpointError(f"config.json: {name} must be {want}, got {str(value)[:80]!r}")

    def integer(self, name: str, default: int | None = None, low: int = 1, high: int = 2**24) -> int:
        value = self.raw.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.bad(name, value, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, default: float | None = None, source: Mapping[str, Any] | None = None) -> float:
        value = (self.raw if source is None else source).get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 1e12 or value <= 0:
            raise self.bad(name, value, "a positive number")
        return float(value)

    def optional(self, name: str, source: Mapping[str, Any] | None = None) -> float | None:
        value = (self.raw if source is None else source).get(name)
        return None if value is None else self.number(name, source=source)

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw.get(name, default)
        if not isinstance(value, bool):
            raise self.bad(name, value, "true or false")
        return value

    def read(self) -> ModelConfig:
        kind = self.kind
        hidden = self.integer("hidden_size")
        heads = self.integer("num_attention_heads", high=65536)
        kv_heads = self.integer("num_key_value_heads", heads, high=65536)
        if heads % kv_heads:
            raise self.bad("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")
        if "head_dim" not in self.raw and hidden % heads:
            raise self.bad("hidden_size", hidden, f"a multiple of num_attention_heads={heads} where head_dim is not given")
        head_dim = self.integer("head_dim", max(hidden // heads, 1), high=4096)
        experts = self.integer("num_local_experts", self.integer("num_experts", 0, 0, 65536), 0, 65536)
        if kind not in ("gpt_oss", "mixtral", "qwen3_moe"):
            experts = 0
        top_k = self.integer("num_experts_per_tok", 0, 0, 65536)
        if experts and not 1 <= top_k <= experts:
            raise self.bad("num_experts_per_tok", top_k, f"from 1 to the number of experts, {experts}")
        act = self.raw.get("hidden_activation", self.raw.get("hidden_act", "silu"))
        if act not in _ACTIVATIONS:
            raise self.bad("hidden_act", act, f"one of {', '.join(_ACTIVATIONS)}")
        scalar = self.optional("query_pre_attn_scalar")
        intermediate = self.integer("intermediate_size")
        return ModelConfig(
            model_type=kind,
            vocab_size=self.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            layers=self.layers(head_dim, experts),
            max_position_embeddings=self.integer("max_position_embeddings", 2048, high=2**31),
            rms_norm_eps=self.number("rms_norm_eps", 1e-6),
            hidden_act=_ACTIVATIONS[act],
            tie_word_embeddings=self.flag("tie_word_embeddings", False),
            attention_bias=self.flag("attention_bias", False),
            mlp_bias=self.flag("mlp_bias", False),
            num_experts=experts,
            num_experts_per_tok=top_k if experts else 0,
            moe_intermediate_size=self.integer("moe_intermediate_size", intermediate) if experts else 0,
            norm_topk_prob=self.flag("norm_topk_prob", True),
            attention_scale=(scalar if scalar else head_dim) ** -0.5,
            attn_logit_softcapping=self.optional("attn_logit_softcapping"),
            final_logit_softcapping=self.optional("final_logit_softcapping"),
            swiglu_limit=self.number("swiglu_limit", 7.0),
            dtype=self.dtype(),
            bos_token_id=self.token("bos_token_id"),
            eos_token_ids=self.eos(),
            quantization=self.quantization(),
        )

    def dtype(self) -> str:
        value = self.raw.get("dtype", self.raw.get("torch_dtype", "float32"))
        value = value.removeprefix("torch.") if isinstance(value, str) else value
        if value not in _DTYPES:
            raise self.bad("dtype", value, f"one of {', '.join(sorted(_DTYPES))}")
        return str(value)

    def token(self, name: str) -> int | None:
        value = self.raw.get(name)
        if isinstance(value, list) and value:
            value = value[0]
        return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None

    def eos(self) -> tuple[int, ...]:
        value = self.raw.get("eos_token_id", ())
        values = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            raise self.bad("eos_token_id", value, "a token id or a list of them")
        return tuple(v for v in values if v >= 0)

    def quantization(self) -> str | None:
        value = self.raw.get("quantization_config")
        if value is None:
            return None
        method = value.get("quant_method") if isinstance(value, Mapping) else None
        if not isinstance(method, str):
            raise self.bad("quantization_config", value, "an object with a quant_method")
        return method

    def layers(self, head_dim: int, experts: int) -> tuple[LayerConfig, ...]:
        n = self.integer("num_hidden_layers", high=4096)
        kinds = self.kinds(n)
        window = self.raw.get("sliding_window")
        if any(k == "sliding_attention" for k in kinds):
            window = self.integer("sliding_window", high=2**31)
        ropes = {kind: self.rope(kind, head_dim) for kind in set(kinds)}
        rotates = self.rotates(n)
        sparse = self.sparse(n, experts)
        return tuple(
            LayerConfig(k, window if k == "sliding_attention" else None, ropes[k] if rotates[i] else None, sparse[i])
            for i, k in enumerate(kinds)
        )

    def kinds(self, n: int) -> list[LayerKind]:
        given = self.raw.get("layer_types")
        if given is not None:
            if not isinstance(given, list) or len(given) < n:
                raise self.bad("layer_types", given, f"a list of {n} layer types")
            if self.kind in ("mistral", "mixtral", "phi3", "llama", "olmo2", "qwen3_moe"):
                given = None  # these architectures do not read it
        if given is not None:
            for k in given[:n]:
                if k not in ("full_attention", "sliding_attention"):
                    raise self.bad("layer_types", k, "full_attention or sliding_attention (others are not supported)")
            return list(given[:n])
        if self.kind in ("mistral", "mixtral", "phi3"):
            sliding = self.raw.get("sliding_window") is not None
            return ["sliding_attention" if sliding else "full_attention"] * n
        if self.kind in ("gemma2", "gpt_oss"):
            return ["full_attention" if i % 2 else "sliding_attention" for i in range(n)]
        if self.kind == "gemma3_text":
            every = self.integer("sliding_window_pattern", 6)
            return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(n)]
        if self.kind in ("qwen2", "qwen3", "qwen3_moe", "smollm3") and self.flag("use_sliding_window", False):
            if self.raw.get("sliding_window") is None:
                return ["full_attention"] * n
            first = 0 if self.kind == "qwen3_moe" else self.integer("max_window_layers", 28, 0)
            return ["sliding_attention" if i >= first else "full_attention" for i in range(n)]
        return ["full_attention"] * n

    def rotates(self, n: int) -> list[bool]:
        given = self.raw.get("no_rope_layers")  # smollm3: 1 rotates, 0 does not
        if given is not None:
            if not isinstance(given, list) or len(given) < n:
                raise self.bad("no_rope_layers", given, f"a list of {n} numbers")
            return [bool(v) for v in given[:n]]
        if self.kind == "smollm3":
            every = self.integer("no_rope_layer_interval", 4)
            return [(i + 1) % every != 0 for i in range(n)]
        return [True] * n

    def sparse(self, n: int, experts: int) -> list[bool]:
        if not experts:
            return [False] * n
        dense = self.raw.get("mlp_only_layers") or []
        if not isinstance(dense, list):
            raise self.bad("mlp_only_layers", dense, "a list of layer numbers")
        every = self.integer("decoder_sparse_step", 1)
        return [i not in dense and (i + 1) % every == 0 for i in range(n)]

    def rope(self, kind: str, head_dim: int) -> RopeConfig:
        params = self.raw.get("rope_parameters", self.raw.get("rope_scaling")) or {}
        if isinstance(params, Mapping) and kind in params:
            params = params[kind]  # gemma3 and others: one set for each layer type
        elif self.kind == "gemma3_text" and kind == "sliding_attention" and "rope_parameters" not in self.raw:
            params = {"rope_theta": self.raw.get("rope_local_base_freq", 10000.0)}
        if not isinstance(params, Mapping):
            raise self.bad("rope_parameters", params, "an object")
        rule = params.get("rope_type", params.get("type", "default"))
        if rule not in ("default", "linear", "llama3", "yarn"):
            raise self.bad("rope_type", rule, "one of default, linear, llama3, yarn (others are not supported)")
        source = {"rope_theta": self.raw.get("rope_theta", 10000.0), **params}
        partial = self.number("partial_rotary_factor", self.raw.get("partial_rotary_factor", 1.0), params)
        dim = int(head_dim * partial)
        if dim % 2 or not 0 < dim <= head_dim:
            raise self.bad("partial_rotary_factor", partial, f"a part of head_dim={head_dim} with an even width")
        trained = self.integer("max_position_embeddings", 2048, high=2**31)
        original = params.get("original_max_position_embeddings", self.raw.get("original_max_position_embeddings", trained))
        if not isinstance(original, int) or isinstance(original, bool) or not 0 < original < 2**31:
            raise self.bad("original_max_position_embeddings", original, "a positive whole number")
        out = RopeConfig(
            theta=self.number("rope_theta", source=source),
            kind=rule,
            dim=dim,
            factor=self.number("factor", 1.0, params),
            low_freq_factor=self.number("low_freq_factor", 1.0, params),
            high_freq_factor=self.number("high_freq_factor", 4.0, params),
            original_max_position=original,
            beta_fast=self.number("beta_fast", 32.0, params),
            beta_slow=self.number("beta_slow", 1.0, params),
            attention_factor=self.optional("attention_factor", params),
            mscale=self.optional("mscale", params),
            mscale_all_dim=self.optional("mscale_all_dim", params),
            truncate=bool(params.get("truncate", True)),
        )
        if out.theta <= 1:
            raise self.bad("rope_theta", out.theta, "above 1")
        if rule == "llama3" and out.high_freq_factor <= out.low_freq_factor:
            raise self.bad("high_freq_factor", out.high_freq_factor, "above low_freq_factor")
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the user asked of the engine. None is "decide it in the plan, and say why".

    Attributes:
        device: cpu, cuda, cuda:N, mps.
        dtype: auto, float32, bfloat16 or float16: of activations, and of weights that are not quantized.
        quantization: auto keeps weights as the checkpoint has them where an op can run them; none widens to dtype.
        max_model_len: longest prompt + answer, tokens.
        max_num_seqs: requests that run together.
        max_num_batched_tokens: tokens computed in one step.
        kv_cache_memory_bytes: bytes for keys and values; None plans them from what is free.
        gpu_memory_utilization: the part of the device's memory that the plan may use (weights, KV, workspace).
        page_size: tokens in one page of the KV cache.
        attn_implementation, linear_implementation: force one of the implementations that `explain` lists.
        num_threads: CPU threads; None leaves torch's own choice.
        seed: from which requests without a seed of their own draw theirs.
    """

    device: str = "auto"
    dtype: str = "auto"
    quantization: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    page_size: int = 16
    attn_implementation: str | None = None
    linear_implementation: str | None = None
    num_threads: int | None = None
    seed: int | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> EngineConfig:
        names = {f.name for f in dataclasses.fields(cls)}
        for name in kwargs.keys() - names:
            near = {"block_size": "page_size", "torch_dtype": "dtype"}.get(name) or next(
                iter(difflib.get_close_matches(name, names, 1)), None
            )
            hint = f"; did you mean {near}?" if near else f"; known are {', '.join(sorted(names))}"
            raise ConfigError(f"{name}: unknown engine option{hint}")
        return object.__new__(cls)

    def __post_init__(self) -> None:
        self._one_of("dtype", ("auto", "float32", "bfloat16", "float16"))
        self._one_of("quantization", ("auto", "none"))
        if not isinstance(self.device, str) or self.device.split(":")[0] not in ("auto", "cpu", "cuda", "mps"):
            raise ConfigError(f"device: must be auto, cpu, cuda, cuda:N or mps, got {self.device!r}")
        for name, low in (
            ("max_num_seqs", 1), ("max_num_batched_tokens", 1), ("page_size", 1), ("max_model_len", 1),
            ("kv_cache_memory_bytes", 1), ("num_threads", 1), ("seed", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None and name not in ("max_num_seqs", "max_num_batched_tokens", "page_size"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(f"{name}: must be a whole number of at least {low}, got {value!r}")
        share = self.gpu_memory_utilization
        if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 < share <= 1 or math.isnan(share):
            raise ConfigError(f"gpu_memory_utilization: must be above 0 and at most 1, got {share!r}")

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise ConfigError(f"{name}: must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
