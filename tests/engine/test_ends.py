"""Ends that come from outside: deadlines, and a caller's code that raises. Nobody else notices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from slipstream import LLM, SamplingParams
from slipstream.engine import engine as module
from slipstream.engine.engine import Delta, Stream
from slipstream.engine.runner import Flight
from slipstream.errors import RequestError
from slipstream.request import Step
from tests.engine import tiny

GREEDY = SamplingParams(temperature=0, max_new_tokens=20, ignore_eos=True)


class Clock:
    """A step takes one second."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def llm(hybrid: Path) -> Iterator[LLM]:
    llm = LLM(hybrid, kv_cache_memory_bytes=1 << 20, max_model_len=200, max_num_seqs=2)
    yield llm
    tiny.check_idle(llm)


@pytest.fixture
def clock(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    run = llm.engine.runner.launch

    def slow(step):  # type: ignore[no-untyped-def]
        clock.now += 1
        return run(step)

    monkeypatch.setattr(llm.engine.runner, "launch", slow)
    return clock


def test_a_deadline_ends_one_answer_and_keeps_its_text(llm: LLM, clock: Clock) -> None:
    want = llm.generate("the tide", GREEDY)
    late, free = llm.submit("the tide", GREEDY.replace(deadline=7.5)), llm.submit("the tide", GREEDY)
    a, b = late.result().outputs[0], free.result().outputs[0]
    assert (a.finish_reason, a.stop_reason, a.error) == ("abort", "deadline", None)
    assert a.token_ids == want.outputs[0].token_ids[:8] and want.text.startswith(a.text) and a.text
    assert (b.finish_reason, b.token_ids, b.text) == ("length", want.outputs[0].token_ids, want.text)
    assert llm.snapshot().finished["abort"] == 1


def test_a_deadline_also_holds_in_the_queue_and_for_every_answer(llm: LLM, clock: Clock) -> None:
    first = [llm.submit("sea", GREEDY) for _ in range(2)]
    waits = llm.submit("tide", SamplingParams(n=3, deadline=5, max_new_tokens=9))
    assert {(c.finish_reason, c.stop_reason, c.text) for c in waits.result().outputs} == {("abort", "deadline", "")}
    assert llm.snapshot().steps == 6 and llm.snapshot().running == 2
    assert [s.result().outputs[0].finish_reason for s in first] == ["length"] * 2


def test_who_is_done_in_time_has_no_deadline(llm: LLM, clock: Clock) -> None:
    out = llm.generate(["the", "tide"], GREEDY.replace(deadline=20.5))
    assert [o.outputs[0].finish_reason for o in out] == ["length"] * 2
    clock.now += 100
    llm.generate("the", GREEDY)
    assert llm.engine._deadlines == []


@pytest.mark.parametrize("deadline", [0, -1, float("nan"), float("inf"), "5", True])
def test_what_is_no_deadline(deadline: object) -> None:
    with pytest.raises(RequestError, match="deadline"):
        SamplingParams(deadline=deadline)  # type: ignore[arg-type]


@pytest.mark.parametrize("at", [1, 5, 20])
def test_a_callback_that_raises_ends_its_own_request(llm: LLM, at: int) -> None:
    want = llm.generate("the tide", GREEDY)
    calls = 0

    def deliver(stream: Stream, delta: Delta) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise ValueError("the disk is full")

    bad = llm.engine.submit(llm.make_request("the tide", GREEDY), deliver)
    good = llm.submit("the tide", GREEDY)
    out = good.result()
    assert (out.text, out.outputs[0].finish_reason) == (want.text, "length")
    (c,) = bad.output.outputs
    assert (c.finish_reason, c.error) == ("error", "deliver: ValueError: the disk is full")
    assert c.token_ids == want.outputs[0].token_ids[:at] and calls == at
    assert bad.finished and llm.snapshot().finished == {"stop": 0, "length": 2, "abort": 0, "error": 1}


def test_a_callback_cannot_run_the_engine(llm: LLM) -> None:
    """The answers of the pass it is called in would come in another order."""
    want = llm.generate("the tide", GREEDY)
    bad = llm.engine.submit(llm.make_request("the tide", GREEDY), lambda stream, delta: llm.generate("sea", GREEDY))
    good = llm.submit("the tide", GREEDY)
    assert good.result().text == want.text
    (c,) = bad.output.outputs
    assert c.finish_reason == "error" and c.error is not None and "cannot run the engine" in c.error
    assert llm.generate("the tide", GREEDY).text == want.text


def test_nor_can_it_run_a_batch(llm: LLM) -> None:
    """Which takes passes that raise for bad luck, and would try for ever."""
    bad = llm.engine.submit(
        llm.make_request("the tide", GREEDY), lambda stream, delta: [*llm.generate_batch(["sea"], GREEDY)]
    )
    while llm.engine.step():
        pass
    (c,) = bad.output.outputs
    assert c.finish_reason == "error" and c.error is not None and "cannot run the engine" in c.error


def test_every_answer_is_counted_once_when_a_delivery_is_interrupted(llm: LLM) -> None:
    """The pass has ended both answers, of which none is out yet."""

    def interrupt(stream: Stream, delta: Delta) -> None:
        if delta.finish_reason == "length":
            raise KeyboardInterrupt

    short = GREEDY.replace(max_new_tokens=3)
    first = llm.engine.submit(llm.make_request("the tide", short), interrupt)
    second = llm.submit("the sea", short)
    with pytest.raises(KeyboardInterrupt):
        while llm.engine.step():
            pass
    reasons = [s.output.outputs[0].finish_reason for s in (first, second)]
    assert reasons == ["length", "abort"]
    assert {k: v for k, v in llm.snapshot().finished.items() if v} == {"length": 1, "abort": 1}


def test_who_is_cancelled_when_a_pass_fails_has_no_error(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(step):  # type: ignore[no-untyped-def]
        raise RuntimeError("a cosmic ray")

    first = llm.engine.submit(llm.make_request("the tide", GREEDY), lambda stream, delta: second.cancel())
    second = llm.submit("the sea", GREEDY)
    monkeypatch.setattr(llm.engine.runner, "launch", fail)
    with pytest.raises(RuntimeError, match="a cosmic ray"):
        llm.engine.step()
    (a,), (b,) = first.output.outputs, second.output.outputs
    assert (a.finish_reason, a.error) == ("error", "RuntimeError: a cosmic ray")
    assert (b.finish_reason, b.error) == ("abort", None)


@pytest.mark.parametrize("broken", [KeyboardInterrupt, RuntimeError])
def test_pages_of_a_broken_pass_are_not_found(llm: LLM, monkeypatch: pytest.MonkeyPatch, broken: type) -> None:
    """They were offered when the pass was planned, and hold whatever stood there before."""
    prompt = list(range(20, 61))
    want = llm.generate([prompt], GREEDY)[0].outputs[0].token_ids
    other = [90, *prompt]
    run = llm.engine.runner.launch

    def fail(step):  # type: ignore[no-untyped-def]
        raise broken

    monkeypatch.setattr(llm.engine.runner, "launch", fail)
    stream = llm.submit(other, GREEDY)
    with pytest.raises(broken):
        stream.result()
    monkeypatch.setattr(llm.engine.runner, "launch", run)
    found = llm.snapshot().cached_tokens
    assert llm.generate([other], GREEDY)[0].outputs[0].token_ids and llm.snapshot().cached_tokens == found
    assert llm.generate([prompt], GREEDY)[0].outputs[0].token_ids == want and llm.snapshot().cached_tokens > found


def test_answers_that_were_delivered_before_stay(llm: LLM) -> None:
    params = SamplingParams(n=2, seed=0, max_new_tokens=20, ignore_eos=True, logit_bias={50: 0.0})

    def deliver(stream: Stream, delta: Delta) -> None:
        if delta.index == 1 and stream.output.outputs[0].finish_reason is not None:
            raise RuntimeError("too late")

    stream = llm.engine.submit(llm.make_request("the tide", params), deliver)
    while llm.engine.step():
        pass
    first, second = stream.output.outputs
    assert first.finish_reason == "length" and first.error is None
    assert second.finish_reason == "error" and second.error == "deliver: RuntimeError: too late"


def test_priorities_and_salts_reach_the_scheduler(hybrid: Path) -> None:
    llm = LLM(hybrid, kv_cache_memory_bytes=1 << 20, max_model_len=200, max_num_seqs=1, scheduling_policy="priority")
    done: list[str] = []

    def deliver(stream: Stream, delta: Delta) -> None:
        if delta.finish_reason is not None:
            done.append(stream.output.request_id)

    names = []
    for priority in (0, 3, -3):
        request = llm.make_request("the tide goes out and in again", GREEDY.replace(priority=priority))
        names.append(request.id)
        llm.engine.submit(request, deliver)
    while llm.engine.step():
        pass
    assert done == [names[2], names[0], names[1]]
    cached = llm.snapshot().cached_tokens
    assert cached > 0
    llm.generate("the tide goes out and in again", GREEDY.replace(cache_salt="mine"))
    assert llm.snapshot().cached_tokens == cached
    with pytest.raises(RequestError, match="scheduling_policy"):
        LLM(hybrid, kv_cache_memory_bytes=1 << 20, max_model_len=200).generate("a", GREEDY.replace(priority=1))


def test_four_answers_compute_their_prompt_once(hybrid: Path) -> None:
    llm = LLM(hybrid, kv_cache_memory_bytes=1 << 20, max_model_len=200, page_size=4)
    prompt = list(range(20, 61))
    out = llm.generate([prompt], SamplingParams(n=4, seed=3, max_new_tokens=5))[0]
    alone = LLM(hybrid, kv_cache_memory_bytes=1 << 20, max_model_len=200, enable_prefix_caching=False)
    want = alone.generate([prompt], SamplingParams(n=4, seed=3, max_new_tokens=5))[0]
    assert [c.token_ids for c in out.outputs] == [c.token_ids for c in want.outputs]
    assert (llm.snapshot().prompt_tokens, llm.snapshot().cached_tokens) == (41 + 3, 3 * 40)
    assert alone.snapshot().prompt_tokens == 4 * 41


def test_a_step_that_cannot_be_launched_ahead_leaves_the_one_before_it_whole(
    hybrid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(hybrid, kv_cache_memory_bytes=1 << 20, max_model_len=64, async_scheduling=True)
    short, long = (SamplingParams(temperature=0, max_new_tokens=n, ignore_eos=True) for n in (3, 10))
    want = [llm.generate("the tide", p).outputs[0].token_ids for p in (short, long)]
    launch, calls = llm.engine.runner.launch, 0

    def fail(step: Step) -> Flight:
        nonlocal calls
        calls += 1
        if calls == 4:  # the first one without the short answer
            raise RuntimeError("no room")
        return launch(step)

    monkeypatch.setattr(llm.engine.runner, "launch", fail)
    streams = [llm.submit("the tide", p) for p in (short, long)]
    with pytest.raises(RuntimeError, match="no room"):
        while llm.engine.step():
            pass
    first, second = (s.output.outputs[0] for s in streams)
    assert (first.token_ids, first.finish_reason) == (want[0], "length")
    assert (second.token_ids, second.finish_reason, second.error) == (want[1][:3], "error", "RuntimeError: no room")
    assert llm.generate("the tide", long).outputs[0].token_ids == want[1]
    tiny.check_idle(llm)
