"""A random model of a few kilobytes with a tokenizer of printable characters: enough to drive the whole engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from slipstream import LLM

BASE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 131, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "dtype": "float32", "eos_token_id": 1,
}  # fmt: skip
LLAMA = BASE | {"model_type": "llama"}
# Two layers look at everything, two at 9 tokens.
HYBRID = BASE | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}
LETTERS = "theinerandreonatennditesorteofedisitalarsttontngsehaasouiolevecomedehiriro"
PAIRS = list(dict.fromkeys(LETTERS[i : i + 2] for i in range(len(LETTERS) - 1)))


def write(folder: Path, config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """config.json, model.safetensors and tokenizer.json in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    draw = torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn(s, generator=draw) * (s[-1] ** -0.5 if len(s) > 1 else 0.2) for n, s in shapes(config)}
    tensors = {n: t + 1 if "norm" in n else t for n, t in tensors.items()}
    tensors["model.embed_tokens.weight"] *= 4
    if "lm_head.weight" in tensors:
        tensors["lm_head.weight"] *= 3
    save_file({n: t.to(dtype) for n, t in tensors.items()}, folder / "model.safetensors")
    alphabet = ["<s>", "</s>", *(chr(c) for c in range(33, 127)), "\u0120"]  # the last one spells a space
    vocab = {t: i for i, t in enumerate([*alphabet, *PAIRS][: config["vocab_size"]])}
    merges = [(p[0], p[1]) for p in PAIRS if p in vocab]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


def shapes(config: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = hidden // config["num_attention_heads"]
    q, kv = hidden, head * config["num_key_value_heads"]
    found: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", (vocab, hidden)),
        ("model.norm.weight", (hidden,)),
    ]
    if not config["tie_word_embeddings"]:
        found.append(("lm_head.weight", (vocab, hidden)))
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        for name, out in (("q", q), ("k", kv), ("v", kv)):
            found.append((f"{at}self_attn.{name}_proj.weight", (out, hidden)))
            if config["model_type"] == "qwen2":
                found.append((f"{at}self_attn.{name}_proj.bias", (out,)))
        found += [
            (f"{at}self_attn.o_proj.weight", (hidden, q)),
            (f"{at}mlp.gate_proj.weight", (inner, hidden)),
            (f"{at}mlp.up_proj.weight", (inner, hidden)),
            (f"{at}mlp.down_proj.weight", (hidden, inner)),
            (f"{at}input_layernorm.weight", (hidden,)),
            (f"{at}post_attention_layernorm.weight", (hidden,)),
        ]
    return found


def check_idle(llm: LLM) -> None:
    """Nothing runs or waits, and no page is held."""
    scheduler = llm.engine.scheduler
    assert not scheduler.busy and not llm.engine._answers
    scheduler.pages.check()
    assert all(p.num_free == p.num_pages for p in scheduler.pages.pools)
