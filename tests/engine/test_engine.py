"""How requests begin, stream and end: stop strings, cancels, refusals, bad numbers, interrupts."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from slipstream import LLM, SamplingParams
from slipstream.errors import CapacityError, RequestError
from slipstream.request import Request
from tests.engine import tiny

GREEDY = SamplingParams(temperature=0, max_new_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def shared(hybrid: Path) -> LLM:
    return load(hybrid)


@pytest.fixture
def llm(shared: LLM) -> Any:
    """Every test leaves the engine as it found it: idle, and all pages free."""
    yield shared
    tiny.check_idle(shared)


def load(folder: Path, **options: Any) -> LLM:
    return LLM(folder, **{"kv_cache_memory_bytes": 1 << 20, "max_model_len": 200, "page_size": 4, **options})


# Where an answer ends.


def test_stop_strings_are_cut_wherever_tokens_are(llm: LLM) -> None:
    """Every piece of 1 to 5 characters that the text has: it is cut before its first appearance."""
    text = llm.generate("the tide", GREEDY).text
    tokens = llm.generate("the tide", GREEDY).outputs[0].token_ids
    across = 0
    for length in (1, 2, 3, 5):
        for at in range(0, len(text) - length, 5):
            stop = text[at : at + length]
            first = text.index(stop)
            (cut,) = llm.generate("the tide", GREEDY.replace(stop=(stop,))).outputs
            assert (cut.text, cut.finish_reason, cut.stop_reason) == (text[:first], "stop", stop)
            (kept,) = llm.generate("the tide", GREEDY.replace(stop=(stop,), include_stop_str_in_output=True)).outputs
            assert kept.text == text[: first + length] and kept.token_ids == cut.token_ids
            assert cut.token_ids == tokens[: len(cut.token_ids)], "no token more than the stop needs"
            across += llm.tokenizer.decode(cut.token_ids[-1:]).find(stop) < 0
    assert across > 5


def test_the_stop_string_that_comes_first_wins(llm: LLM) -> None:
    text = llm.generate("the tide", GREEDY).text
    (c,) = llm.generate("the tide", GREEDY.replace(stop=(text[20:24], text[5:9], "never"))).outputs
    assert c.text == text[: text.index(text[5:9])] and c.stop_reason == text[5:9]


def test_a_stop_string_that_never_comes_leaves_the_text_whole(llm: LLM) -> None:
    """Also where the text ends with the beginning of it, which was held back until the end."""
    text = llm.generate("the tide", GREEDY).text
    (c,) = llm.generate("the tide", GREEDY.replace(stop=(text[-3:] + "~never",))).outputs
    assert (c.text, c.finish_reason) == (text, "length")


def test_a_stop_string_in_the_last_token_allowed_is_a_stop(llm: LLM) -> None:
    before = dict(llm.engine.scheduler.counters.finished)
    text = llm.generate("the tide", GREEDY.replace(max_new_tokens=1)).text
    (c,) = llm.generate("the tide", GREEDY.replace(max_new_tokens=1, stop=(text,))).outputs
    assert (c.text, c.finish_reason, c.stop_reason, len(c.token_ids)) == ("", "stop", text, 1)
    after = llm.engine.scheduler.counters.finished
    assert after["stop"] == before.get("stop", 0) + 1 and after["length"] == before.get("length", 0) + 1


def test_stop_token_ids_and_end_tokens(llm: LLM) -> None:
    tokens = llm.generate("the tide", GREEDY).outputs[0].token_ids
    for at in (0, 3, 17):
        token = tokens[at]
        first = tokens.index(token)
        (c,) = llm.generate("the tide", GREEDY.replace(stop_token_ids=(token,))).outputs
        assert c.token_ids == tokens[: first + 1]
        assert (c.finish_reason, c.stop_reason) == ("stop", token)
        assert c.text == llm.tokenizer.decode(tokens[:first]), "an end token is no text"


def test_the_models_end_token_and_ignore_eos(llm: LLM) -> None:
    ends = SamplingParams(temperature=0, logit_bias={1: 1e9}, max_new_tokens=7)  # </s> is all that can come
    (c,) = llm.generate("the", ends).outputs
    assert (c.token_ids, c.text, c.finish_reason, c.stop_reason) == ([1], "", "stop", 1)
    (c,) = llm.generate("the", ends.replace(ignore_eos=True)).outputs
    assert (c.token_ids, c.finish_reason) == ([1] * 7, "length")


def test_min_new_tokens_holds_off_every_end(llm: LLM) -> None:
    params = SamplingParams(temperature=0, logit_bias={1: 1e9, 7: 1e9}, stop_token_ids=(7,), min_new_tokens=5)
    params = params.replace(max_new_tokens=20)
    (c,) = llm.generate("the", params).outputs
    assert len(c.token_ids) == 6 and not {1, 7} & set(c.token_ids[:5]) and c.token_ids[5] in (1, 7)


@pytest.mark.parametrize("new", [1, 2, 40])
def test_max_new_tokens(llm: LLM, new: int) -> None:
    (c,) = llm.generate("the", GREEDY.replace(max_new_tokens=new)).outputs
    assert (len(c.token_ids), c.finish_reason, c.stop_reason) == (new, "length", None)


def test_none_goes_on_to_max_model_len(llm: LLM) -> None:
    prompt = [5] * 150
    (o,) = llm.generate([prompt], GREEDY.replace(max_new_tokens=None))
    assert len(o.outputs[0].token_ids) == 50 and o.outputs[0].finish_reason == "length"
    (o,) = llm.generate([[5] * 199], GREEDY.replace(max_new_tokens=None))
    assert len(o.outputs[0].token_ids) == 1


def test_prompt_logprobs_of_one_token(llm: LLM) -> None:
    (o,) = llm.generate([[5]], GREEDY.replace(prompt_logprobs=3))
    assert o.prompt_logprobs == [None]


# Streams.


def test_one_stream_serves_the_others(llm: LLM) -> None:
    prompts = ["the", "he said that", "on the sea " * 5]
    alone = [llm.generate(p, GREEDY).text for p in prompts]
    first, second, third = (llm.submit(p, GREEDY) for p in prompts)
    assert "".join(d.text for d in first) == alone[0]
    assert second.finished and third.finished, "the same steps served all three"
    steps = llm.engine.scheduler.counters.steps
    assert second.result().text == alone[1] and "".join(d.text for d in third) == alone[2]
    assert llm.engine.scheduler.counters.steps == steps


def test_part_of_a_stream_then_its_result(llm: LLM) -> None:
    whole = llm.generate("the tide", GREEDY)
    stream = llm.submit("the tide", GREEDY)
    deltas = iter(stream)
    seen = [next(deltas) for _ in range(5)]
    assert not stream.finished and stream.output.outputs[0].finish_reason is None
    assert stream.output.text == "".join(d.text for d in seen)
    assert [d.token_id for d in seen] == whole.outputs[0].token_ids[:5]
    assert stream.result().text == whole.text
    assert list(stream) == [] and stream.result().text == whole.text


@pytest.mark.parametrize("stop", [(), ("QQQ",), ("as2", "zzz")])
def test_the_pieces_are_the_text(llm: LLM, stop: tuple[str, ...]) -> None:
    stream = llm.submit("the tide", SamplingParams(seed=3, n=3, max_new_tokens=40, stop=stop))
    pieces: dict[int, str] = {0: "", 1: "", 2: ""}
    ends: dict[int, list[Any]] = {0: [], 1: [], 2: []}
    for d in stream:
        assert not ends[d.index], "nothing comes after the end"
        pieces[d.index] += d.text
        if d.finish_reason:
            ends[d.index].append(d.finish_reason)
        assert stream.output.outputs[d.index].text.startswith(pieces[d.index])
    for c in stream.output.outputs:
        assert pieces[c.index] == c.text and ends[c.index] == [c.finish_reason]


def test_closing_a_stream_of_text_ends_the_request(llm: LLM) -> None:
    pieces = llm.stream("the tide", GREEDY)
    next(pieces)
    assert llm.engine.scheduler.busy
    pieces.close()
    assert not llm.engine.scheduler.busy


def test_metrics_are_in_order(llm: LLM) -> None:
    m = llm.generate("the tide", GREEDY).metrics
    assert m is not None and 0 < m.arrived <= m.started <= m.first_token <= m.finished


# Ends from outside.


def test_cancel_at_random_moments_gives_all_pages_back(hybrid: Path) -> None:
    llm = load(hybrid, kv_cache_memory_bytes=150_000, max_num_batched_tokens=16)
    alone = llm.generate("the tide", GREEDY)
    for seed in range(20):
        rng = random.Random(seed)
        streams = [llm.submit("the tide" * rng.randint(1, 8), GREEDY.replace(max_new_tokens=rng.randint(1, 40)))
                   for _ in range(5)]  # fmt: skip
        kept = llm.submit("the tide", GREEDY)
        while not all(s.finished for s in streams):
            if rng.random() < 0.15:
                rng.choice(streams).cancel()
            llm.engine.step()
            llm.engine.scheduler.pages.check()
        for s in streams:
            (c,) = s.output.outputs
            assert c.finish_reason in ("length", "abort")
            assert s.output.text == "".join(d.text for d in s)
            s.cancel()
            assert s.output.outputs[0] is c and c.finish_reason in ("length", "abort")
        assert kept.result().outputs[0].token_ids == alone.outputs[0].token_ids
        tiny.check_idle(llm)
    assert llm.engine.scheduler.counters.finished["abort"] > 10
    assert llm.engine.scheduler.counters.preemptions > 0


def test_a_cancelled_answer_keeps_its_text(llm: LLM) -> None:
    whole = llm.generate("the tide", GREEDY).text
    stream = llm.submit("the tide", GREEDY.replace(stop=(whole[:30] + "never",)))  # so that all of it is held back
    for _ in range(10):
        llm.engine.step()
    assert stream.output.text == ""
    stream.cancel()
    (c,) = stream.output.outputs
    assert c.finish_reason == "abort" and c.text == llm.tokenizer.decode(c.token_ids) and whole.startswith(c.text)


def test_nothing_is_kept_of_who_has_ended(hybrid: Path) -> None:
    llm = load(hybrid)
    llm.generate(["the", "sea", "tide"] * 5, SamplingParams(n=2, max_new_tokens=3))
    llm.generate("the", GREEDY)
    llm.generate("the", GREEDY)
    assert len(llm.engine.runner.rows) <= 1, "the last one is forgotten with the next step"


# Refusals.


def test_what_can_never_fit_is_refused_at_once(hybrid: Path) -> None:
    llm = load(hybrid, max_model_len=40)
    steps = llm.engine.scheduler.counters.steps
    for prompts, params, error, numbers in (
        ([[5] * 40], GREEDY.replace(max_new_tokens=None), RequestError, ("40 tokens", "max_model_len is 40")),
        ([[5] * 30], GREEDY.replace(max_new_tokens=11), RequestError, ("30 prompt", "11 new", "at most 10")),
        ([[5], [131]], GREEDY.replace(max_new_tokens=2), RequestError, ("131",)),
        ([[5], []], GREEDY.replace(max_new_tokens=2), RequestError, ("empty",)),
        ([[5]], SamplingParams(logit_bias={131: 1.0}, max_new_tokens=2), RequestError, ("logit_bias", "131")),
        ([[5]], SamplingParams(stop_token_ids=(500,), max_new_tokens=2), RequestError, ("stop_token_ids", "500")),
    ):
        with pytest.raises(error) as caught:
            llm.generate(prompts, params)
        assert all(n in str(caught.value) for n in numbers), caught.value
        tiny.check_idle(llm)
    assert llm.engine.scheduler.counters.steps == steps, "nothing of the list was run"


def test_a_request_larger_than_the_whole_cache(hybrid: Path) -> None:
    """Plans give the cache room for one request of max_model_len; should that ever not hold, numbers say so."""
    llm = load(hybrid)
    llm.engine.scheduler.pages = type(llm.engine.scheduler.pages)(llm.plan.groups, (5, 5), 4)
    with pytest.raises(CapacityError, match=r"up to 48 tokens needs 12 pages of 4 .* 5 in all"):
        llm.generate([[5] * 8], GREEDY)
    tiny.check_idle(llm)
    assert llm.generate([[5] * 8], GREEDY.replace(max_new_tokens=2))[0].outputs[0].finish_reason == "length"


@pytest.mark.parametrize("prompt", [(), (131,), (-1,), (True,), ("a",)])
def test_the_engine_checks_prompts_itself(llm: LLM, prompt: tuple[Any, ...]) -> None:
    with pytest.raises(RequestError):
        llm.engine.submit(Request("x", prompt, GREEDY))


# Bad numbers and interrupts.


def test_nan_in_one_request_ends_it_alone(hybrid: Path) -> None:
    """One token's vector is NaN: it spoils the cache and the logits of the request that brings it, and no other."""
    llm = load(hybrid, kv_cache_memory_bytes=60_000, max_model_len=90)
    bad = llm.tokenizer.token_to_id("~")
    assert bad is not None
    params = GREEDY.replace(logit_bias={bad: -float("inf")}, logprobs=1, prompt_logprobs=1)
    prompts = ["the", "he said that", "on the sea of it", "a"]
    alone = [llm.generate(p, params) for p in prompts]
    with torch.inference_mode():
        llm.engine.runner.model.embed.held.data[bad] = float("nan")  # type: ignore[union-attr]
    for _ in range(3):  # the pages that held NaN are used again
        spoiled = [llm.submit("the ~ tide " * 3, params), llm.submit("~", params)]
        streams = [llm.submit(p, params) for p in prompts]
        for stream, one in zip(streams, alone, strict=True):
            assert stream.result().outputs[0].token_ids == one.outputs[0].token_ids
        for stream in spoiled:
            (c,) = stream.result().outputs
            assert (c.finish_reason, c.text, c.token_ids) == ("error", "", [])
            assert c.error is not None and "not finite" in c.error
    tiny.check_idle(llm)


