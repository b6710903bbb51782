"""generate_batch: order, bounds, errors that stay where they happen, and what is left behind."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from slipstream import LLM, CapacityError, RequestError, SamplingParams
from slipstream.engine.snapshot import Snapshot
from slipstream.request import Request, RequestOutput
from tests.engine import tiny

GREEDY = SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tiny.write(tmp_path_factory.mktemp("batch") / "tiny", tiny.HYBRID)
    return LLM(folder, kv_cache_memory_bytes=1 << 20, max_model_len=200, page_size=4, max_num_seqs=3)


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """Every test leaves the engine idle, and no page held."""
    yield shared
    tiny.check_idle(shared)


def lengths(count: int) -> list[SamplingParams]:
    """The first takes longest, so that in order and as they finish differ."""
    return [GREEDY.replace(max_new_tokens=20 - 2 * (i % 7)) for i in range(count)]


def prompts_of(count: int) -> list[list[int]]:
    return [[3 + i, 5, 7 + i] for i in range(count)]


def test_in_order_or_as_they_finish_each_is_as_alone(llm: LLM) -> None:
    prompts, params = prompts_of(10), lengths(10)
    alone = [llm.generate([p], own)[0].text for p, own in zip(prompts, params, strict=True)]
    assert [o.text for o in llm.generate_batch(prompts, params)] == alone
    assert [o.text for o in llm.generate_batch(iter(prompts), (p for p in params))] == alone
    found = list(llm.generate_batch(prompts, params, ordered=False))
    by_prompt = {o.prompt_token_ids: o.text for o in found}
    assert [by_prompt[tuple(p)] for p in prompts] == alone and len(found) == 10
    assert [o.prompt_token_ids for o in found] != [tuple(p) for p in prompts]
    finished = [o.metrics.finished for o in found if o.metrics]
    assert finished == sorted(finished)
    assert list(llm.generate_batch([])) == []
    assert [o.text for o in llm.generate_batch(["the tide"], GREEDY)] == [llm.generate("the tide", GREEDY).text]


@pytest.mark.parametrize("ordered", [True, False])
def test_an_endless_row_of_prompts_is_taken_as_there_is_room(llm: LLM, ordered: bool) -> None:
    """Three run together. The first answer is long, so in order many results have to wait for it; not without bound."""
    taken = 0

    def endless() -> Iterator[list[int]]:
        nonlocal taken
        while True:
            taken += 1
            yield [3 + taken % 100, 5]

    def params() -> Iterator[SamplingParams]:
        yield GREEDY.replace(max_new_tokens=150)
        while True:
            yield GREEDY.replace(max_new_tokens=2)

    results = llm.generate_batch(endless(), params(), ordered=ordered)
    assert taken == 0
    most = queued = 0
    for given in range(1, 120):
        output = next(results)
        assert (given == 1) == (len(output.outputs[0].token_ids) == 150) or not ordered
        most = max(most, taken - given)
        queued = max(queued, llm.snapshot().waiting)
    assert most <= 16 * 3 and queued <= 3
    assert most > 40 if ordered else most < 16
    results.close()


def test_whoever_ends_is_followed_in_the_next_step(llm: LLM) -> None:
    steps = llm.snapshot().steps
    waiting = [llm.snapshot().waiting for _ in llm.generate_batch(prompts_of(9), GREEDY)]
    assert llm.snapshot().steps - steps == 3 * 8 and max(waiting) == 0


def test_several_answers_count_as_several(llm: LLM) -> None:
    params = SamplingParams(n=5, seed=3, max_new_tokens=4, ignore_eos=True)
    results = llm.generate_batch(prompts_of(20), params)
    first = next(results)
    assert llm.snapshot().waiting <= 3 + 5
    assert [c.finish_reason for c in first.outputs] == ["length"] * 5
    assert [len(o.outputs) for o in results] == [5] * 19


def test_what_cannot_be_served_ends_alone(llm: LLM) -> None:
    bad: list[Any] = [None, [], "", [131], "\ud800", [5] * 200, [[1]], 7, {"a": 1}, b"x", [True]]
    prompts = [p for i, b in enumerate(bad) for p in (b, [3 + i, 5])]
    outputs = list(llm.generate_batch(prompts, GREEDY))
    good = [llm.generate([[3 + i, 5]], GREEDY)[0].text for i in range(len(bad))]
    assert [o.text for o in outputs[1::2]] == good
    for o, prompt in zip(outputs[::2], bad, strict=True):
        (c,) = o.outputs
        assert c.finish_reason == "error" and c.error and not c.token_ids, prompt
        assert o.prompt == (prompt if isinstance(prompt, str) else None)
    errors = [o.outputs[0].error or "" for o in outputs[::2]]
    assert "131 is not in the vocabulary" in errors[3] and "200 tokens leave no room" in errors[5]
    assert len(outputs[10].prompt_token_ids) == 200
    assert len({o.request_id for o in outputs}) == len(outputs)
    wrong: Any = [GREEDY, {"temperature": 0}, GREEDY.replace(max_new_tokens=500)]
    reasons = [o.outputs[0].finish_reason for o in llm.generate_batch(prompts_of(3), wrong)]
    assert reasons == ["length", "error", "error"]


def test_what_the_cache_could_never_hold_ends_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = llm.engine.submit

    def full(request: Request, *more: Any) -> Any:
        if request.prompt_token_ids == (4, 5, 8):
            raise CapacityError("a request of 3 tokens needs 9 pages")
        return submit(request, *more)

    monkeypatch.setattr(llm.engine, "submit", full)
    outputs = [o.outputs[0] for o in llm.generate_batch(prompts_of(3), GREEDY)]
    assert [c.finish_reason for c in outputs] == ["length", "error", "length"]
    assert outputs[1].error == "a request of 3 tokens needs 9 pages"


def test_a_pass_that_fails_ends_those_in_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = llm.engine.runner.launch, 0

    def fail(step: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("a cosmic ray")
        return run(step)

    alone = [llm.generate([p], GREEDY)[0].text for p in prompts_of(6)]
    monkeypatch.setattr(llm.engine.runner, "launch", fail)
    outputs = list(llm.generate_batch(prompts_of(6), GREEDY))
    assert [o.outputs[0].finish_reason for o in outputs] == ["error"] * 3 + ["length"] * 3
    assert outputs[0].outputs[0].error == "RuntimeError: a cosmic ray"
    assert [o.text for o in outputs[3:]] == alone[3:]


def test_a_handler_sees_all_and_may_fail_for_one(llm: LLM) -> None:
    seen: list[RequestOutput] = []

    def handle(output: RequestOutput) -> None:
        seen.append(output)
        if output.prompt_token_ids == (5, 5, 9):
            raise KeyError("disk")

    prompts = [*prompts_of(5), [131]]
    outputs = list(llm.generate_batch(prompts, [*lengths(5), GREEDY], on_result=handle))
    assert len(seen) == 6 and {id(o) for o in seen} == {id(o) for o in outputs}
    assert [o.outputs[0].finish_reason for o in outputs] == ["length", "length", "error", "length", "length", "error"]
    assert outputs[2].outputs[0].error == "on_result: KeyError: 'disk'" and outputs[2].text
    assert [o for o in seen if o.metrics] != outputs[:5], "as they finish, not as they are given"


def test_left_early_nothing_stays(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    aborted = llm.snapshot().finished["abort"]
    results = llm.generate_batch(prompts_of(30), lengths(30), ordered=False)
    next(results)
    assert llm.snapshot().running == 2
    results.close()
    now = llm.snapshot()
    assert (now.running, now.waiting) == (0, 0) and now.finished["abort"] > aborted
    assert list(results) == []

    run, calls = llm.engine.runner.launch, 0

    def interrupt(step: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return run(step)

    monkeypatch.setattr(llm.engine.runner, "launch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(llm.generate_batch(prompts_of(30), GREEDY))
    assert llm.snapshot().waiting == 0

    def broken() -> Iterator[str]:
        yield "fine"
        raise OSError("the file is gone")

    with pytest.raises(OSError, match="gone"):
        list(llm.generate_batch(broken(), GREEDY))


@pytest.mark.parametrize(
    ("prompts", "params", "match"),
    [
        ("one", GREEDY, r"\[prompt\] for a single one"),
        ([1, 2], GREEDY, r"\[\[1, 2\]\]"),
        (7, GREEDY, "got int"),
        ({"a": "b"}, GREEDY, "got dict"),
        (["a"], 7, "got int"),
        (["a"], {"temperature": 0}, "got dict"),
        (["a", "b"], [GREEDY], "1 for 2 prompts"),
    ],
)
def test_what_is_wrong_with_the_whole_is_said_at_once(llm: LLM, prompts: Any, params: Any, match: str) -> None:
    with pytest.raises(RequestError, match=match):
        llm.generate_batch(prompts, params)


def test_rows_of_other_lengths_are_found_out(llm: LLM) -> None:
    with pytest.raises(RequestError, match="there are 2"):
        list(llm.generate_batch(iter(prompts_of(3)), iter([GREEDY] * 2)))
    with pytest.raises(RequestError, match="more of them than prompts"):
        list(llm.generate_batch(iter(prompts_of(3)), iter([GREEDY] * 4)))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots: list[Snapshot] = []
    before = llm.snapshot().finished["length"]
    list(llm.generate_batch(prompts_of(9), GREEDY, progress=snapshots.append))
    assert snapshots and snapshots[-1].finished["length"] == before + 9 and snapshots[-1].running == 0

    monkeypatch.setattr("slipstream.llm_batch._MOMENT", 0.0)
    monkeypatch.setattr("slipstream.llm_batch._APART", 0.0)
    drawn = {}
    for name, stream, progress in (("yes", Terminal(), None), ("no", Terminal(), False), ("pipe", io.StringIO(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        out = sys.stdout
        list(llm.generate_batch(prompts_of(9), GREEDY, progress=progress))
        assert sys.stdout is out
        drawn[name] = stream.getvalue()
    assert "9/9 requests" in drawn["yes"] and "tok/s" in drawn["yes"] and "cache" in drawn["yes"]
    assert drawn["no"] == drawn["pipe"] == ""
