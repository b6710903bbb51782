"""config.json against what transformers' own config classes make of the same file, and every field that is refused."""

from __future__ import annotations

import time
from typing import Any

import pytest
import transformers

from slipstream.config import ModelConfig
from slipstream.config.reader import Reader
from slipstream.errors import CheckpointError
from slipstream.models import ARCHITECTURES

SIZES = {
    "vocab_size": 97, "hidden_size": 60, "intermediate_size": 44, "num_hidden_layers": 6, "num_attention_heads": 6,
}  # fmt: skip
# As files on the Hub are written, in the spelling of transformers 4: much is left to the defaults.
HUB: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama 3.1": {
        "model_type": "llama", "max_position_embeddings": 131072, "num_key_value_heads": 2, "rope_theta": 500000.0,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
                         "original_max_position_embeddings": 8192},
        "eos_token_id": [11, 13],
    },
    "llama linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 5e5},
    "llama yarn": {"model_type": "llama", "rope_scaling": {"type": "yarn", "factor": 4.0, "finetuned": True}},
    "mistral": {"num_key_value_heads": 2},
    "mistral without a window": {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 6},
    "mixtral": {"num_attention_heads": 8, "hidden_size": 64},
    "qwen2": {"num_attention_heads": 32, "hidden_size": 64},
    "qwen2 sliding": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 77, "max_window_layers": 4,
        "num_key_value_heads": 3,
    },
    "qwen2 with a window that is switched off": {
        "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 77, "max_window_layers": 2,
        "num_key_value_heads": 2,
    },
    "qwen3": {"num_key_value_heads": 2},
    "qwen3_moe": {"num_experts": 16, "num_attention_heads": 8, "hidden_size": 64, "mlp_only_layers": [1, 4]},
    "qwen3_moe sliding": {
        "model_type": "qwen3_moe", "num_attention_heads": 8, "hidden_size": 64, "use_sliding_window": True,
        "sliding_window": 9, "decoder_sparse_step": 2, "norm_topk_prob": True,
    },
    "gemma2": {"num_attention_heads": 12, "hidden_act": "silu"},
    "gemma2 without caps": {
        "model_type": "gemma2", "num_attention_heads": 4, "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    "gemma3_text": {"num_attention_heads": 4, "num_hidden_layers": 13, "rope_local_base_freq": 2e4, "rope_theta": 3e6},
    "gemma3_text of another pattern": {
        "model_type": "gemma3_text", "num_attention_heads": 4, "sliding_window_pattern": 3, "sliding_window": 21,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "phi3": {"num_key_value_heads": 2, "sliding_window": 2047},
    "phi3 partial": {"model_type": "phi3", "head_dim": 16, "partial_rotary_factor": 0.75, "rope_theta": 25.0},
    "olmo2": {"rope_theta": 5e5},
    "smollm3": {"num_attention_heads": 4, "hidden_size": 64},
    "smollm3 sliding": {
        "model_type": "smollm3", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "no_rope_layers": [1, 0, 1, 1, 0, 1], "use_sliding_window": True, "sliding_window": 31,
    },
    "gpt_oss": {"num_attention_heads": 8},
    "gpt_oss 20b": {
        "model_type": "gpt_oss", "num_attention_heads": 8, "num_local_experts": 32, "swiglu_limit": 7.0,
        "rope_theta": 150000,
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn", "truncate": False,
                         "original_max_position_embeddings": 4096},
    },
}  # fmt: skip


def raw(name: str, **changes: Any) -> dict[str, Any]:
    return {**SIZES, "model_type": name.split()[0], **HUB[name], **changes}


def theirs(config: dict[str, Any]) -> Any:
    kind = {**config}.pop("model_type")
    return transformers.CONFIG_MAPPING[kind](**{k: v for k, v in config.items() if k != "model_type"})


@pytest.mark.parametrize("name", HUB)
def test_as_transformers_reads_it(name: str) -> None:
    mine, want = ModelConfig.from_hf(raw(name)), theirs(raw(name))
    kind = mine.model_type
    assert mine.num_heads == want.num_attention_heads and mine.num_kv_heads == want.num_key_value_heads
    head_dim = getattr(want, "head_dim", None) or want.hidden_size // want.num_attention_heads
    assert mine.head_dim == head_dim
    assert mine.attention_scale == getattr(want, "query_pre_attn_scalar", head_dim) ** -0.5
    assert mine.rms_norm_eps == want.rms_norm_eps
    assert mine.max_position_embeddings == want.max_position_embeddings
    assert mine.tie_word_embeddings == want.tie_word_embeddings
    assert mine.attention_bias == getattr(want, "attention_bias", kind == "qwen2")
    act = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    assert mine.hidden_act == act[getattr(want, "hidden_activation", None) or want.hidden_act]
    assert mine.attn_logit_softcapping == getattr(want, "attn_logit_softcapping", None)
    assert mine.final_logit_softcapping == getattr(want, "final_logit_softcapping", None)

    experts = getattr(want, "num_local_experts", 0) or getattr(want, "num_experts", 0)
    assert mine.num_experts == experts
    if experts:
        assert mine.num_experts_per_tok == want.num_experts_per_tok
        assert mine.moe_intermediate_size == getattr(want, "moe_intermediate_size", want.intermediate_size)
        assert mine.norm_topk_prob == getattr(want, "norm_topk_prob", True)
    step, dense = getattr(want, "decoder_sparse_step", 1), getattr(want, "mlp_only_layers", [])
    for i, layer in enumerate(mine.layers):
        assert layer.moe == bool(experts and i not in dense and (i + 1) % step == 0)
        if getattr(want, "layer_types", None):
            assert layer.kind == want.layer_types[i]
        sliding = layer.kind == "sliding_attention"
        assert layer.window == (want.sliding_window if sliding else None)
        if not sliding and not getattr(want, "layer_types", None):
            assert getattr(want, "sliding_window", None) is None
        assert (layer.rope is not None) == bool(getattr(want, "no_rope_layers", [1] * 99)[i])
        if layer.rope is None:
            continue
        params = want.rope_parameters[layer.kind] if kind == "gemma3_text" else want.rope_parameters
        assert layer.rope.theta == params["rope_theta"] and layer.rope.kind == params["rope_type"]
        assert layer.rope.dim == int(head_dim * params.get("partial_rotary_factor", 1))
        assert layer.rope.truncate == params.get("truncate", True)
        for field in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            assert getattr(layer.rope, field) == (params[field] if field in params else getattr(layer.rope, field))
        if "original_max_position_embeddings" in params:
            assert layer.rope.original_max_position == params["original_max_position_embeddings"]


