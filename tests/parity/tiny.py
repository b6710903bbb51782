"""Tiny random models of every architecture, made and saved by transformers, with what transformers says they answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

WINDOW = 11
NEW_TOKENS = 64
PROMPT_LENGTHS = (5, 40, 1, 12, 23)  # shorter than the window, far longer, one token, one more than the window

# Pairwise different, and 6 heads of 16 are not 60, so that no swapped dim can pass.
_SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 60, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "bos_token_id": 3,
    "eos_token_id": 5, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
_EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
_MOE = {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 28}
_GEMMA = {"query_pre_attn_scalar": 24, "sliding_window": WINDOW, "tie_word_embeddings": True}
_GEMMA3 = _GEMMA | {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    },
}
_VISION = {
    "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 5, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def _rope(rule: str, **numbers: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rule, "rope_theta": 5e3, **numbers}}


# name: the class in transformers without its "ForCausalLM", and what differs from the sizes above
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-biases-tied": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu"},
    ),
    "llama-linear": ("Llama", _rope("linear", factor=2.5)),
    "llama-llama3": (
        "Llama",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama-yarn": ("Llama", _rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "llama-yarn-mscale": (
        "Llama",
        _rope("yarn", factor=4.0, original_max_position_embeddings=64, mscale=0.7, mscale_all_dim=1.3, beta_fast=8.0),
    ),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "mistral-full": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2-sliding": ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {}),
    "qwen3-biases": ("Qwen3", {"attention_bias": True}),
    "qwen3_moe": ("Qwen3Moe", _MOE | {"norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3_moe-sliding": (
        "Qwen3Moe",
        _MOE | {"decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": WINDOW},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 3}),
    "mixtral-sliding": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": WINDOW}),
    "gemma2": ("Gemma2", _GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 8.0}),
    "gemma2-uncapped": ("Gemma2", _GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3_text": ("Gemma3", _GEMMA3),
    "gemma3-vision": ("Gemma3ForConditionalGeneration", _GEMMA3),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3-partial": (
        "Phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 0.75}}
        | {"sliding_window": WINDOW},
    ),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "smollm3-sliding": (
        "SmolLM3",
        {"no_rope_layers": [0, 1, 0], "use_sliding_window": True, "sliding_window": WINDOW, "attention_bias": True},
    ),
    "gpt_oss": ("GptOss", {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": WINDOW}),
}


@dataclass(frozen=True)
class Tiny:
    """A saved model, prompts for it, and what transformers makes of each prompt alone."""

    name: str
    folder: Path
    prompts: list[list[int]]
    logits: list[torch.Tensor]  # of each prompt, (tokens, vocab)
    answers: list[list[int]]
    rough: list[torch.Tensor]  # the logits in bfloat16


@torch.no_grad()
def make(name: str, folder: Path) -> Tiny:
    model = save(name, folder)
    prompts = [torch.randint(_SIZES["vocab_size"], (1, n)) for n in PROMPT_LENGTHS]
    logits = [model(p).logits[0] for p in prompts]
    # Without a mask, transformers would take a token that happens to be the padding token for padding.
    answers = [model.generate(p, attention_mask=torch.ones_like(p))[0, p.shape[1] :].tolist() for p in prompts]
    model.bfloat16()
    rough = [model(p).logits[0].float() for p in prompts]
    return Tiny(name, folder, [p[0].tolist() for p in prompts], logits, answers, rough)


@torch.no_grad()
def save(name: str, folder: Path) -> Any:
    """A folder with the model and a tokenizer; gives transformers' model."""
    kind, changes = TINY[name]
    sizes = {**_SIZES, **changes}
    torch.manual_seed(1000 + sorted(TINY).index(name))
    if kind == "Gemma3ForConditionalGeneration":
        config = transformers.Gemma3Config(text_config=sizes, vision_config=_VISION)
        model = transformers.Gemma3ForConditionalGeneration._from_config(config, **_EAGER)
    else:
        config = getattr(transformers, f"{'Gemma3Text' if kind == 'Gemma3' else kind}Config")(**sizes)
        model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, **_EAGER)
    model.eval().float()
    for leaf, p in model.named_parameters():
        _scatter(leaf, p)
    model.tie_weights()
    model.generation_config = transformers.GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
    model.save_pretrained(folder)
    write_tokenizer(folder, sizes["vocab_size"])
    return model


def _scatter(name: str, p: torch.Tensor) -> None:
    """Numbers of a size at which every part of the model matters: a norm or a bias left out changes the answer."""
    if "norm" in name:
        p.uniform_(0.5, 1.5)
    elif name.endswith("bias") or name.endswith("sinks") or p.dim() == 1:
        p.normal_()
    elif "embed_tokens" in name:
        p.normal_(std=0.3)
    elif "experts.gate_up_proj" in name or "experts.down_proj" in name:
        p.normal_(std=0.15)
    else:
        p.normal_(std=1.3 / p.shape[-1] ** 0.5)
    if "lm_head" in name:
        p.mul_(2)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """One byte a token, in GPT-2's alphabet: enough to turn any ids into some text."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[:vocab_size]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
