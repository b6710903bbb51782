"""The runner's cache: which pages are really written, and what a batch of mixed work looks like."""

from __future__ import annotations

from pathlib import Path

import torch

from slipstream import LLM, SamplingParams
from slipstream.layers.transformer import Transformer


def test_a_sliding_groups_memory_stops_growing(hybrid: Path) -> None:
    """Every page starts as NaN: those that are no longer were written. 500 tokens, window 9, two layers of four."""
    llm = LLM(
        hybrid, kv_cache_memory_bytes=1 << 21, max_model_len=512, page_size=4, max_num_batched_tokens=8,
        enable_prefix_caching=False,
    )  # fmt: skip
    storage, plan = llm.engine.runner.storage, llm.plan
    assert storage.nbytes == plan.kv_bytes
    full, sliding = plan.groups
    assert (full.window, sliding.window, full.layers, sliding.layers) == (None, 9, (0, 1), (2, 3))

    def written(tensors: list[torch.Tensor]) -> list[int]:
        return [int((~t.isnan()).any(-1).any(-1).any(-1).any(0).sum()) for t in tensors]

    for t in (*storage.keys, *storage.values):
        t.fill_(float("nan"))
    pages = {}
    for length in (60, 500):
        llm.generate([[5] * 20], SamplingParams(temperature=0, max_new_tokens=length - 20, ignore_eos=True))
        assert written(storage.keys) == written(storage.values)
        pages[length] = written(storage.keys)
    # The last token is never written, as nothing comes after it.
    assert [p[0] for p in pages.values()] == [-(-59 // 4), -(-499 // 4)]
    assert pages[60][1] == pages[500][1] <= sliding.max_pages(500, 8, 4) == 5
    page_bytes = [4 * g.bytes_per_token(4) for g in plan.groups]
    used = sum(n * b for n, b in zip(pages[500], page_bytes, strict=True))
    assert used <= 0.55 * 500 * sum(g.bytes_per_token(4) for g in plan.groups)


def test_a_step_without_a_single_token_to_sample(hybrid: Path, monkeypatch: object) -> None:
    """All chunks are the beginnings of prompts: no logits are computed at all."""
    llm = LLM(hybrid, kv_cache_memory_bytes=1 << 20, max_model_len=100, max_num_batched_tokens=8)
    rows = []
    model = llm.engine.runner.model
    forward = Transformer.forward

    def watch(batch: object, cache: object) -> torch.Tensor:
        logits = forward(model, batch, cache)  # type: ignore[arg-type]
        rows.append(logits.shape[0])
        return logits

    monkeypatch.setattr(model, "forward", watch)  # type: ignore[attr-defined]
    llm.generate([[5] * 20], SamplingParams(temperature=0, max_new_tokens=2, ignore_eos=True))
    assert rows == [0, 0, 1, 1]


def test_logits_of_a_whole_prompt_only_where_asked(hybrid: Path, monkeypatch: object) -> None:
    llm = LLM(hybrid, kv_cache_memory_bytes=1 << 20, max_model_len=100)
    rows = []
    model = llm.engine.runner.model
    forward = Transformer.forward

    def watch(batch: object, cache: object) -> torch.Tensor:
        logits = forward(model, batch, cache)  # type: ignore[arg-type]
        rows.append(logits.shape[0])
        return logits

    monkeypatch.setattr(model, "forward", watch)  # type: ignore[attr-defined]
    params = SamplingParams(temperature=0, max_new_tokens=2, ignore_eos=True)
    streams = [llm.submit([5] * 20, params), llm.submit([6] * 7, params.replace(prompt_logprobs=0))]
    for s in streams:
        s.result()
    assert rows == [1 + 7, 2]
