"""SmolLM2-135M-Instruct itself: 64 greedy tokens against transformers on the same dequantized weights, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers

from slipstream import LLM, SamplingParams

NEW_TOKENS = 64
PROMPTS = [
    "The tide",
    "Once upon a time, in a village by the sea, there lived an old clockmaker who had never once been late.",
    "def fibonacci(n):\n",
    "Gravity is",
    "<|im_start|>user\nExplain gravity to a child.<|im_end|>\n<|im_start|>assistant\n",
    "1, 2, 3, 5, 8,",
    "Die Hauptstadt von Deutschland ist",
    "The three laws of thermodynamics are:\n1.",
    "Q: What is the boiling point of water?\nA:",
    "import numpy as np\n\nx = np.",
    "Dear Sir or Madam,",
    "Le chat est",
    "The quick brown fox jumps over the lazy dog. " * 6,
    "{\"name\": \"Ada\", \"born\":",
    "SELECT name FROM users WHERE",
    "To make bread you need flour, water, salt and",
    "In 1969,",
    "She opened the door and",
    "Photosynthesis is the process by which",
    "🌊 waves",
]  # fmt: skip


@pytest.fixture(scope="module")
def theirs(smollm2: Path) -> transformers.LlamaForCausalLM:
    """transformers' Llama filled by the gguf library's own reader, numbers and names."""
    reader = gguf.GGUFReader(smollm2)
    facts = {name.removeprefix("llama."): field.contents() for name, field in reader.fields.items()}
    heads, kv_heads = facts["attention.head_count"], facts["attention.head_count_kv"]
    config = transformers.LlamaConfig(
        vocab_size=len(facts["tokenizer.ggml.tokens"]),
        hidden_size=facts["embedding_length"],
        intermediate_size=facts["feed_forward_length"],
        num_hidden_layers=facts["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=facts["context_length"],
        rms_norm_eps=facts["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": facts["rope.freq_base"]},
        tie_word_embeddings=True,
    )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    state: dict[str, Any] = {}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    back = {f"{names.get_name(n.removesuffix('.weight'))}.weight": n for n, _ in model.named_parameters()}
    for t in reader.tensors:
        w = torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()).float()
        for part, count in (("attn_q", heads), ("attn_k", kv_heads)):
            if f".{part}." in t.name:  # llama.cpp interleaves the halves of a head
                w = w.view(count, -1, 2, w.shape[-1]).transpose(1, 2).reshape(w.shape)
        state[back[t.name]] = w
    model = transformers.LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    model.tie_weights()
    model.generation_config = transformers.GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
    return model.eval()


known: dict[str | None, list[int]] = {}  # what transformers answered; it is the slow part


def _same(smollm2: Path, theirs: transformers.LlamaForCausalLM, prompts: list[str], **options: Any) -> None:
    llm = LLM(smollm2, dtype="float32", max_model_len=512, **options)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS, ignore_eos=True))
    for output in outputs:
        ids = torch.tensor([output.prompt_token_ids])
        if output.prompt not in known:
            known[output.prompt] = theirs.generate(ids, attention_mask=torch.ones_like(ids))[0, ids.shape[1] :].tolist()
        want = known[output.prompt]
        assert output.outputs[0].token_ids == want, output.prompt


def test_three_prompts(smollm2: Path, theirs: transformers.LlamaForCausalLM) -> None:
    _same(smollm2, theirs, PROMPTS[:3], quantization="dequantize")


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["dequantize", "auto"])
def test_twenty_prompts(smollm2: Path, theirs: transformers.LlamaForCausalLM, quantization: str) -> None:
    """Also with the weights in their blocks: in float32 they are the same numbers."""
    _same(smollm2, theirs, PROMPTS, quantization=quantization)
