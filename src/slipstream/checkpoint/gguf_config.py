"""From GGUF metadata to the content of a config.json.

The keys are those of gguf.constants.Keys; what GGUF leaves unsaid (gemma's query scale, smollm3's layers without
rotation) is a constant of the architecture and stands here.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Callable
from typing import Any

from slipstream.checkpoint.gguf import GGUF
from slipstream.checkpoint.tensors import TensorInfo
from slipstream.errors import CheckpointError

# Keys that say nothing the model needs: of tools, or repeated in the tensors' shapes.
_HARMLESS = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "pooling_type", "attention.causal"}


class Fields:
    """The `{arch}.*` metadata. A key that nobody reads is an error in the end, never silently dropped."""

    def __init__(self, gguf: GGUF, arch: str) -> None:
        self.gguf, self.arch, self.used = gguf, arch, set(_HARMLESS)

    def bad(self, key: str, value: Any, want: str) -> CheckpointError:
        found = "is missing" if value is None else f"is {str(value)[:80]!r}"
        return CheckpointError(f"{self.gguf.path}: {self.arch}.{key} {found}; it must be {want}")

    def get(self, key: str) -> Any:
        self.used.add(key)
        return self.gguf.metadata.get(f"{self.arch}.{key}")

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = 2**24) -> int:
        value = self.get(key)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]  # some files repeat a number for every layer
        value = default if value is None else value
        if type(value) is not int or not low <= value <= high:
            raise self.bad(key, value, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value: Any = self.get(key)
        value = default if value is None else value
        if type(value) not in (int, float) or not 0 < value < 1e12:
            raise self.bad(key, value, "a positive number")
        return shortest(float(value))

    def equal(self, key: str, want: int | float) -> None:
        """The file may say this, but only what we would assume anyway."""
        value = self.get(key)
        if value is not None and value != want:
            raise self.bad(key, value, f"{want} (anything else is not supported)")

    def finish(self) -> None:
        prefix = self.arch + "."
        keys = (k.removeprefix(prefix) for k in self.gguf.metadata if k.startswith(prefix))
        unknown = sorted(k for k in keys if k not in self.used)
        if unknown:
            raise CheckpointError(
                f"{self.gguf.path}: sets {prefix}{unknown[0]}, which slipstream does not know for {self.arch}; "
                "the model may differ from what would be run. Try the safetensors form of this model"
            )


def shortest(value: float) -> float:
    """The shortest decimal that is the same float32: GGUF keeps 1e-5 as 9.99999975e-06."""
    if struct.unpack("<f", struct.pack("<f", value))[0] != value:
        return value
    for digits in range(1, 9):
        near = float(f"{value:.{digits}g}")
        if struct.pack("<f", near) == struct.pack("<f", value):
            return near
    return value


def floats(info: TensorInfo) -> list[float]:
    """A small F32 tensor as numbers."""
    if info.dtype != "F32" or info.nbytes > 1 << 20:
        raise CheckpointError(f"{info.file}: {info.name} must be a short list of F32, not {info.shape} of {info.dtype}")
    with info.file.open("rb") as f:
        f.seek(info.offset)
        values = array("f", f.read(info.nbytes))
    if len(values) != math.prod(info.shape) or not all(0 < v < 1e12 for v in values):
        raise CheckpointError(f"{info.file}: {info.name} must hold positive numbers")
    return [shortest(v) for v in values]


def read_config(gguf: GGUF, arch: str) -> dict[str, Any]:
    """The config.json that transformers would have for this file."""
    f = Fields(gguf, arch)
    heads, hidden = f.integer("attention.head_count", high=65536), f.integer("embedding_length")
    rotated = f.integer("rope.dimension_count", 0, 0, 4096)
    head_dim = f.integer("attention.key_length", 0, 0, 4096) or (rotated if arch != "phi3" else 0) or hidden // heads
    if not head_dim:
        raise f.bad("attention.head_count", heads, f"at most embedding_length, {hidden}")
    rotated = rotated or head_dim
    if rotated > head_dim or (rotated != head_dim and arch != "phi3"):
        raise f.bad("rope.dimension_count", rotated, f"the head size {head_dim}")
    for key in ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa"):
        f.equal(key, head_dim)
    f.equal("rope.dimension_count_swa", rotated)
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{gguf.path}: has no token_embd.weight of two dimensions, so it is no language model")
    rope = _rope(f, arch, head_dim)
    if rotated != head_dim:
        rope["partial_rotary_factor"] = rotated / head_dim
    config: dict[str, Any] = {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "num_hidden_layers": f.integer("block_count", high=4096),
        "num_attention_heads": heads,
        "num_key_value_heads": f.integer("attention.head_count_kv", heads, high=65536),
        "head_dim": head_dim,
        "max_position_embeddings": f.integer("context_length", high=2**31),
        "rms_norm_eps": f.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope,
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in gguf.tensors,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
    }
    _FAMILIES[arch](f, config)
    if "intermediate_size" not in config:
        config["intermediate_size"] = f.integer("feed_forward_length")
    for key in ("expert_count", "expert_used_count", "attention.sliding_window"):
        if key not in f.used:  # the family has no such thing
            f.equal(key, 0)
    f.finish()
    return {**config, **_special_tokens(gguf, config["vocab_size"])}


def _rope(f: Fields, arch: str, head_dim: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": f.number("rope.freq_base", 1e6 if arch == "gemma3" else 1e4)}
    if rope["rope_theta"] <= 1:
        raise f.bad("rope.freq_base", rope["rope_theta"], "above 1")
    rule = f.get("rope.scaling.type") or "none"
    if not isinstance(rule, str):
        raise f.bad("rope.scaling.type", rule, "a name")
    tensors = f.gguf.tensors
    if "rope_freqs.weight" in tensors:
        if rule != "none":
            raise f.bad("rope.scaling.type", rule, "absent where the file has rope_freqs.weight")
        return rope | _llama3(tensors["rope_freqs.weight"], rope["rope_theta"], head_dim)
    if arch == "phi3" and "rope_factors_long.weight" in tensors and "rope_factors_short.weight" in tensors:
        f.get("rope.scaling.factor")  # transformers computes it from the two lengths
        return rope | {
            "rope_type": "longrope",
            "long_factor": floats(tensors["rope_factors_long.weight"]),
            "short_factor": floats(tensors["rope_factors_short.weight"]),
            "original_max_position_embeddings": f.integer("rope.scaling.original_context_length", high=2**31),
            "attention_factor": f.number("rope.scaling.attn_factor", 1.0),
        }
    if rule == "none":
        f.equal("rope.scaling.factor", 1)
        f.equal("rope.scaling.attn_factor", 1)
        f.get("rope.scaling.original_context_length")
        return rope | {"rope_type": "default"}
    rope |= {"rope_type": rule, "factor": f.number("rope.scaling.factor")}
    f.equal("rope.scaling.attn_factor", 1)
    if rule == "linear":
        f.get("rope.scaling.original_context_length")
        return rope
    if rule != "yarn":
        raise f.bad("rope.scaling.type", rule, "none, linear, yarn or (with factor tensors, for phi3) longrope")
    f.equal("rope.scaling.yarn_ext_factor", 1)
    f.equal("rope.scaling.yarn_attn_factor", 1)
    return rope | {
        "original_max_position_embeddings": f.integer("rope.scaling.original_context_length", high=2**31),
        "beta_fast": f.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": f.number("rope.scaling.yarn_beta_slow", 1.0),
    }


def _llama3(freqs: TensorInfo, theta: float, head_dim: int) -> dict[str, Any]:
    """Find the llama3 rule behind a list of divisors, one for each frequency.

    GGUF keeps the result of the rule (convert_hf_to_gguf), not its numbers. All Llama 3.x models share the numbers
    below apart from `factor`, which is the largest divisor; anything else is refused rather than guessed.
    """
    found = floats(freqs)
    low, high, original, factor = 1.0, 4.0, 8192, max(found, default=0.0)
    if all(v == 1 for v in found):
        return {"rope_type": "default"}

    def divisor(i: int) -> float:
        turns = original * theta ** (-2 * i / head_dim) / (2 * math.pi)  # over the trained context
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        return 1 / ((1 - smooth) / factor + smooth)

    if len(found) != head_dim // 2 or any(abs(v / divisor(i) - 1) > 1e-4 for i, v in enumerate(found)):
        raise CheckpointError(
            f"{freqs.file}: rope_freqs.weight does not follow the llama3 rule with low_freq_factor 1, "
            "high_freq_factor 4 and 8192 trained positions, so the rotation is unknown. Try the model's safetensors"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _special_tokens(gguf: GGUF, vocab_size: int) -> dict[str, Any]:
    def token(name: str) -> int | None:
        value = gguf.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and (type(value) is not int or not 0 <= value < vocab_size):
            raise CheckpointError(
                f"{gguf.path}: tokenizer.ggml.{name}_token_id is {str(value)[:80]!r}, not a token below {vocab_size}"
            )
        return value

    ends = list(dict.fromkeys(t for t in map(token, ("eos", "eot", "eom")) if t is not None))
    found = {"bos_token_id": token("bos"), "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
    return {k: v for k, v in found.items() if v is not None}


def _llama(f: Fields, config: dict[str, Any]) -> None:
    config.update(model_type="llama", architectures=["LlamaForCausalLM"])
    window, experts = f.integer("attention.sliding_window", 0, 0, 2**31), f.integer("expert_count", 0, 0, 65536)
    if window:
        config.update(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=window)
    if experts:
        config.update(model_type="mixtral", architectures=["MixtralForCausalLM"], sliding_window=window or None)
        config.update(num_local_experts=experts, num_experts_per_tok=f.integer("expert_used_count", high=experts))


def _qwen2(f: Fields, config: dict[str, Any]) -> None:
    config.update(model_type="qwen2", architectures=["Qwen2ForCausalLM"])


def _qwen3(f: Fields, config: dict[str, Any]) -> None:
    config.update(model_type="qwen3", architectures=["Qwen3ForCausalLM"])


def _qwen3moe(f: Fields, config: dict[str, Any]) -> None:
    experts, width = f.integer("expert_count", high=65536), f.integer("expert_feed_forward_length")
    config.update(
        model_type="qwen3_moe",
        architectures=["Qwen3MoeForCausalLM"],
        num_experts=experts,
        num_experts_per_tok=f.integer("expert_used_count", high=experts),
        moe_intermediate_size=width,
        intermediate_size=f.integer("feed_forward_length", width),  # of dense layers, of which GGUF has none
        norm_topk_prob=True,  # the architecture in GGUF knows nothing else
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )


def _smollm3(f: Fields, config: dict[str, Any]) -> None:
    config.update(model_type="smollm3", architectures=["SmolLM3ForCausalLM"], no_rope_layer_interval=4)


def _olmo2(f: Fields, config: dict[str, Any]) -> None:
    config.update(model_type="olmo2", architectures=["Olmo2ForCausalLM"])


def _phi3(f: Fields, config: dict[str, Any]) -> None:
    window = f.integer("attention.sliding_window", 0, 0, 2**31)
    config.update(model_type="phi3", architectures=["Phi3ForCausalLM"], sliding_window=window or None)
    if f.get("rope.scaling.original_context_length") is not None:
        config["original_max_position_embeddings"] = f.integer("rope.scaling.original_context_length", high=2**31)


def _gemma(f: Fields, config: dict[str, Any], largest: int, every: int) -> None:
    """Common to gemma2 and 3: every `every`th layer sees everything, the others a window."""
    layers = config["num_hidden_layers"]
    pattern = f.get("attention.sliding_window_pattern")
    windows = [bool((i + 1) % every) for i in range(layers)]
    if pattern is not None and pattern not in (every, windows):
        raise f.bad("attention.sliding_window_pattern", pattern, f"{every}, as in every model of this kind")
    # The largest model of each generation scales queries by the width a head would have without key_length.
    scalar = config["hidden_size"] // config["num_attention_heads"] if layers == largest else config["head_dim"]
    config.update(
        hidden_activation=config.pop("hidden_act") and "gelu_pytorch_tanh",
        query_pre_attn_scalar=scalar,
        sliding_window=f.integer("attention.sliding_window", high=2**31),
        layer_types=["sliding_attention" if w else "full_attention" for w in windows],
    )


def _gemma2(f: Fields, config: dict[str, Any]) -> None:
    _gemma(f, config, largest=46, every=2)
    config.update(
        model_type="gemma2",
        architectures=["Gemma2ForCausalLM"],
        attn_logit_softcapping=f.number("attn_logit_softcapping", 50.0),
        final_logit_softcapping=f.number("final_logit_softcapping", 30.0),
    )
    f.equal("rope.freq_base_swa", config["rope_parameters"]["rope_theta"])


def _gemma3(f: Fields, config: dict[str, Any]) -> None:
    _gemma(f, config, largest=62, every=6)
    local = {"rope_type": "default", "rope_theta": f.number("rope.freq_base_swa", 1e4)}
    rope = {"full_attention": config["rope_parameters"], "sliding_attention": local}
    config.update(model_type="gemma3_text", architectures=["Gemma3ForCausalLM"], rope_parameters=rope)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        config[name] = f.number(name) if f.get(name) is not None else None


def _gpt_oss(f: Fields, config: dict[str, Any]) -> None:
    experts = f.integer("expert_count", high=65536)
    config.update(
        model_type="gpt_oss",
        architectures=["GptOssForCausalLM"],
        num_local_experts=experts,
        num_experts_per_tok=f.integer("expert_used_count", high=experts),
        intermediate_size=f.integer("expert_feed_forward_length"),
        sliding_window=f.integer("attention.sliding_window", high=2**31),
        layer_types=["full_attention" if i % 2 else "sliding_attention" for i in range(config["num_hidden_layers"])],
        swiglu_limit=7.0,
    )
    f.get("feed_forward_length")  # repeats the size of an expert
    f.equal("rope.freq_base_swa", config["rope_parameters"]["rope_theta"])
    config["rope_parameters"]["truncate"] = False


_FAMILIES: dict[str, Callable[[Fields, dict[str, Any]], None]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "smollm3": _smollm3,
    "gpt-oss": _gpt_oss,
}
ARCHITECTURES = tuple(_FAMILIES)
