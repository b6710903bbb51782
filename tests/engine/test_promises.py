"""What the engine promises to everyone: pages of the cancelled come back at once, what can never fit costs no step, and
nobody's fault is another's.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slipstream import LLM, AsyncLLM, CapacityError, RequestError, SamplingParams
from slipstream.engine.engine import Delta, Stream
from slipstream.engine.runner import Flight
from slipstream.request import Request, Step
from tests.engine import mixed, tiny

GREEDY = SamplingParams(temperature=0, max_new_tokens=10, ignore_eos=True, logit_bias=mixed.FORBID)


def load(folder: Path, **options: Any) -> LLM:
    return LLM(folder, **{"kv_cache_memory_bytes": 90_000, "max_model_len": 150, "page_size": 4, **options})


# Cancelled at any moment.


def state(stream: Stream) -> str:
    sequence = stream.answers[0].sequence
    if sequence.finish_reason is not None:
        return "ended"
    return "decoding" if sequence.num_new else "prefilling" if sequence.computed else "waiting"


@pytest.mark.parametrize("threaded", [False, True])
def test_a_thousand_cancellations_at_random_moments(hybrid: Path, threaded: bool) -> None:
    """Two runs of it: two thousand. Who is not cancelled gets its answer all the same."""
    llm = load(hybrid, max_num_seqs=4, max_num_batched_tokens=12)
    rng, moments = random.Random(1), Counter[str]()
    want = llm.generate([[5, 6, 7]], GREEDY)[0].outputs[0].token_ids
    baseline = [pool.num_free for pool in llm.engine.scheduler.pages.pools]
    stop = threading.Event()

    def steps() -> None:
        while not stop.is_set():
            if not llm.engine.step():
                time.sleep(0.0005)

    stepping = threading.Thread(target=steps)
    if threaded:
        stepping.start()
    try:
        while sum(moments.values()) < 1000:
            kept = llm.submit([5, 6, 7], GREEDY)
            streams = [llm.submit([3 + rng.randrange(90)] * rng.randint(1, 40), GREEDY) for _ in range(12)]
            rng.shuffle(streams)
            for stream in streams:
                if threaded:
                    time.sleep(rng.choice((0, 0, 0.001)) * rng.random())
                for _ in range(0 if threaded else rng.choice((0, 0, 0, 1, 2, 5))):
                    llm.engine.step()
                moment = state(stream)
                stream.cancel()
                (c,) = stream.output.outputs
                assert c.finish_reason in ("abort", "length")
                moments[moment] += c.finish_reason == "abort" and moment != "ended"
                if not threaded:
                    assert not any(llm.engine.scheduler.pages.held(stream.answers[0].sequence.id))
                    llm.engine.scheduler.pages.check()
            assert kept.result().outputs[0].token_ids == want
            before = llm.engine.scheduler.counters.steps
            with llm.engine._lock:
                assert [pool.num_free for pool in llm.engine.scheduler.pages.pools] == baseline
                assert llm.engine.scheduler.counters.steps <= before + 2
    finally:
        stop.set()
        if threaded:
            stepping.join()
    tiny.check_idle(llm)
    assert all(moments[m] > 50 for m in ("waiting", "prefilling", "decoding")), moments


# What can never fit.


class Counted:
    """Counts the passes and the answers that are queued."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes = self.queued = 0
        run, add = llm.engine.runner.launch, llm.engine.scheduler.add

        def counted_run(step: Step) -> Flight:
            self.passes += 1
            return run(step)

        def counted_add(*args: Any, **kwargs: Any) -> Any:
            self.queued += 1
            return add(*args, **kwargs)

        monkeypatch.setattr(llm.engine.runner, "launch", counted_run)
        monkeypatch.setattr(llm.engine.scheduler, "add", counted_add)


TOO_LONG = ([5] * 150, [5] * 140_000, "the tide " * 20_000)


