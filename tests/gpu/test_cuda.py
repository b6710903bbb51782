"""Every architecture on a CUDA device in float32 against transformers on the CPU. Run with: pytest -m gpu tests/gpu"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from slipstream import LLM, SamplingParams
from tests.parity.test_architectures import all_logits
from tests.parity.tiny import NEW_TOKENS, TINY, Tiny, make

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=TINY)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make(request.param, tmp_path_factory.mktemp("tiny") / request.param)


@pytest.fixture(params=[{}, {"page_size": 3, "max_num_batched_tokens": 7}], ids=["whole", "chunked"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {
        "device": "cuda",
        "dtype": "float32",
        "kv_cache_memory_bytes": 8 << 20,
        "max_model_len": 128,
        **request.param,
    }


def test_logits_and_greedy_tokens(tiny: Tiny, options: dict[str, Any]) -> None:
    llm = LLM(tiny.folder, **options)
    assert llm.plan.device.type == "cuda"
    assert {c.op: c.name for c in llm.plan.choices}["attention"] == "triton"
    for mine, theirs in zip(all_logits(llm, tiny.prompts), tiny.logits, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=0, atol=5e-4)
    params = SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    outputs = llm.generate(tiny.prompts, params)
    assert [o.outputs[0].token_ids for o in outputs] == tiny.answers


def test_sampling_is_the_same_as_on_the_cpu(tmp_path: Any) -> None:
    tiny = make("llama", tmp_path / "llama")
    params = SamplingParams(
        temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.1, presence_penalty=0.2,
        frequency_penalty=0.1, logit_bias={7: 1.5}, seed=11, max_new_tokens=32, ignore_eos=True, logprobs=3,
    )  # fmt: skip
    answers = []
    for device in ("cpu", "cuda"):
        llm = LLM(tiny.folder, device=device, dtype="float32", kv_cache_memory_bytes=8 << 20, max_model_len=128)
        answers.append([o.outputs[0].token_ids for o in llm.generate(tiny.prompts, params)])
    assert answers[0] == answers[1]


def test_bfloat16_runs_and_the_plan_counts_its_bytes(tmp_path: Any) -> None:
    tiny = make("qwen3", tmp_path / "qwen3")
    gc.collect()  # models of the tests before
    before = torch.cuda.memory_allocated()
    llm = LLM(tiny.folder, device="cuda", dtype="bfloat16", kv_cache_memory_bytes=8 << 20, max_model_len=128)
    taken = torch.cuda.memory_allocated() - before
    planned = llm.plan.weights_bytes + llm.plan.kv_bytes
    assert planned <= taken <= planned * 1.1 + llm.plan.workspace_bytes
    out = llm.generate(tiny.prompts, SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True))
    assert all(len(o.outputs[0].token_ids) == 8 for o in out)
