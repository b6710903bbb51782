"""The snapshot: its numbers are those of the requests that were run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slipstream import LLM, SamplingParams
from slipstream.engine.snapshot import SECONDS, Rate

GREEDY = SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True)


def test_it_counts_what_happens(hybrid: Path) -> None:
    llm = LLM(hybrid, kv_cache_memory_bytes=1 << 20, max_model_len=200, page_size=4, max_num_seqs=2)
    before = llm.snapshot()
    assert (before.waiting, before.running, before.steps, before.new_tokens) == (0, 0, 0, 0)
    assert before.finished == {"stop": 0, "length": 0, "abort": 0, "error": 0}
    assert [g.total for g in before.pages] == list(llm.plan.num_pages) == [g.free for g in before.pages]
    assert before.cache_use == 0 and len(before.pages) == 2
    assert len({g.name for g in before.pages}) == 2

    streams = [llm.submit(list(range(40 + i, 53 + i)), GREEDY) for i in range(3)]  # 13 tokens: 4 pages
    assert llm.snapshot().waiting == 3
    llm.engine.step()
    during = llm.snapshot()
    assert (during.waiting, during.running, during.steps) == (1, 2, 1)
    assert (during.prompt_tokens, during.new_tokens) == (26, 2)
    assert [g.held for g in during.pages] == [8, 8]
    assert all(g.held + g.cached + g.free == g.total for g in during.pages)
    assert during.cache_use == max(8 / n for n in llm.plan.num_pages)

    streams[2].cancel()
    for s in streams:
        s.result()
    after = llm.snapshot()
    assert after.finished == {"stop": 0, "length": 2, "abort": 1, "error": 0}
    assert (after.waiting, after.running, after.new_tokens) == (0, 0, 12)
    assert all(g.held == 0 and g.cached + g.free == g.total for g in after.pages)
    assert after.new_tokens_per_second > 0 and after.prompt_tokens_per_second > 0
    assert 0 < before.uptime < after.uptime
    assert before.step_seconds == before.longest_wait == after.longest_wait == 0 < during.longest_wait < during.uptime
    assert 0 < during.step_seconds < after.step_seconds < after.uptime

    again = llm.generate([list(range(40, 53))], GREEDY)[0]
    assert again.outputs[0].token_ids == streams[0].output.outputs[0].token_ids
    assert llm.snapshot().cached_tokens == 12  # three full pages of 4
    assert any(g.cached for g in llm.snapshot().pages)


def test_it_can_be_written_as_json(hybrid: Path) -> None:
    llm = LLM(hybrid, kv_cache_memory_bytes=1 << 20, max_model_len=200)
    llm.generate("the tide", GREEDY)
    snapshot = llm.snapshot()
    found = json.loads(json.dumps(snapshot.to_dict()))
    assert found["finished"]["length"] == 1 and found["new_tokens"] == 6
    assert found["pages"][1]["total"] == snapshot.pages[1].total
    with pytest.raises(AttributeError):
        snapshot.steps = 5  # type: ignore[misc]


def test_tokens_a_second_are_of_the_last_seconds() -> None:
    """Steps of 0.05 s, each with 3 prompt tokens and 7 new ones; then it is idle; then it works again, slower."""
    rate, prompt, new, now = Rate(), 0, 0, 100.0
    assert rate.per_second(now, 0, 0) == (0, 0)
    for _ in range(40):
        rate.begin(now, prompt, new)
        prompt, new, now = prompt + 3, new + 7, now + 0.05
        rate.end(now)
    assert rate.per_second(now, prompt, new) == pytest.approx((60, 140))
    assert rate.per_second(now + SECONDS + 0.1, prompt, new) == (0, 0)
    now += 1000
    for _ in range(100):  # twice as long as the window, and what was before the pause plays no part
        rate.begin(now, prompt, new)
        prompt, new, now = prompt + 1, new + 2, now + 0.1
        rate.end(now)
        assert rate.per_second(now, prompt, new) == pytest.approx((10, 20))
    for _ in range(100):  # other work: after the window only this counts
        rate.begin(now, prompt, new)
        prompt, new, now = prompt + 5, new, now + 0.1
        rate.end(now)
    assert rate.per_second(now, prompt, new) == pytest.approx((50, 0))


def test_a_step_longer_than_the_window_counts() -> None:
    rate = Rate()
    rate.begin(0.0, 0, 0)
    rate.end(4 * SECONDS)
    assert rate.per_second(4 * SECONDS, 2000, 0) == pytest.approx((100, 0))
