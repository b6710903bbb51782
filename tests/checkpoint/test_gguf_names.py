"""One tiny model of each architecture, saved by transformers and converted to GGUF here by the gguf library's own
naming: opened as GGUF it must be the same model, name by name, number by number, config by config."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from slipstream.checkpoint.open import Checkpoint, open_checkpoint
from slipstream.config import ModelConfig
from slipstream.errors import CheckpointError

# 6 heads of 16 are not 84: head_dim must be read, not derived.
SIZES = {
    "vocab_size": 71, "hidden_size": 84, "intermediate_size": 112, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 640, "rms_norm_eps": 1e-5, "bos_token_id": 3,
    "eos_token_id": 5, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 160}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
# name: GGUF architecture, transformers' class, what differs from SIZES
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", {}),
    "llama with biases": ("llama", "Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama tied": ("llama", "Llama", {"tie_word_embeddings": True}),
    "llama linear": ("llama", "Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}}),
    "llama yarn": ("llama", "Llama", {"rope_parameters": YARN}),
    "llama3": ("llama", "Llama", {"rope_parameters": LLAMA3}),
    "mistral": ("llama", "Mistral", {"sliding_window": 48}),
    "mixtral": ("llama", "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 3}),
    "qwen2": ("qwen2", "Qwen2", {"head_dim": None, "num_attention_heads": 7, "num_key_value_heads": 7}),
    "qwen3": ("qwen3", "Qwen3", {}),
    "qwen3moe": (
        "qwen3moe",
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "norm_topk_prob": True},
    ),
    "gemma2": ("gemma2", "Gemma2", {"query_pre_attn_scalar": 16, "sliding_window": 48, "tie_word_embeddings": True}),
    "gemma2 27b": (
        "gemma2",
        "Gemma2",
        {"query_pre_attn_scalar": 84 // 6, "sliding_window": 48, "tie_word_embeddings": True, "num_hidden_layers": 46},
    ),
    "gemma3": (
        "gemma3",
        "Gemma3",
        {
            "query_pre_attn_scalar": 16,
            "sliding_window": 48,
            "tie_word_embeddings": True,
            "rope_parameters": GEMMA3_ROPE,
            "num_hidden_layers": 7,
        },
    ),
    "phi3": (
        "phi3",
        "Phi3",
        {"head_dim": None, "num_attention_heads": 7, "num_key_value_heads": 7, "sliding_window": 47},
    ),
    "phi3 partial": (
        "phi3",
        "Phi3",
        {
            "head_dim": None,
            "num_attention_heads": 7,
            "num_key_value_heads": 7,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "olmo2": ("olmo2", "Olmo2", {"head_dim": None, "num_attention_heads": 7, "num_key_value_heads": 7}),
    "smollm3": ("smollm3", "SmolLM3", {"head_dim": None, "num_attention_heads": 14}),
    "gpt-oss": ("gpt-oss", "GptOss", {"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 48}),
}


def build(name: str, folder: Path) -> tuple[str, Any]:
    arch, kind, changes = MODELS[name]
    config_class = getattr(transformers, kind + ("TextConfig" if kind == "Gemma3" else "Config"))
    config = config_class(**{k: v for k, v in (SIZES | changes).items() if v is not None})
    torch.manual_seed(0)
    model = getattr(transformers, kind + "ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms too, which begin as all ones or zeros
            parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(folder)
    return arch, model.config


def permute(value: torch.Tensor, heads: int) -> torch.Tensor:
    """What convert_hf_to_gguf does to query and key rows of llama: the two halves of a head, taken in turn."""
    return torch.cat([torch.stack(h.chunk(2), 1).flatten(0, 1) for h in value.chunk(heads)])


def to_gguf(arch: str, config: Any, saved: Checkpoint, out: Path, more: Callable[[gguf.GGUFWriter], Any]) -> Path:
    """A converter from the gguf library's tables; only what it does to values is written here."""
    tensors: dict[str, Any] = {}
    stacks: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    number = gguf.MODEL_ARCH_NAMES and next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)

    def put(name: str, value: torch.Tensor) -> None:
        mapped = names.get_name(name, (".weight", ".bias"))
        assert mapped, name
        tensors[mapped] = value

    for name in saved.tensors:
        value = saved.read(name)
        if arch in ("llama", "smollm3") and re.search(r"\.[qk]_proj\.", name):
            value = permute(value, config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        if found := re.fullmatch(r"(.*experts)\.(\d+)(\..*)", name):
            stacks[found[1] + found[3]][int(found[2])] = value
        elif arch == "gpt-oss" and "gate_up_proj" in name:
            for part, half in (("gate", value[..., ::2]), ("up", value[..., 1::2])):
                stem = f"blk.{name.split('.')[2]}.ffn_{part}_exps."
                tensors[stem + ("bias" if name.endswith("bias") else "weight")] = half if "bias" in name else half.mT
        elif arch == "gpt-oss" and "experts.down_proj" in name:
            stem = f"blk.{name.split('.')[2]}.ffn_down_exps."
            tensors[stem + ("bias" if name.endswith("bias") else "weight")] = value if "bias" in name else value.mT
        elif name.endswith("sinks"):
            put(name + ".weight", value)
        else:
            put(name, value)
    for name, parts in stacks.items():
        put(name, torch.stack([parts[i] for i in range(len(parts))]))

    w = gguf.GGUFWriter(out, arch)
    w.add_block_count(config.num_hidden_layers)
    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(config.hidden_size)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_head_count(config.num_attention_heads)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    w.add_vocab_size(config.vocab_size)
    w.add_bos_token_id(config.bos_token_id)
    w.add_eos_token_id(config.eos_token_id)
    head_dim = getattr(config, "head_dim", None)
    if head_dim:
        w.add_key_length(head_dim)
        w.add_value_length(head_dim)
    rope = config.rope_parameters
    if "full_attention" in rope:
        rope = rope["full_attention"]
    part = rope.get("partial_rotary_factor", 1)
    w.add_rope_dimension_count(int((head_dim or config.hidden_size // config.num_attention_heads) * part))
    if arch != "gemma2":  # whose converter leaves it to the default
        w.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        w.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        w.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        plain = 1 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2) / head_dim)
        tensors["rope_freqs.weight"] = plain / ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    if getattr(config, "sliding_window", None):
        w.add_sliding_window(config.sliding_window)
    experts = getattr(config, "num_local_experts", getattr(config, "num_experts", 0))
    if experts:
        w.add_expert_count(experts)
        w.add_expert_used_count(config.num_experts_per_tok)
    if arch == "qwen3moe":
        w.add_expert_feed_forward_length(config.moe_intermediate_size)
    if arch == "gpt-oss":
        w.add_expert_feed_forward_length(config.intermediate_size)
    if arch == "phi3":
        w.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if arch == "gemma2":
        w.add_attn_logit_softcapping(config.attn_logit_softcapping)
        w.add_final_logit_softcapping(config.final_logit_softcapping)
    more(w)
    for name, value in tensors.items():
        w.add_tensor(name, np.ascontiguousarray(value.float().numpy()))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return out


Make = Callable[..., tuple[Checkpoint, Path]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(name: str, more: Callable[[gguf.GGUFWriter], Any] = lambda w: None) -> tuple[Checkpoint, Path]:
        arch, config = build(name, tmp_path / "hf")
        saved = open_checkpoint(tmp_path / "hf")
        return saved, to_gguf(arch, config, saved, tmp_path / "m.gguf", more)

    return made


@pytest.mark.parametrize("name", [n for n in MODELS if n != "gpt-oss"])
def test_same_model_as_in_safetensors(make: Make, name: str) -> None:
    saved, path = make(name)
    found = open_checkpoint(path)
    assert found.kind == "gguf" and found.tensors.keys() == saved.tensors.keys()
    for tensor in saved.tensors:
        want, got = saved.read(tensor), found.read(tensor)
        assert found.tensors[tensor].shape == want.shape
        # (w + 1) - 1 rounds for gemma's norms
        torch.testing.assert_close(got, want, rtol=0, atol=3e-7 if found.tensors[tensor].add else 0)
    want_config, got_config = ModelConfig.from_hf(saved.config), ModelConfig.from_hf(found.config)
    assert got_config == dataclasses.replace(want_config, dtype=got_config.dtype)
    assert found.config["architectures"] == saved.config["architectures"]
    assert found.generation_config == {"bos_token_id": 3, "eos_token_id": 5}


def test_gpt_oss_keeps_gate_and_up_apart(make: Make) -> None:
    saved, path = make("gpt-oss")
    found = open_checkpoint(path)
    experts = "model.layers.2.mlp.experts."
    rest = {n for n in saved.tensors if ".experts." not in n}
    assert {n for n in found.tensors if ".experts." not in n} == rest
    for name in rest:
        assert torch.equal(found.read(name), saved.read(name))
    for e in range(4):
        for part, at in (("gate", 0), ("up", 1)):
            weight = saved.read(experts + "gate_up_proj")[e, :, at::2].T
            assert torch.equal(found.read(f"{experts}{e}.{part}_proj.weight"), weight)
            bias = saved.read(experts + "gate_up_proj_bias")[e, at::2]
            assert torch.equal(found.read(f"{experts}{e}.{part}_proj.bias"), bias)
        assert torch.equal(found.read(f"{experts}{e}.down_proj.weight"), saved.read(experts + "down_proj")[e].T)
        assert torch.equal(found.read(f"{experts}{e}.down_proj.bias"), saved.read(experts + "down_proj_bias")[e])
    want_config, got_config = ModelConfig.from_hf(saved.config), ModelConfig.from_hf(found.config)
    assert got_config == dataclasses.replace(want_config, dtype=got_config.dtype)


def test_raw_blocks_are_unpermuted_too(tmp_path: Path) -> None:
    name, heads = "model.layers.0.self_attn.q_proj.weight", 6
    kind = gguf.GGMLQuantizationType.Q8_0
    query = torch.randn(96, 64)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    for key, value in {"block_count": 1, "context_length": 8, "embedding_length": 64, "feed_forward_length": 8}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_head_count(heads)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.ones((5, 64), np.float32))
    writer.add_tensor("blk.0.attn_q.weight", gguf.quantize(permute(query, heads).numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = open_checkpoint(tmp_path / "q.gguf")
    assert found.tensors[name].row_permute == heads and found.tensors[name].dtype == "Q8_0"
    np.testing.assert_array_equal(found.read_weight(name).data.numpy(), gguf.quantize(query.numpy(), kind))
    want = gguf.dequantize(gguf.quantize(query.numpy(), kind), kind)
    np.testing.assert_array_equal(found.dequantize(name, torch.float32).numpy(), want)
    with pytest.raises(CheckpointError, match="packed as Q8_0"):
        found.read(name)


REFUSED: list[tuple[str, str, Callable[[gguf.GGUFWriter], Any], str]] = [
    ("a key nobody knows", "llama", lambda w: w.add_float32("llama.attention.scale", 0.5), "llama.attention.scale"),
    ("residual scale", "llama", lambda w: w.add_float32("llama.residual_scale", 2.0), "residual_scale"),
    ("head sizes differ", "llama", lambda w: w.add_uint32("llama.attention.value_length_swa", 8), "value_length_swa"),
    ("unknown rope scaling", "llama", lambda w: w.add_string("llama.rope.scaling.type", "spiral"), "scaling"),
    ("rope scaling a number", "llama", lambda w: w.add_uint32("llama.rope.scaling.type", 7), "scaling"),
    ("yarn attention factor", "llama yarn", lambda w: w.add_rope_scaling_attn_factors(0.7), "attn_factor"),
    ("olmo3", "olmo2", lambda w: w.add_sliding_window(48), "olmo2.attention.sliding_window"),
    ("surplus tensor", "llama", lambda w: w.add_tensor("blk.0.ssm_in.weight", np.ones(3, np.float32)), "ssm_in"),
    ("layer too many", "llama", lambda w: w.add_tensor("blk.6.attn_norm.weight", np.ones(3, np.float32)), "blk.6"),
    ("eos outside", "llama", lambda w: w.add_eot_token_id(71), "eot_token_id is '71'"),
    ("odd frequencies", "llama", lambda w: w.add_tensor("rope_freqs.weight", np.full(8, 3, np.float32)), "llama3 rule"),
    ("zero frequency", "llama", lambda w: w.add_tensor("rope_freqs.weight", np.zeros(8, np.float32)), "positive"),
    ("experts missing", "qwen3moe", lambda w: w.add_tensor("blk.6.x.weight", np.ones(3, np.float32)), "blk.6"),
]


@pytest.mark.parametrize(("name", "more", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_cannot_be_mapped_faithfully(
    make: Make, name: str, more: Callable[[gguf.GGUFWriter], Any], message: str
) -> None:
    _, path = make(name, more)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_several_ends(make: Make) -> None:
    def ends(w: gguf.GGUFWriter) -> None:
        w.add_eot_token_id(7)
        w.add_eom_token_id(5)

    _, path = make("llama", ends)
    assert open_checkpoint(path).config["eos_token_id"] == [5, 7]


def test_unit_frequencies_are_no_scaling(make: Make) -> None:
    _, path = make("llama", lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32)))
    assert open_checkpoint(path).config["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}


def test_phi3_longrope(make: Make) -> None:
    long, short = np.linspace(1, 30, 8, dtype=np.float32), np.linspace(1, 2, 8, dtype=np.float32)

    def more(w: gguf.GGUFWriter) -> None:
        w.add_tensor("rope_factors_long.weight", long)
        w.add_tensor("rope_factors_short.weight", short)
        w.add_rope_scaling_attn_factors(1.19)

    _, path = make("phi3", more)
    rope = open_checkpoint(path).config["rope_parameters"]
    assert (rope["rope_type"], rope["original_max_position_embeddings"], rope["attention_factor"]) == (
        "longrope",
        4096,
        1.19,
    )
    np.testing.assert_array_equal(np.float32(rope["long_factor"]), long)
    np.testing.assert_array_equal(np.float32(rope["short_factor"]), short)


def test_unknown_architecture_lists_the_known(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"'mamba' cannot be read; known are llama, qwen2, .*gpt-oss"):
        open_checkpoint(tmp_path / "m.gguf")


def test_smollm2(smollm2: Path) -> None:
    found = open_checkpoint(smollm2)
    reader = gguf.GGUFReader(smollm2)
    assert len(found.tensors) == len(reader.tensors) == 272
    assert found.total_bytes == sum(int(t.n_bytes) for t in reader.tensors)
    assert found.metadata["tokenizer.ggml.merges"] == reader.fields["tokenizer.ggml.merges"].contents()
    config = ModelConfig.from_hf(found.config)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.num_layers) == (9, 3, 64, 30)
    assert (config.layers[0].rope.theta, config.rms_norm_eps, config.eos_token_ids) == (1e5, 1e-5, (2,))  # type: ignore
    theirs = next(t for t in reader.tensors if t.name == "blk.7.attn_k.weight")
    want = torch.from_numpy(gguf.dequantize(theirs.data, theirs.tensor_type))
    assert torch.equal(permute(found.dequantize("model.layers.7.self_attn.k_proj.weight", torch.float32), 3), want)
