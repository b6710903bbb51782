"""Every architecture against transformers in float32: the logits of every position, and 64 greedy tokens.

transformers runs each prompt alone with its eager attention; slipstream runs all of them together, through the whole
path, once in whole prompts and once in small chunks over small pages with the reference attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from slipstream import LLM, SamplingParams
from slipstream.batch import build_batch
from slipstream.cache.pages import Pages
from slipstream.models import ARCHITECTURES
from slipstream.request import Chunk
from tests.parity.tiny import NEW_TOKENS, TINY, Tiny, make

WHOLE: dict[str, Any] = {}
CHUNKED: dict[str, Any] = {"page_size": 3, "max_num_batched_tokens": 7, "attn_implementation": "reference"}


@pytest.fixture(scope="module", params=TINY)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make(request.param, tmp_path_factory.mktemp("tiny") / request.param)


@pytest.fixture(scope="module", params=[WHOLE, CHUNKED], ids=["whole", "chunked"])
def llm(request: pytest.FixtureRequest, tiny: Tiny) -> Iterator[LLM]:
    yield LLM(tiny.folder, dtype="float32", kv_cache_memory_bytes=8 << 20, max_model_len=128, **request.param)


def test_every_architecture_is_here() -> None:
    assert {name.split("-")[0] for name in TINY} == {*ARCHITECTURES, "gemma3"}


def test_logits(llm: LLM, tiny: Tiny) -> None:
    assert min(x.abs().max() for x in tiny.logits) > 1
    for mine, theirs in zip(all_logits(llm, tiny.prompts), tiny.logits, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


def test_greedy(llm: LLM, tiny: Tiny) -> None:
    params = SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS, ignore_eos=True, prompt_logprobs=0)
    outputs = llm.generate(tiny.prompts, params)
    assert [o.outputs[0].token_ids for o in outputs] == tiny.answers
    for output, prompt, logits in zip(outputs, tiny.prompts, tiny.logits, strict=True):
        want = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(prompt[1:], dtype=torch.int64)[:, None])[:, 0]
        assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
        got = torch.tensor([p.logprob for p in output.prompt_logprobs[1:] if p is not None])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_bfloat16_is_as_near_to_float32_as_that_of_transformers(tiny: Tiny) -> None:
    llm = LLM(tiny.folder, dtype="bfloat16", kv_cache_memory_bytes=8 << 20, max_model_len=128)
    exact = torch.cat(tiny.logits)
    mine, theirs = (((torch.cat(x) - exact).norm() / exact.norm()) for x in (all_logits(llm, tiny.prompts), tiny.rough))
    assert mine < 1.1 * theirs + 0.002


@torch.inference_mode()
def all_logits(llm: LLM, prompts: list[list[int]]) -> list[torch.Tensor]:
    """The logits of every position of every prompt, prompts side by side, a chunk of each in every batch."""
    plan, runner = llm.plan, llm.engine.runner
    chunk = plan.max_num_batched_tokens
    pages = Pages(plan.groups, plan.num_pages, plan.page_size)
    found: list[list[torch.Tensor]] = [[] for _ in prompts]
    for start in range(0, max(map(len, prompts)), chunk):
        chunks = []
        for i, prompt in enumerate(prompts):
            ids = tuple(prompt[start : start + chunk])
            if ids:
                assert pages.reserve(i, start, start + len(ids))
                chunks.append(Chunk(i, start, ids, pages.tables(i), False))
        batch = build_batch(chunks, plan.groups, plan.page_size, plan.device, frozenset(range(len(prompts))))
        parts = runner.model(batch, runner.storage).split([len(c.token_ids) for c in chunks])
        for c, part in zip(chunks, parts, strict=True):
            found[c.sequence].append(part.clone())
    return [torch.cat(parts) for parts in found]
