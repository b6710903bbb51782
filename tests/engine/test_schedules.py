"""Random schedules: whatever the budget, the pages, the order and the moments of arrival, whoever is cancelled or thrown out
beside it, and whatever is found in the cache, a request gets the tokens that it gets alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slipstream import LLM, SamplingParams
from slipstream.cache.pages import Chain
from slipstream.cache.spec import CacheGroup
from slipstream.engine.engine import Stream
from slipstream.engine.runner import Flight, Runner
from slipstream.request import Chunk, Step
from tests.engine import tiny
from tests.parity import tiny as parity

SAFE = 1e-4  # a best token that leads by less could change with the last bit of a sum
KINDS = (
    SamplingParams(temperature=0, prompt_logprobs=0),
    SamplingParams(seed=3, temperature=0.9),
    SamplingParams(seed=4, temperature=1.4, top_k=20, repetition_penalty=1.2, presence_penalty=0.4),
    SamplingParams(seed=5, top_p=0.9, logprobs=1),
    SamplingParams(seed=2**64 - 1, min_p=0.02, n=2),
    SamplingParams(
        seed=6,
        top_p=0.9,
        frequency_penalty=0.6,
        logit_bias={7: 2.0},
        min_new_tokens=2,
        stop_token_ids=tuple(range(9, 40)),
    ),
)


@dataclass
class Asked:
    """A request, and the tokens of its answers when it is alone."""

    prompt: list[int]
    params: SamplingParams
    tokens: list[list[int]]


@dataclass
class Model:
    """What to load, what is asked of it, and how long prompt and answer are at most."""

    path: Path
    asked: list[Asked]
    longest: int
    groups: tuple[CacheGroup, ...]
    device: str = "cpu"


def ask(path: Path, *, count: int, vocab: int, prompt: int, new: int, device: str = "cpu") -> Model:
    """Prompts of mixed lengths: some begin alike, some are made of the same pieces in another order."""
    rng = random.Random(7)

    def draw(n: int) -> list[int]:
        return [rng.randrange(6, vocab) for _ in range(n)]

    llm = LLM(path, device=device, dtype="float32", max_model_len=prompt + new, enable_prefix_caching=False)
    stem, pieces = draw(prompt), [draw(8) for _ in range(3)]
    made: list[Asked] = []
    while len(made) < count:
        i = len(made)
        mixed = [t for piece in rng.choices(pieces, k=(prompt - 1) // 8) for t in piece]
        head = (stem, mixed, [])[i % 3][: rng.randrange(prompt)]
        tokens = (head + draw(prompt))[: rng.randint(len(head) + 1, prompt)]
        params = SamplingParams(temperature=0) if i % 2 else KINDS[i // 2 % len(KINDS)]
        params = params.replace(max_new_tokens=rng.randint(2, new))
        (output,) = llm.generate([tokens], params.replace(logprobs=2))
        doubtful = any(t.top[0][1] - t.top[1][1] < SAFE for t in output.outputs[0].logprobs or ())
        if not (params.greedy and doubtful):
            made.append(Asked(tokens, params, [c.token_ids for c in output.outputs]))
    answers = [tuple(t) for a in made for t in a.tokens]
    assert len(set(answers)) > 0.8 * len(answers), "random weights could as well repeat one token"
    return Model(path, made, prompt + new, llm.plan.groups, device)


def pressed(model: Model, rng: random.Random) -> LLM:
    """Pages for little more than one of the longest requests, in any size and with any budget."""
    size, chunk = rng.choice((1, 2, 3, 4, 5, 8, 16)), rng.choice((5, 9, 16, 33, 64))
    one = sum(g.max_pages(model.longest, chunk, size) * size * g.bytes_per_token(4) for g in model.groups)
    return LLM(
        model.path,
        device=model.device,
        dtype="float32",
        max_model_len=model.longest,
        page_size=size,
        max_num_batched_tokens=chunk,
        max_num_seqs=rng.choice((2, 3, 5, 8, 16)),
        kv_cache_memory_bytes=int(one * rng.uniform(1.0, 1.6)),
        enable_prefix_caching=rng.random() < 0.85,
        async_scheduling=rng.random() < 0.5,
    )


def play(llm: LLM, asked: Sequence[Asked], rng: random.Random) -> None:
    """Submit in random order while others run, cancel some, and hold every answer to the one made alone."""
    waiting = rng.sample(asked, len(asked))
    streams: list[tuple[Asked, Stream]] = []
    while waiting or llm.engine.scheduler.busy:
        if waiting and (rng.random() < 0.5 or not llm.engine.scheduler.busy):
            for one in [waiting.pop() for _ in range(min(len(waiting), rng.randint(1, 12)))]:
                streams.append((one, llm.submit(one.prompt, one.params)))
        if rng.random() < 0.04:
            rng.choice(streams)[1].cancel()
        llm.engine.step()
    for one, stream in streams:
        for c, alone in zip(stream.output.outputs, one.tokens, strict=True):
            assert c.finish_reason in ("stop", "length", "abort"), c
            part = alone[: len(c.token_ids)] if c.finish_reason == "abort" else alone
            assert c.token_ids == part, f"not the answer made alone, of {len(one.prompt)} tokens"
    tiny.check_idle(llm)


def play_many(model: Model, seeds: Sequence[int], each: int) -> None:
    preempted, found, cancelled = 0, 0, 0
    for seed in seeds:
        rng = random.Random(seed)
        llm = pressed(model, rng)
        try:
            play(llm, rng.sample(model.asked, each), rng)
        except AssertionError as e:
            raise AssertionError(f"schedule {seed}: {e}") from e
        counters = llm.engine.scheduler.counters
        preempted += counters.preemptions > 0
        found += counters.cached_tokens > 0
        cancelled += counters.finished.get("abort", 0)
    assert min(preempted, found) > len(seeds) / 4 and cancelled, (preempted, found, cancelled)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Full and sliding attention, sinks, biases, experts."""
    folder = tmp_path_factory.mktemp("schedules") / "gpt_oss"
    parity.save("gpt_oss", folder)
    return ask(folder, count=64, vocab=97, prompt=45, new=9)


