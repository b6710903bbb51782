"""A request's answer depends on nothing but the request: not on its neighbours, chunks, pages or a preemption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slipstream import LLM, SamplingParams
from slipstream.request import RequestOutput, TokenLogprob

# Longer and shorter than the window of 9, alone in a page and over many.
PROMPTS = [
    "t",
    "the tide",
    "he said that the sea",
    "in an ore near the station there are no others, " * 2,
    "QQ",
    "a rose is a",
]
NEW = 24
GREEDY = SamplingParams(temperature=0, max_new_tokens=NEW)
PARAMS = [
    p.replace(max_new_tokens=NEW)
    for p in (
        GREEDY,
        SamplingParams(seed=1),
        SamplingParams(seed=2, temperature=1.7, top_k=9, logprobs=3, prompt_logprobs=2),
        SamplingParams(seed=3, top_p=0.8, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2),
        SamplingParams(temperature=0, logit_bias={5: 3.0, 60: -float("inf")}, logprobs=0, prompt_logprobs=0),
        SamplingParams(seed=-4, min_p=0.05, typical_p=0.9, min_new_tokens=10, stop_token_ids=(50, 51, 52)),
    )
]
ROOM = 1 << 21
VARIANTS: dict[str, dict[str, Any]] = {
    "together": {},
    "in chunks of 1": {"max_num_batched_tokens": 1},
    "in chunks of 7": {"max_num_batched_tokens": 7},
    "pages of 1": {"page_size": 1},
    "pages of 3, chunks of 20": {"page_size": 3, "max_num_batched_tokens": 20},
    "pages of 64": {"page_size": 64},
    "two at a time": {"max_num_seqs": 2},
    "without room": {"kv_cache_memory_bytes": 80_000, "page_size": 4, "max_num_batched_tokens": 16},
    "nothing is kept": {"enable_prefix_caching": False},
    "reference attention": {"attn_implementation": "reference", "page_size": 5},
}


def load(folder: Path, **options: Any) -> LLM:
    return LLM(folder, **{"kv_cache_memory_bytes": ROOM, "max_model_len": 140, **options})


def run(llm: LLM) -> list[RequestOutput]:
    """Every prompt with every kind of parameters, all at once."""
    streams = [llm.submit(prompt, params) for params in PARAMS for prompt in PROMPTS]
    return [s.result() for s in streams]


@pytest.fixture(scope="module", params=["hybrid", "llama"])
def model(request: pytest.FixtureRequest) -> tuple[Path, list[RequestOutput]]:
    """A folder, and each answer made alone."""
    folder: Path = request.getfixturevalue(request.param)
    llm = load(folder)
    alone = [llm.generate(prompt, params) for params in PARAMS for prompt in PROMPTS]
    assert llm.engine.scheduler.counters.preemptions == 0
    return folder, alone


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_answer_is_the_one_made_alone(model: tuple[Path, list[RequestOutput]], variant: str) -> None:
    folder, alone = model
    llm = load(folder, **VARIANTS[variant])
    got = run(llm)
    for a, b in zip(alone, got, strict=True):
        same(a, b)
    scheduler = llm.engine.scheduler
    assert (scheduler.counters.preemptions > 0) == (variant == "without room")
    scheduler.pages.check()
    assert all(p.num_free == p.num_pages for p in scheduler.pages.pools)
    assert sum(scheduler.counters.finished.values()) == len(got)


def same(a: RequestOutput, b: RequestOutput) -> None:
    assert a.prompt_token_ids == b.prompt_token_ids
    for x, y in zip(a.outputs, b.outputs, strict=True):
        assert x.token_ids == y.token_ids
        assert (x.text, x.finish_reason, x.stop_reason) == (y.text, y.finish_reason, y.stop_reason)
        same_logprobs(x.logprobs, y.logprobs)
    same_logprobs(a.prompt_logprobs, b.prompt_logprobs)


def same_logprobs(a: list[TokenLogprob] | list[TokenLogprob | None] | None, b: Any) -> None:
    assert (a is None) == (b is None)
    for x, y in zip(a or (), b or (), strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert (x.token_id, x.rank) == (y.token_id, y.rank)
            assert x.logprob == pytest.approx(y.logprob, abs=1e-4)
            assert [v for _, v in x.top] == pytest.approx([v for _, v in y.top], abs=1e-4)


def test_the_answers_are_worth_comparing(model: tuple[Path, list[RequestOutput]]) -> None:
    """Random weights could as well repeat one token, and then every test here would pass."""
    _, alone = model
    assert len({tuple(o.outputs[0].token_ids) for o in alone}) > 0.8 * len(alone)
    reasons = [o.outputs[0].finish_reason for o in alone]
    assert reasons.count("stop") > 2 and reasons.count("length") > 10


def test_every_answer_is_whole(model: tuple[Path, list[RequestOutput]]) -> None:
    for o in model[1]:
        (c,) = o.outputs
        assert c.finish_reason in ("stop", "length")
        assert (c.finish_reason == "length") == (len(c.token_ids) == NEW and c.stop_reason is None)
        if c.logprobs is not None:
            assert [t.token_id for t in c.logprobs] == c.token_ids
        if o.prompt_logprobs is not None:
            assert o.prompt_logprobs[0] is None
            assert tuple(t.token_id for t in o.prompt_logprobs[1:] if t) == o.prompt_token_ids[1:]


def test_siblings_are_seeds_apart(hybrid: Path) -> None:
    """Answer i of n is the only answer to seed + i."""
    params = SamplingParams(seed=2**64 - 2, n=4, max_new_tokens=NEW, logprobs=1, prompt_logprobs=1)
    for options in ({}, VARIANTS["without room"], {"max_num_batched_tokens": 5}):
        llm = load(hybrid, **options)
        for prompt in PROMPTS[1:4]:
            together = llm.generate(prompt, params)
            assert [c.index for c in together.outputs] == [0, 1, 2, 3]
            for i, c in enumerate(together.outputs):
                one = llm.generate(prompt, params.replace(n=1, seed=(2**64 - 2 + i) % 2**64))
                assert one.outputs[0].token_ids == c.token_ids
                same_logprobs(one.outputs[0].logprobs, c.logprobs)
                same_logprobs(one.prompt_logprobs, together.prompt_logprobs)


def test_logprobs_of_an_answer_are_prompt_logprobs_of_it_as_a_prompt(hybrid: Path) -> None:
    """Decoding token by token and reading it all at once are the same distribution."""
    llm = load(hybrid)
    first = llm.generate("the tide", SamplingParams(temperature=0, max_new_tokens=30, logprobs=2, ignore_eos=True))
    made = first.outputs[0]
    whole = [*first.prompt_token_ids, *made.token_ids]
    (again,) = llm.generate([whole], SamplingParams(temperature=0, max_new_tokens=1, prompt_logprobs=2))
    assert again.prompt_logprobs is not None
    same_logprobs(made.logprobs, again.prompt_logprobs[len(first.prompt_token_ids) :])


def test_a_request_without_a_seed_follows_the_engines(llama: Path) -> None:
    params = SamplingParams(max_new_tokens=20)
    a, b = (load(llama, seed=5).generate(["the", "the", "sea"], params) for _ in range(2))
    assert [o.outputs[0].token_ids for o in a] == [o.outputs[0].token_ids for o in b]
    assert a[0].outputs[0].token_ids != a[1].outputs[0].token_ids
    c, d = (load(llama).generate("the", params).outputs[0].token_ids for _ in range(2))
    assert c != d


def test_a_conversation_is_computed_once(model: tuple[Path, list[RequestOutput]]) -> None:
    """Ten turns: under a tenth of the tokens seen are computed again, and the answers are those of a cold engine."""
    folder, _ = model
    warm, cold = (load(folder, enable_prefix_caching=on, page_size=4, max_model_len=500) for on in (True, False))
    history: list[int] = []
    for turn in range(10):
        history += [40 + turn, 17, 30 + turn * 3]
        outputs = [
            llm.generate([history], GREEDY.replace(max_new_tokens=40, ignore_eos=True))[0] for llm in (warm, cold)
        ]
        same(*outputs)
        history += outputs[0].outputs[0].token_ids
        metrics = outputs[0].metrics
        assert metrics is not None and metrics.cached_tokens >= len(outputs[0].prompt_token_ids) - 8 * bool(turn) - 3
    counted = warm.engine.scheduler.counters
    seen = cold.engine.scheduler.counters.prompt_tokens
    again = counted.prompt_tokens - 3 * 10  # what each turn brings is new
    assert cold.engine.scheduler.counters.cached_tokens == 0 < counted.cached_tokens
    assert again < 0.1 * seen, (again, seen)
    assert counted.cached_tokens + counted.prompt_tokens == seen


def test_many_that_begin_alike(model: tuple[Path, list[RequestOutput]]) -> None:
    """Twice the same, cut, and gone on with, all at once and in little room: nobody's answer changes."""
    folder, _ = model
    texts = [p for prompt in PROMPTS for p in (prompt, prompt[: len(prompt) // 2 + 1], prompt + " that is so", prompt)]
    params = [p for p in PARAMS if p.prompt_logprobs is None]
    cold = load(folder, enable_prefix_caching=False)
    want = [cold.generate(text, p) for p in params for text in texts]
    for options in ({"page_size": 2}, {"page_size": 4, "kv_cache_memory_bytes": 80_000, "max_num_batched_tokens": 16}):
        llm = load(folder, **options)
        for _ in range(2):  # once to fill the cache, once to read it
            streams = [llm.submit(text, p) for p in params for text in texts]
            for a, b in zip(want, [s.result() for s in streams], strict=True):
                same(a, b)
            llm.engine.scheduler.pages.check()
        assert llm.engine.scheduler.counters.cached_tokens > 0