def test_what_can_never_fit_is_refused_without_a_step(hybrid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By every front, in the middle of other work, which takes as many steps as it takes without."""
    llm = load(hybrid, max_num_seqs=2)
    good: list[list[int]] = [[7 + i] * (5 + 3 * i) for i in range(8)]
    counted = Counted(llm, monkeypatch)
    want = [o.text for o in llm.generate_batch(good, GREEDY)]
    passes, queued = counted.passes, counted.queued
    some = [p for pair in zip(good, itertools.cycle(TOO_LONG), strict=False) for p in (pair[1], pair[0])]
    llm.engine.scheduler.reset()  # nothing is found in the cache
    got = list(llm.generate_batch(some, GREEDY))
    assert [o.text for o in got[1::2]] == want
    assert {o.outputs[0].finish_reason for o in got[::2]} == {"error"}
    # A flood of bad ones is refused a few at a time, so a good one behind them may come a step later.
    assert counted.queued == 2 * queued and 0 <= counted.passes - 2 * passes <= 2

    running = [llm.submit(p, GREEDY) for p in good]
    for _ in range(3):
        llm.engine.step()
    before = counted.passes, counted.queued

    async def asynchronous(prompt: Any) -> None:
        async with AsyncLLM(llm) as allm:
            await allm.generate(prompt, GREEDY)

    for prompt in TOO_LONG:
        for front in (
            llm.submit,
            lambda p, params: llm.generate([p], params),
            lambda p, params: list(llm.stream(p, params)),
        ):
            with pytest.raises(RequestError, match="max_model_len is 150"):
                front(prompt, GREEDY)
    assert (counted.passes, counted.queued) == before
    with pytest.raises(RequestError, match="max_model_len is 150"):
        asyncio.run(asynchronous(TOO_LONG[0]))
    assert counted.queued == before[1]
    assert [s.result().text for s in running] == want
    tiny.check_idle(llm)


# A thousand hostile requests among a thousand good ones.


class Ends:
    """A `deliver` that counts how often each answer ends; it may itself be hostile."""

    def __init__(self, then: Callable[[Stream, Delta], object] | None = None) -> None:
        self.count = Counter[int]()
        self.then = then

    def __call__(self, stream: Stream, delta: Delta) -> None:
        self.count[delta.index] += delta.finish_reason is not None
        if self.then is not None:
            self.then(stream, delta)


def _raise(stream: Stream, delta: Delta) -> None:
    raise ValueError("hostile")


HOSTILE: tuple[tuple[Any, dict[str, Any]], ...] = (
    # Not to be queued at all
    *((prompt, {}) for prompt in TOO_LONG[:1]),
    *((prompt, {}) for prompt in ([], "", [131], [-1], [2**70], [1.5], [True], ["x"], [None], [[5]])),
    *((prompt, {}) for prompt in (7, None, {"a": 1}, b"the", object(), "\ud800", {5, "x"})),
    ("the", {"max_new_tokens": 2**31}),
    ("the", {"max_new_tokens": 0}),
    ("the", {"n": 0}),
    ("the", {"n": 1025}),
    ("the", {"n": 2}),  # greedy ones would all be the same
    ("the", {"temperature": float("nan")}),
    ("the", {"temperature": "hot"}),
    ("the", {"top_p": 0}),
    ("the", {"seed": 2**80}),
    ("the", {"logit_bias": {131: 1.0}}),
    ("the", {"logit_bias": {5: float("inf")}}),
    ("the", {"stop": ("",)}),
    ("the", {"stop": 5}),
    ("the", {"stop_token_ids": (10**9,)}),
    ("the", {"deadline": -1}),
    ("the", {"priority": 1}),
    ("the", {"min_new_tokens": 11}),
    ("the", {"no_such_thing": 1}),
    # Queued, and a burden
    ("the", {"stop": ("x" * 10_000,)}),
    ("the", {"stop": tuple(f"{i}x" for i in range(2_000))}),
    ("the", {"stop": ("\ud800",), "cache_salt": "\ud800"}),
    ("the", {"stop": [chr(c) for c in range(33, 127)]}),
    ("the", {"logit_bias": dict.fromkeys(range(131), -float("inf"))}),
    ("the", {"logit_bias": dict.fromkeys(range(131), 1e30), "repetition_penalty": 1e4}),
    ("the", {"temperature": 1e-6, "repetition_penalty": 1e-4, "logit_bias": {5: 1e30, 6: -1e30}}),
    ("the", {"temperature": 1e4, "typical_p": 1e-9, "top_p": 1e-9, "min_p": 1.0, "top_k": 1}),
    ("the", {"logprobs": 100, "prompt_logprobs": 100}),
    ("the", {"stop_token_ids": tuple(range(131)), "min_new_tokens": 10}),
    ("the", {"deadline": 1e-9}),
    (mixed.NAN, {}),
    ([7] * 40 + mixed.NAN, {"prompt_logprobs": 5}),
    ("the", {"temperature": 1.0, "n": 40, "max_new_tokens": 3}),
)
CALLBACKS: tuple[Callable[[Stream, Delta], object], ...] = (
    _raise,
    lambda stream, delta: stream.cancel(),
    lambda stream, delta: [s.cancel() for s in (stream, stream)],
    lambda stream, delta: stream.engine.snapshot(),
    lambda stream, delta: stream.engine.submit(Request("again", (5,), GREEDY)).cancel(),
)


def test_a_thousand_hostile_among_a_thousand_good(tmp_path: Path) -> None:
    llm = load(mixed.write(tmp_path / "model"), max_num_seqs=8)
    rng = random.Random(5)
    prompts = [[9 + i] * (1 + i % 13) + [20 + i, 7] for i in range(25)]
    want = [llm.generate([p], GREEDY)[0].outputs[0].token_ids for p in prompts]
    mixed.spoil(llm)
    good: list[tuple[Stream, int]] = []
    queued: list[tuple[Stream, Ends]] = []
    refused = Counter[str]()

    def hostile(i: int) -> None:
        prompt, changes = HOSTILE[i % len(HOSTILE)] if i % 3 else ("the", {"n": 3, "temperature": 1.0, "seed": i})
        prompt, changes = (
            ("the", {"temperature": 1.0, "n": 1024, "max_new_tokens": 1}) if i == 500 else (prompt, changes)
        )
        ends = Ends(CALLBACKS[i // 3 % len(CALLBACKS)] if i % 3 == 0 else None)
        try:
            request = llm.make_request(prompt, GREEDY.replace(**changes))
            stream = llm.engine.submit(request, ends)
        except (RequestError, CapacityError) as e:
            refused[type(e).__name__] += 1
            return
        queued.append((stream, ends))
        if rng.random() < 0.3:
            stream.cancel()

    turns: list[Callable[[], object]] = []
    turns += [lambda i=i: good.append((llm.submit(prompts[i % 25], GREEDY), i % 25)) for i in range(1000)]  # type: ignore[misc]
    turns += [lambda i=i: hostile(i) for i in range(1000)]  # type: ignore[misc]
    rng.shuffle(turns)
    for turn in turns:
        turn()
        if rng.random() < 0.5 or len(llm.engine.scheduler.waiting) > 100:
            llm.engine.step()
    while llm.engine.step():
        pass
    tiny.check_idle(llm)
    assert len(good) == 1000
    for stream, i in good:
        (c,) = stream.output.outputs
        assert (c.finish_reason, c.token_ids) == ("length", want[i])
        assert [d.finish_reason for d in stream].count("length") == 1
    assert sum(refused.values()) + len(queued) == 1000 and min(sum(refused.values()), len(queued)) > 300
    reasons = Counter[Any]()
    for stream, ends in queued:
        for c in stream.output.outputs:
            reasons[c.finish_reason] += 1
            assert (c.error is not None) == (c.finish_reason == "error")
            assert ends.count[c.index] == 1 or (ends.then is _raise and ends.count[c.index] == 0), c
    counted = llm.snapshot().finished
    again = sum(ends.then is CALLBACKS[-1] for _, ends in queued)
    assert reasons.keys() == {"stop", "length", "abort", "error"} and again
    assert counted["stop"] == reasons["stop"] and counted["error"] == reasons["error"]
    assert counted["length"] == reasons["length"] + 1000 + 25 and counted["abort"] > reasons["abort"]


# A caller's code.


def _others(streams: list[Stream]) -> Iterator[Callable[[Stream, Delta], object]]:
    yield _raise
    yield lambda stream, delta: stream.cancel()
    yield lambda stream, delta: [s.cancel() for s in streams]


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("at", [1, 4, 10])
def test_a_delivery_may_end_any_request(hybrid: Path, which: int, at: int) -> None:
    """Also those that got a token in the same pass, which has not been delivered; and with the last token of them all."""
    llm = load(hybrid, kv_cache_memory_bytes=1 << 20)
    params = SamplingParams(n=3, seed=2, max_new_tokens=10, ignore_eos=True)
    (alone,) = llm.generate([[5, 6]], params)
    want = llm.generate([[8]], GREEDY)[0].outputs[0].token_ids
    before = llm.snapshot().finished
    doomed: list[Stream] = []
    then = [*_others(doomed)][which]

    def deliver(stream: Stream, delta: Delta) -> None:
        if len(stream.output.outputs[0].token_ids) == at:
            then(stream, delta)

    hostile = llm.engine.submit(llm.make_request([5, 6], params), deliver)
    doomed += [llm.submit([8], GREEDY) for _ in range(2)]
    kept = llm.submit([8], GREEDY)
    while llm.engine.step():
        pass
    tiny.check_idle(llm)
    assert (kept.output.outputs[0].token_ids, kept.output.outputs[0].finish_reason) == (want, "length")
    reasons = Counter(c.finish_reason for s in (hostile, kept, *doomed) for c in s.output.outputs)
    assert reasons == {k: v - before[k] for k, v in llm.snapshot().finished.items() if v > before[k]}
    for c, whole in zip(hostile.output.outputs, alone.outputs, strict=True):
        assert c.token_ids == whole.token_ids[: len(c.token_ids)]
        assert (c.finish_reason == "length") <= (c.token_ids == whole.token_ids)
    for s in doomed:
        (c,) = s.output.outputs
        assert c.finish_reason == ("abort" if which == 2 else "length")
        assert c.token_ids == want[: len(c.token_ids)] and (c.finish_reason == "abort") == (len(c.token_ids) < 10)
        assert [d.finish_reason for d in s][-1] == c.finish_reason
