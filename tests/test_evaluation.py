"""Perplexity against transformers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from slipstream import LLM, ConfigError, RequestError
from slipstream.evaluation import perplexity
from tests.engine.tiny import LLAMA, write

TEXT = "the rain in the harbour, and one more train; no ship is in sight tonight. " * 3


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = write(tmp_path_factory.mktemp("tiny"), LLAMA)
    return LLM(folder, kv_cache_memory_bytes=4 << 20, max_model_len=256)


@torch.no_grad()
@pytest.mark.parametrize("window", [2, 7, 64, 255, None])
def test_it_is_that_of_transformers(llm: LLM, window: int | None) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(llm.plan.loads[0].sources[0].file.parent).eval()
    ids = llm.tokenizer.encode(TEXT)
    assert 130 < len(ids) < 255 and len(ids) % 7 != 0
    window = window or len(ids) - 1  # one token is left over, which nothing predicts
    losses: list[float] = []
    for at in range(0, len(ids), window):
        part = torch.tensor([ids[at : at + window]])
        if part.shape[1] > 1:
            scores = model(part).logits[0, :-1].double().log_softmax(-1)
            losses += (-scores.gather(1, part[0, 1:, None])[:, 0]).tolist()
    assert perplexity(llm, TEXT, window=window) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


@pytest.mark.parametrize("window", [1, 0, 256, 2.5])
def test_a_window_that_cannot_be(llm: LLM, window: int) -> None:
    with pytest.raises(ConfigError, match="window: must be a whole number from 2 to 255"):
        perplexity(llm, TEXT, window=window)


@pytest.mark.parametrize("text", ["", "t"])
def test_too_little_text(llm: LLM, text: str) -> None:
    with pytest.raises(RequestError, match="at least 2"):
        perplexity(llm, text, window=9)


def test_what_is_no_number_is_not_hidden(tmp_path: Path) -> None:
    tensors = load_file(write(tmp_path, LLAMA) / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, tmp_path / "model.safetensors")
    assert math.isnan(perplexity(LLM(tmp_path, kv_cache_memory_bytes=4 << 20, max_model_len=64), TEXT, window=9))
