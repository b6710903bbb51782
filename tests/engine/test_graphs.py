"""Decoding with fixed inputs: the answers are those of steps that are built anew, whatever the sizes. The recording itself
is a GPU's matter (tests/gpu); here it runs the model each time, on the inputs that a graph would read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slipstream import LLM, SamplingParams
from slipstream.engine.graphs import Decoder, Run, ladder
from slipstream.engine.runner import Runner

PROMPTS = ["t", "the tide", "he said that the sea is a rose " * 3, "QQ", "a rose is a", "no"]
# Of each request by its number: what is done after the recorded step. Odd ones have a temperature.
MORE: list[dict[str, Any]] = [
    {}, {"top_k": 5, "repetition_penalty": 1.3}, {"presence_penalty": 1.5}, {"top_p": 0.8, "frequency_penalty": 0.5},
    {"logit_bias": {40: 3.0}}, {"min_p": 0.05, "min_new_tokens": 9, "stop_token_ids": tuple(range(30, 60))},
]  # fmt: skip


def test_the_ladder_reaches_every_size() -> None:
    for most in (1, 2, 3, 7, 8, 9, 64, 100, 256):
        sizes = ladder(most)
        assert sizes[-1] == most and list(sizes) == sorted(set(sizes))
        for n in range(1, most + 1):
            size = next(s for s in sizes if s >= n)
            assert size - n <= max(3, size // 4), (n, size)
    assert len(ladder(256)) < 24


@pytest.mark.parametrize("more", [False, True], ids=["plain", "drawn"])
@pytest.mark.parametrize("ahead", [False, True], ids=["after", "ahead"])
@pytest.mark.parametrize(
    "options", [{}, {"page_size": 3, "kv_cache_memory_bytes": 75_000}], ids=["room", "little room"]
)
@pytest.mark.parametrize("name", ["hybrid", "llama"])
def test_answers_are_those_of_steps_built_anew(
    request: pytest.FixtureRequest, name: str, options: dict[str, int], ahead: bool, more: bool
) -> None:
    folder: Path = request.getfixturevalue(name)
    params = [
        SamplingParams(
            temperature=0.7 * (i % 2), max_new_tokens=3 + 9 * i, ignore_eos=True, seed=i, **(MORE[i] if more else {})
        )
        for i in range(len(PROMPTS))
    ]
    load = {"kv_cache_memory_bytes": 1 << 21, "max_model_len": 140, "max_num_seqs": 5, **options}
    plain, llm = LLM(folder, **load), LLM(folder, **load, async_scheduling=ahead)
    shapes = []

    def record(run: Run, again: Callable[[], None]) -> Run:
        shapes.append(1)
        run()
        again()
        return run

    plan = dataclasses.replace(llm.plan, cuda_graphs=True)
    runner = llm.engine.runner = Runner(plan, plan.model)
    runner.decoder = Decoder(plan, plan.model, runner.storage, runner.answers, record)
    want, got = ([o.outputs[0] for o in m.generate_batch(PROMPTS, params)] for m in (plain, llm))
    assert [c.token_ids for c in got] == [c.token_ids for c in want]
    assert not more or any(c.finish_reason == "stop" and len(c.token_ids) > 9 for c in got)
    assert len(shapes) >= 3
    assert len(runner.decoder._tables) <= 2 * 2, "tables of those that ended are not kept"
    assert bool(llm.snapshot().preemptions) == bool(options)
