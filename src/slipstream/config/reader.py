"""From config.json, in the spelling of transformers 4 or 5 and with the defaults of its classes, to `ModelConfig`.

What a field means is what transformers' modeling file of that architecture does with it. A field that would change the
result and is not supported is an error; one that the architecture does not read is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slipstream.config.model import LayerConfig, LayerKind, ModelConfig, RopeConfig
from slipstream.errors import CheckpointError

_GEMMA = {
    "head_dim": 256, "num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096,
    "tie_word_embeddings": True, "query_pre_attn_scalar": 256,
}  # fmt: skip
# What transformers assumes where config.json is silent; sizes of a model only where files on the Hub leave them out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    "mixtral": {
        "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
    },
    "qwen2": {"sliding_window": 4096, "num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {
        "sliding_window": 4096, "num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128,
    },
    "qwen3_moe": {
        "sliding_window": 4096, "max_position_embeddings": 32768, "num_key_value_heads": 4, "num_local_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    },
    "gemma2": _GEMMA | {
        "max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    "gemma3_text": _GEMMA | {
        "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "max_position_embeddings": 131072,
    },
    "phi3": {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    "olmo2": {"rms_norm_eps": 1e-5},
    "smollm3": {
        "rope_theta": 2e6, "num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True,
    },
    "gpt_oss": {
        "head_dim": 64, "sliding_window": 128, "num_local_experts": 128, "num_experts_per_tok": 4,
        "num_key_value_heads": 8, "attention_bias": True, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
        "rope_theta": 150000.0,
        "rope_parameters": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                            "original_max_position_embeddings": 4096},
    },
}  # fmt: skip
# An explicit null is a value of its own here: no window, no soft-capping, as many key heads as heads, hidden / heads.
_NULLABLE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "num_key_value_heads", "head_dim")
# These turn a model into another one; none of our architectures has them in transformers.
_FOREIGN = ("clip_qkv", "use_qk_norm", "use_mrope", "use_bidirectional_attention")

# Of a model with a text_config, these stand outside of it.
_OUTER = ("dtype", "torch_dtype", "quantization_config", "tie_word_embeddings", "bos_token_id", "eos_token_id")

_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
}  # fmt: skip
_DTYPES = ("bfloat16", "float16", "float32")
_ROPE_NUMBERS = {  # the numbers that each rule cannot do without
    "default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": (),
}  # fmt: skip
_ROPE_KEYS = {
    "rope_theta", "rope_type", "type", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim",
    "truncate", "finetuned",
}  # fmt: skip


class Reader:
    """Reads field by field; each getter checks type and range and names the field when it complains."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        kind = raw.get("model_type") if isinstance(raw, Mapping) else None
        if not isinstance(kind, str):
            raise CheckpointError("config.json has no model_type, so it is unknown which architecture this is")
        if kind == "gemma3" and isinstance(raw.get("text_config"), Mapping):
            raw = {**raw["text_config"], **{k: raw[k] for k in _OUTER if raw.get(k) is not None}}
            kind = "gemma3_text"
        if kind not in _DEFAULTS:
            known = ", ".join(sorted(_DEFAULTS))
            raise CheckpointError(f"architecture {kind[:80]!r} is not supported; known are {known}")
        self.kind, self.given = kind, raw
        self.raw = _DEFAULTS[kind] | {k: v for k, v in raw.items() if v is not None or k in _NULLABLE}

    def bad(self, name: str, value: Any, want: str) -> CheckpointError:
        return CheckpointError(f"config.json: {name} must be {want}, got {str(value)[:80]!r}")

    def get(self, name: str, default: Any = None) -> Any:
        value = self.raw.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None = None, low: int = 1, high: int = 2**24) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.bad(name, value, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, default: float | None = None, source: Mapping[str, Any] | None = None) -> float:
        value = (self.raw if source is None else source).get(name)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e12:
            raise self.bad(name, value, "a positive number")
        return float(value)

    def optional(self, name: str, source: Mapping[str, Any] | None = None) -> float | None:
        value = (self.raw if source is None else source).get(name)
        return None if value is None else self.number(name, source=source)

    def flag(self, name: str, default: bool, source: Mapping[str, Any] | None = None) -> bool:
        value = (self.raw if source is None else source).get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.bad(name, value, "true or false")
        return value

    def read(self) -> ModelConfig:
        kind = self.kind
        for name in _FOREIGN:
            if self.get(name, False) is not False:
                raise self.bad(name, self.raw[name], f"absent or false in {kind} (this variant is not supported)")
        hidden = self.integer("hidden_size")
        heads = self.integer("num_attention_heads", high=65536)
        kv_heads = self.integer("num_key_value_heads", heads, high=65536)
        if heads % kv_heads:
            raise self.bad("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")
        if self.get("head_dim") is None and hidden % heads:
            raise self.bad("hidden_size", hidden, f"a multiple of num_attention_heads={heads} (or give head_dim)")
        head_dim = self.integer("head_dim", max(hidden // heads, 1), high=4096)
        if head_dim % 2:
            raise self.bad("head_dim", head_dim, "even, as its halves are rotated against each other")
        experts, top_k = self.experts()
        intermediate = self.integer("intermediate_size")
        inner = self.integer("moe_intermediate_size") if kind == "qwen3_moe" else intermediate
        return ModelConfig(
            model_type=kind,
            vocab_size=self.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            layers=self.layers(head_dim, experts),
            max_position_embeddings=self.trained(),
            rms_norm_eps=self.number("rms_norm_eps", 1e-6),
            hidden_act=self.activation(),
            tie_word_embeddings=self.flag("tie_word_embeddings", False),
            attention_bias=self.attention_bias(),
            mlp_bias=kind in ("llama", "smollm3") and self.flag("mlp_bias", False),
            num_experts=experts,
            num_experts_per_tok=top_k,
            moe_intermediate_size=inner if experts else 0,
            norm_topk_prob=kind != "qwen3_moe" or self.flag("norm_topk_prob", False),
            attention_scale=(self.number("query_pre_attn_scalar") if kind.startswith("gemma") else head_dim) ** -0.5,
            attn_logit_softcapping=self.softcap("attn_logit_softcapping", ("gemma2",)),
            final_logit_softcapping=self.softcap("final_logit_softcapping", ("gemma2", "gemma3_text")),
            swiglu_limit=self.number("swiglu_limit", 7.0) if kind == "gpt_oss" else 7.0,
            dtype=self.dtype(),
            bos_token_id=self.token("bos_token_id"),
            eos_token_ids=self.eos(),
            quantization=self.quantization(),
        )

    def attention_bias(self) -> bool:
        if self.kind in ("mistral", "mixtral", "phi3"):
            return False
        return self.kind == "qwen2" or self.flag("attention_bias", False)

    def trained(self) -> int:
        return self.integer("max_position_embeddings", 2048, high=2**31)

    def experts(self) -> tuple[int, int]:
        """Experts of a layer, and how many of them a token goes to; 0, 0 without experts."""
        if self.kind not in ("gpt_oss", "mixtral", "qwen3_moe"):
            return 0, 0
        one, other = self.given.get("num_local_experts"), self.given.get("num_experts")
        if one is not None and other is not None and one != other:
            raise self.bad("num_experts", other, f"num_local_experts={str(one)[:20]}, where both are given")
        name = "num_local_experts" if other is None else "num_experts"
        count = self.integer(name, low=0 if self.kind == "qwen3_moe" else 1, high=65536)
        if not count:
            return 0, 0
        top_k = self.integer("num_experts_per_tok", low=0, high=65536)
        if not 1 <= top_k <= count:
            raise self.bad("num_experts_per_tok", top_k, f"from 1 to the number of experts, {count}")
        return count, top_k

    def activation(self) -> str:
        name = "hidden_activation" if self.kind.startswith("gemma") else "hidden_act"
        known = {"silu": "silu"} if self.kind == "gpt_oss" else _ACTIVATIONS
        act = self.get(name, "silu")
        if not isinstance(act, str) or act not in known:
            raise self.bad(name, act, f"one of {', '.join(known)}")
        return known[act]

    def softcap(self, name: str, kinds: tuple[str, ...]) -> float | None:
        if self.kind in kinds:
            return self.optional(name)
        if self.kind == "gemma3_text" and self.raw.get(name) is not None:
            raise self.bad(name, self.raw[name], "null: Gemma 3 does not soft-cap its scores")
        return None

    def dtype(self) -> str:
        value = self.get("dtype", self.get("torch_dtype", "float32"))
        value = value.removeprefix("torch.") if isinstance(value, str) else value
        if not isinstance(value, str) or value not in _DTYPES:
            raise self.bad("dtype", value, f"one of {', '.join(_DTYPES)}")
        return value

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
        rotates = self.rotates(n)
        kinds = self.kinds(n, rotates)
        window = self.integer("sliding_window", high=2**31) if "sliding_attention" in kinds else None
        ropes = {kind: self.rope(kind, head_dim) for kind in set(kinds)}
        sparse = self.sparse(n, experts)
        return tuple(
            LayerConfig(k, window if k == "sliding_attention" else None, ropes[k] if rotates[i] else None, sparse[i])
            for i, k in enumerate(kinds)
        )

    def kinds(self, n: int, rotates: list[bool]) -> list[LayerKind]:
        """Full or sliding, layer by layer: as `layer_types` says where the architecture reads it, else by its rule."""
        rule = self.rule(n, rotates)
        given = self.raw.get("layer_types")
        if given is None:
            return rule
        if not isinstance(given, list) or len(given) != n:
            raise self.bad("layer_types", given, f"a list of {n} layer types")
        for k in given:
            if k not in ("full_attention", "sliding_attention"):
                raise self.bad("layer_types", k, "full_attention or sliding_attention (others are not supported)")
        if self.kind in ("llama", "mistral", "mixtral", "phi3", "olmo2", "qwen3_moe") and given != rule:
            raise self.bad("layer_types", given, f"absent: all layers of {self.kind} are alike ({rule[0]} here)")
        if self.kind in ("qwen2", "qwen3", "smollm3") and "sliding_attention" in given and not self.slides():
            raise self.bad("layer_types", given, "full_attention only, where use_sliding_window is not set")
        return list(given)

    def slides(self) -> bool:
        return self.flag("use_sliding_window", False) and self.raw.get("sliding_window") is not None

    def rule(self, n: int, rotates: list[bool]) -> list[LayerKind]:
        if self.kind in ("mistral", "mixtral", "phi3"):
            sliding = [self.raw.get("sliding_window") is not None] * n
        elif self.kind in ("gemma2", "gpt_oss"):
            sliding = [i % 2 == 0 for i in range(n)]
        elif self.kind == "gemma3_text":
            every = self.integer("sliding_window_pattern", 6)
            sliding = [(i + 1) % every != 0 for i in range(n)]
        elif self.kind in ("qwen2", "qwen3") and self.slides():
            first = self.integer("max_window_layers", 28, 0)
            sliding = [i >= first for i in range(n)]
        elif self.kind == "smollm3" and self.slides():
            sliding = [not r for r in rotates]
        else:
            sliding = [self.kind == "qwen3_moe" and self.slides()] * n
        return ["sliding_attention" if s else "full_attention" for s in sliding]

    def rotates(self, n: int) -> list[bool]:
        if self.kind != "smollm3":
            return [True] * n
        given = self.raw.get("no_rope_layers")  # 1 rotates, 0 does not
        if given is None:
            every = self.integer("no_rope_layer_interval", 4)
            return [(i + 1) % every != 0 for i in range(n)]
        if not isinstance(given, list) or len(given) != n or any(v not in (0, 1) for v in given):
            raise self.bad("no_rope_layers", given, f"a list of {n} numbers, 0 or 1")
        return [bool(v) for v in given]

    def sparse(self, n: int, experts: int) -> list[bool]:
        if self.kind != "qwen3_moe" or not experts:
            return [bool(experts)] * n
        dense = self.get("mlp_only_layers", [])
        if not isinstance(dense, list) or any(type(v) is not int for v in dense):
            raise self.bad("mlp_only_layers", dense, "a list of layer numbers")
        every, skip = self.integer("decoder_sparse_step", 1), set(dense)
        return [i not in skip and (i + 1) % every == 0 for i in range(n)]

    def rope_parameters(self, kind: LayerKind) -> dict[str, Any]:
        scaling, params = self.raw.get("rope_scaling") or {}, self.raw.get("rope_parameters") or {}
        if not isinstance(scaling, Mapping) or not isinstance(params, Mapping):
            raise self.bad("rope_parameters", scaling or params, "an object")
        if self.kind != "gemma3_text":
            return {"rope_theta": self.raw.get("rope_theta", 10000.0)} | dict(scaling or params)
        full = kind == "full_attention"  # Gemma 3 has one set for each kind of layer, and scales the full one only
        mine = params.get(kind) or {}
        if not isinstance(mine, Mapping) or params.keys() - {"full_attention", "sliding_attention"}:
            raise self.bad("rope_parameters", params, "one object for full_attention and one for sliding_attention")
        base = self.raw.get("rope_theta", 1e6) if full else self.raw.get("rope_local_base_freq", 1e4)
        return {"rope_theta": base} | dict(mine) | dict(scaling if full else {})

    def rope(self, kind: LayerKind, head_dim: int) -> RopeConfig:
        params = {k: v for k, v in self.rope_parameters(kind).items() if v is not None}
        rule = params.get("rope_type", params.get("type", "default"))
        if self.kind == "phi3" and rule in ("su", "yarn", "longrope"):
            raise self.bad("rope_type", rule, "default: longrope is not supported; take the 4k variant of the model")
        if not isinstance(rule, str) or rule not in _ROPE_NUMBERS:
            raise self.bad("rope_type", rule, f"one of {', '.join(_ROPE_NUMBERS)} (others are not supported)")
        unknown = sorted(str(k) for k in params.keys() - _ROPE_KEYS)
        if unknown:
            raise self.bad(f"rope_parameters.{unknown[0][:80]}", params.get(unknown[0]), "absent (it is not supported)")
        for name in _ROPE_NUMBERS[rule]:
            self.number(name, source=params)
        partial = self.number("partial_rotary_factor", self.raw.get("partial_rotary_factor", 1.0), params)
        dim = int(head_dim * partial)
        if dim % 2 or not 0 < dim <= head_dim or (dim != head_dim and self.kind != "phi3"):
            want = f"a part of head_dim={head_dim} with an even width" if self.kind == "phi3" else f"1 in {self.kind}"
            raise self.bad("partial_rotary_factor", partial, want)
        trained = self.trained()
        name = "original_max_position_embeddings"
        original = params.get(name, self.get(name, trained))
        if not isinstance(original, int) or isinstance(original, bool) or not 0 < original < 2**31:
            raise self.bad(name, original, "a positive whole number")
        out = RopeConfig(
            theta=self.number("rope_theta", source=params),
            kind=rule,
            dim=dim,
            factor=self.number("factor", trained / original if rule == "yarn" else 1.0, params),
            low_freq_factor=self.number("low_freq_factor", 1.0, params),
            high_freq_factor=self.number("high_freq_factor", 4.0, params),
            original_max_position=original,
            beta_fast=self.number("beta_fast", 32.0, params),
            beta_slow=self.number("beta_slow", 1.0, params),
            attention_factor=self.optional("attention_factor", params),
            mscale=self.optional("mscale", params),
            mscale_all_dim=self.optional("mscale_all_dim", params),
            truncate=self.flag("truncate", True, params),
        )
        if out.theta <= 1:
            raise self.bad("rope_theta", out.theta, "above 1")
        if rule == "llama3" and out.high_freq_factor <= out.low_freq_factor:
            raise self.bad("high_freq_factor", out.high_freq_factor, "above low_freq_factor")
        return out