def test_a_token_that_leads_to_nan_keeps_the_text_before_it(hybrid: Path) -> None:
    llm = load(hybrid)
    bad = llm.tokenizer.token_to_id("~")
    with torch.inference_mode():
        llm.engine.runner.model.embed.held.data[bad] = float("nan")  # type: ignore[union-attr]
    (c,) = llm.generate("the", GREEDY.replace(logit_bias={bad: 1e9})).outputs
    assert (c.text, c.token_ids, c.finish_reason) == ("~", [bad], "error")
    tiny.check_idle(llm)


@pytest.mark.parametrize(("what", "reason"), [(KeyboardInterrupt, "abort"), (MemoryError, "error")])
def test_what_raises_in_a_pass_ends_those_in_it(
    hybrid: Path, monkeypatch: pytest.MonkeyPatch, what: type[BaseException], reason: str
) -> None:
    llm = load(hybrid, max_num_seqs=2)
    want = [llm.generate(p, GREEDY).text for p in ("the", "sea")]
    in_pass = [llm.submit(p, GREEDY) for p in ("the tide", "rose")]
    waits = llm.submit("sea", GREEDY)
    for _ in range(6):
        llm.engine.step()
    forward, calls = llm.engine.runner.model.forward, []

    def fail_half_way(*args: Any) -> torch.Tensor:
        forward(*args)
        if not calls:
            calls.append(1)
            raise what("enough")
        return forward(*args)

    monkeypatch.setattr(llm.engine.runner.model, "forward", fail_half_way)
    with pytest.raises(what):
        in_pass[0].result()
    for s in in_pass:
        (c,) = s.output.outputs
        assert c.finish_reason == reason and len(c.token_ids) == 6 and c.text == llm.tokenizer.decode(c.token_ids)
        assert c.error == (None if reason == "abort" else "MemoryError: enough")
    assert waits.result().text == want[1], "who was not in the pass goes on"
    tiny.check_idle(llm)
    assert llm.generate("the", GREEDY).text == want[0]