@pytest.mark.parametrize(
    ("seeds", "each"),
    [(range(40), 8), pytest.param(range(40, 240), 64, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
)
def test_a_tiny_gpt_oss(gpt_oss: Model, seeds: Sequence[int], each: int) -> None:
    play_many(gpt_oss, seeds, each)


@pytest.mark.parametrize(
    ("count", "seeds", "each"),
    [(8, (8, 9, 10), 8), pytest.param(64, range(10, 210), 24, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])],
)
def test_smollm2(smollm2: Path, count: int, seeds: Sequence[int], each: int) -> None:
    play_many(ask(smollm2, count=count, vocab=9000, prompt=23, new=6), seeds, each)


# Faults planted: each has to be seen.


def names_without_what_is_before(self: Chain, tokens: Sequence[int], end: int) -> list[bytes]:
    size = self._size
    pages = [tokens[at : at + size] for at in range(0, end // size * size, size)]
    return [hashlib.blake2b(repr([*p]).encode(), digest_size=16).digest() for p in pages]


def run_with_a_wrong_page(self: Runner, step: Step) -> Flight:
    """Who decodes beside others has its last full page taken for that of the one before it."""
    chunks = list(step.chunks)
    for i, (a, b) in enumerate(itertools.pairwise(chunks), start=1):
        if len(b.token_ids) == 1 and len(a.tables[0].pages) > 1 and len(b.tables[0].pages) > 1:
            chunks[i] = swapped(b, a.tables[0].pages[0])
    return run(self, dataclasses.replace(step, chunks=tuple(chunks)))


def swapped(chunk: Chunk, page: int) -> Chunk:
    first, *rest = chunk.tables
    pages = (*first.pages[:-2], page, first.pages[-1])
    return dataclasses.replace(chunk, tables=(dataclasses.replace(first, pages=pages), *rest))


run = Runner.launch


@pytest.mark.parametrize(
    ("owner", "name", "fault"),
    [(Chain, "names", names_without_what_is_before), (Runner, "launch", run_with_a_wrong_page)],
)
def test_a_wrong_page_is_seen(
    gpt_oss: Model, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, fault: Any
) -> None:
    monkeypatch.setattr(owner, name, fault)
    with pytest.raises(AssertionError, match="schedule .*: not the answer made alone"):
        play_many(gpt_oss, range(20), each=8)