def test_every_architecture_is_read() -> None:
    assert {raw(name)["model_type"] for name in HUB} == set(ARCHITECTURES)
    with pytest.raises(CheckpointError, match="'gpt2' is not supported; known are gemma2, gemma3_text, gpt_oss, llama"):
        ModelConfig.from_hf({"model_type": "gpt2"})


def test_the_text_part_of_gemma3_as_the_hub_has_it() -> None:
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}  # fmt: skip
    mine = ModelConfig.from_hf(
        {
            "model_type": "gemma3",
            "eos_token_id": [1, 106],
            "torch_dtype": "bfloat16",
            "text_config": text,
            "vision_config": {},
        }
    )
    want = transformers.Gemma3Config(text_config={k: v for k, v in text.items() if k != "model_type"}).text_config
    assert (mine.vocab_size, mine.num_heads, mine.num_kv_heads) == (want.vocab_size, 8, 4)
    assert (mine.dtype, mine.eos_token_ids) == ("bfloat16", (1, 106))
    assert [layer.kind for layer in mine.layers] == want.layer_types
    ropes = {layer.kind: layer.rope for layer in mine.layers}
    full, sliding = ropes["full_attention"], ropes["sliding_attention"]
    assert full is not None and (full.kind, full.factor, full.theta) == ("linear", 8.0, 1e6)
    assert sliding is not None and (sliding.kind, sliding.theta) == ("default", 1e4)


SLIDING = ["sliding_attention"] * 6
YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type"),
        ("llama", {"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, "rope_type"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, "high_freq_factor"),
        ("llama", {"rope_scaling": YARN | {"truncate": 1}}, "truncate"),
        ("llama", {"rope_scaling": YARN | {"mrope_section": [2, 3]}}, "rope_parameters.mrope_section"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"layer_types": SLIDING, "sliding_window": 4}, "layer_types"),
        ("llama", {"layer_types": ["linear_attention"] * 6}, "layer_types"),
        ("llama", {"hidden_act": "relu"}, "hidden_act"),
        ("llama", {"clip_qkv": 8.0}, "clip_qkv"),
        ("llama", {"head_dim": 15}, "head_dim"),
        ("llama", {"num_key_value_heads": 4}, "num_key_value_heads"),
        ("mistral", {"layer_types": ["full_attention"] * 6, "num_key_value_heads": 2}, "layer_types"),
        ("mixtral", {"num_experts": 4, "num_local_experts": 8}, "num_experts"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ("qwen2", {"layer_types": SLIDING}, "layer_types"),
        ("qwen2", {"use_mrope": True}, "use_mrope"),
        ("qwen3", {"layer_types": SLIDING[:5]}, "layer_types"),
        ("qwen3_moe", {"mlp_only_layers": [True]}, "mlp_only_layers"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"sliding_window": None}, "sliding_window"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "linear", "factor": 8.0}}, "rope_parameters"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "longrope"),
        ("phi3", {"rope_scaling": {"type": "su"}}, "longrope"),
        ("phi3", {"head_dim": 16, "partial_rotary_factor": 0.6}, "partial_rotary_factor"),
        ("olmo2", {"clip_qkv": 1.0}, "clip_qkv"),
        ("olmo2", {"use_qk_norm": True}, "use_qk_norm"),
        ("smollm3", {"no_rope_layers": [1, 0, 2, 1, 1, 1]}, "no_rope_layers"),
        ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act"),
        ("gpt_oss", {"swiglu_limit": -1}, "swiglu_limit"),
        ("gpt_oss", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_would_change_the_result_and_is_not_supported_is_refused(
    name: str, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(CheckpointError) as e:
        ModelConfig.from_hf(raw(name, **changes))
    assert says in str(e.value)


def test_quantization_is_told_apart() -> None:
    assert ModelConfig.from_hf(raw("gpt_oss", quantization_config={"quant_method": "mxfp4"})).quantization == "mxfp4"
    assert ModelConfig.from_hf(raw("gpt_oss")).quantization is None


@pytest.mark.parametrize(
    "field", ["num_hidden_layers", "num_attention_heads", "vocab_size", "layer_types", "rope_scaling"]
)
@pytest.mark.parametrize("value", [-1, 0, 10**30, float("nan"), float("inf"), "x", [], [None], {}, {"a": 1}, True])
def test_nonsense_is_a_typed_error_or_harmless(field: str, value: object) -> None:
    for name in HUB:
        start = time.process_time()
        try:
            ModelConfig.from_hf(raw(name, **{field: value}))
        except CheckpointError as e:
            assert len(str(e)) < 500
        assert time.process_time() - start < 0.5


def test_the_reader_knows_the_architectures_that_are_built() -> None:
    with pytest.raises(CheckpointError) as e:
        Reader({"model_type": "nonesuch"})
    assert all(name in str(e.value) for name in ARCHITECTURES)
