"""The engine on a CUDA device, with graphs and with steps made ahead. Run with: pytest -m gpu tests/gpu"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import LLM, SamplingParams
from tests.engine.test_graphs import MORE
from tests.engine.test_schedules import ask, play_many
from tests.parity import tiny as parity

pytestmark = pytest.mark.gpu
SHAPE = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 320, "intermediate_size": 96,
    "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 999,
    "num_local_experts": 8, "num_experts_per_tok": 4, "sliding_window": 24, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "attention_bias": True, "swiglu_limit": 7.0, "rope_theta": 150000, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "eos_token_id": 5, "quantization_config": {"quant_method": "mxfp4"},
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shape")
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return folder


def load(folder: Path, **options: Any) -> LLM:
    return LLM(folder, weights="random", device="cuda", max_model_len=512, max_num_seqs=24, **options)


def test_any_schedule_gives_the_answers_made_alone(tmp_path: Path) -> None:
    """Whole prompts and pieces, steps of any size recorded and not, with preemptions, shared pages and cancellations."""
    parity.save("gpt_oss", tmp_path / "gpt_oss")
    model = ask(tmp_path / "gpt_oss", count=24, vocab=97, prompt=45, new=9, device="cuda")
    play_many(model, range(8), each=8)


@pytest.mark.parametrize("more", [False, True], ids=["plain", "drawn"])
def test_the_plan_records_steps_and_makes_them_ahead(shape: Path, more: bool) -> None:
    llm = load(shape, dtype="float32")
    assert llm.plan.cuda_graphs and llm.plan.async_scheduling
    prompts = [[7 * i + j for j in range(3 + 11 * i)] for i in range(9)]
    params = [
        SamplingParams(
            temperature=0.8 * (i % 2),
            seed=i,
            max_new_tokens=5 + 6 * i,
            ignore_eos=True,
            **(MORE[i % 6] if more else {}),
        )
        for i in range(9)
    ]
    got = [o.outputs[0].token_ids for o in llm.generate_batch(prompts, params)]
    decoder = llm.engine.runner.decoder
    assert decoder is not None and len(decoder.recorded) > 3
    for options in (
        {"enforce_eager": True, "async_scheduling": False},
        {"enforce_eager": True},
        {"async_scheduling": False},
    ):
        other = load(shape, dtype="float32", **options)
        assert (other.engine.runner.decoder is None) == bool(options.get("enforce_eager"))
        assert [o.outputs[0].token_ids for o in other.generate_batch(prompts, params)] == got, options


@pytest.mark.parametrize("rows", [1, 5, 24])
def test_a_step_repeated_is_the_same_to_the_bit(shape: Path, rows: int) -> None:
    llm = load(shape)
    llm.generate([[i + 3, 9, 4] for i in range(rows)], SamplingParams(temperature=0, max_new_tokens=4, ignore_eos=True))
    decoder = llm.engine.runner.decoder
    assert decoder is not None
    replay = max(decoder.recorded.items(), key=lambda item: item[0].rows)[1]
    tokens = decoder._answers[0].clone()
    first = replay().clone()
    for _ in range(200):
        decoder._answers[0].copy_(tokens)
        assert torch.equal(replay(), first)


def test_what_is_held_is_what_was_planned(shape: Path) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    llm = load(shape, kv_cache_memory_bytes=64 << 20, max_num_batched_tokens=512)
    prompts = [[i + j for j in range(100)] for i in range(24)]
    llm.generate(prompts, SamplingParams(temperature=0, max_new_tokens=16, ignore_eos=True))
    total = llm.plan.to_dict()["bytes"]["total"]
    assert torch.cuda.max_memory_allocated() - before <= total


def test_smollm2_in_bfloat16_answers_as_on_a_cpu_in_float32(smollm2: Path) -> None:
    """At least 18 of 20 prompts have the same 32 greedy tokens."""
    prompts = [
        "The capital of France is", "Water boils at", "Once upon a time", "The three primary colors are",
        "def fibonacci(n):", "The first president of the United States was", "Photosynthesis is the process by which",
        "To make bread you need", "The opposite of hot is", "In 1969, humans", "A triangle has", "The largest ocean is",
        "Shakespeare wrote", "The speed of light is", "My favorite book is", "Dogs are", "The sun rises in the",
        "Two plus two equals", "The Great Wall of China", "An apple a day",
    ]  # fmt: skip
    params = SamplingParams(temperature=0, max_new_tokens=32, ignore_eos=True)
    answers = [
        [
            o.outputs[0].token_ids
            for o in LLM(smollm2, device=device, dtype=dtype, max_model_len=256).generate(prompts, params)
        ]
        for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16"))
    ]
    same = sum(a == b for a, b in zip(*answers, strict=True))
    assert same >= 18, same