def test_generate_takes_all_of_its_requests_down_with_it(hybrid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = load(hybrid, max_num_seqs=2)
    other = llm.submit("sea", GREEDY)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner.model, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["the"] * 5, GREEDY)
    tiny.check_idle(llm)
    assert other.output.outputs[0].finish_reason == "abort"


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line of the engine's own bookkeeping, as Ctrl-C may."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        file = frame.f_code.co_filename
        if "slipstream" not in file or not any(part in file for part in ("engine", "scheduler", "pages", "batch")):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


def test_an_interrupt_at_any_line_leaves_the_engine_usable(hybrid: Path) -> None:
    llm = load(hybrid, kv_cache_memory_bytes=40_000, max_model_len=60, max_num_batched_tokens=16)
    want = llm.generate("the tide", GREEDY.replace(max_new_tokens=6)).text
    hits = 0
    for n in range(1, 400, 5):
        streams = [llm.submit("the tide " * k, GREEDY.replace(max_new_tokens=30)) for k in (1, 2, 3, 1)]
        before = sys.gettrace()
        try:
            for _ in range(12):
                sys.settrace(Interrupt(n))
                try:
                    llm.engine.step()
                finally:
                    sys.settrace(before)
        except KeyboardInterrupt:
            hits += 1
        for s in streams:
            s.result()
            (c,) = s.output.outputs
            assert c.finish_reason in ("length", "abort")
            assert (c.finish_reason == "length") == (len(c.token_ids) == 30)
        tiny.check_idle(llm)
        assert llm.generate("the tide", GREEDY.replace(max_new_tokens=6)).text == want
    assert hits > 40
