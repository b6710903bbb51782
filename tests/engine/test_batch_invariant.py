"""batch_invariant=True: the logits of a request have the same bits alone and in any company, order, chunks, pages or cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream import LLM, SamplingParams
from slipstream.batch import Batch
from slipstream.cache.storage import Storage
from slipstream.errors import KernelError
from slipstream.ops import native
from slipstream.request import Step
from tests.parity.test_mxfp4 import SIZES, publish
from tests.parity.tiny import TINY, save

NEW = 9
WIDE = SIZES | {"hidden_size": 192, "moe_intermediate_size": 64, "head_dim": 32}  # rows of a multiple of 64
# Longer and shorter than the windows; the last ones begin as another does.
LONG = [(i * i + 3) % 90 + 5 for i in range(75)]
PROMPTS = [[11], LONG, [7, 3, 90, 4, 4, 61], list(range(20, 53)), LONG[:44], [*LONG[:70], 8, 9]]
PARAMS = [
    SamplingParams(temperature=0, max_new_tokens=NEW, ignore_eos=True, prompt_logprobs=0),
    SamplingParams(seed=5, temperature=1.3, max_new_tokens=NEW, ignore_eos=True),
]
VARIANTS: dict[str, dict[str, Any]] = {
    "together": {},
    "in chunks of 1": {"max_num_batched_tokens": 1},
    "in chunks of 7, pages of 3": {"max_num_batched_tokens": 7, "page_size": 3},
    "two at a time, pages of 5": {"max_num_seqs": 2, "page_size": 5},
    "without room": {"page_size": 2, "max_num_batched_tokens": 16, "max_model_len": 90},
    "nothing is kept": {"enable_prefix_caching": False},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, float32": ("llama", {}),
    "hybrid, bfloat16": ("hybrid", {"dtype": "bfloat16"}),
    "gpt-oss, mxfp4, bfloat16": ("gpt_oss", {"dtype": "bfloat16"}),
    "gemma2, int8, bfloat16": ("gemma2", {"dtype": "bfloat16", "quantization": "int8"}),
    "qwen3_moe, int4, float32": ("qwen3_moe", {"dtype": "float32", "quantization": "int4"}),
}
Found = dict[tuple[int, ...], Tensor]


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], Found]:
    """A model, and the logits of every request made alone."""
    why = native.build("dense", strict=True)
    if isinstance(why, str):
        pytest.skip(why)
    name, options = CASES[request.param]
    if name in TINY and name not in ("llama",):
        folder = tmp_path_factory.mktemp(name) / name
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(TINY, name, (TINY[name][0], TINY[name][1] | WIDE))
            save(name, folder)
        if name == "gpt_oss":
            publish(folder)
    else:
        folder = request.getfixturevalue(name)
    return folder, options, alone(load(folder, **options))


def load(folder: Path, **options: Any) -> LLM:
    options = {"batch_invariant": True, "kv_cache_memory_bytes": 4 << 20, "max_model_len": 140, **options}
    return LLM(folder, device="cpu", **options)


@contextmanager
def logits_of(llm: LLM) -> Iterator[Found]:
    """Every row of logits, under the tokens that it comes after; where they come twice, they are the same twice."""
    runner = llm.engine.runner
    model, run, steps = runner.model, runner.launch, []
    found: Found = {}

    def taken(step: Step) -> Any:
        steps.append(step)
        return run(step)

    def forward(batch: Batch, cache: Storage) -> Tensor:
        logits = model(batch, cache)
        at = {int(row): logits[i].clone() for i, row in enumerate(batch.logits_rows)}
        for c, start in zip(steps[-1].chunks, batch.query_starts, strict=False):
            row = runner.rows[c.sequence]
            history = (*row.prompt_token_ids, *row.output_token_ids)
            assert history[c.start : c.end] == c.token_ids
            for i in range(len(c.token_ids)):
                if start + i in at:
                    key = history[: c.start + i + 1]
                    again = torch.equal(found.setdefault(key, at[start + i]), at[start + i])
                    assert again or not llm.plan.asked.batch_invariant
        return logits

    runner.launch, runner.model = taken, forward  # type: ignore[method-assign, assignment]
    yield found
    runner.launch, runner.model = run, model  # type: ignore[method-assign]


def alone(llm: LLM) -> Found:
    with logits_of(llm) as found:
        for params in PARAMS:
            for prompt in PROMPTS:
                llm.generate([prompt], params)
    return found


def together(llm: LLM, order: Callable[[list[Any]], Any] = list) -> Found:
    with logits_of(llm) as found:
        streams = [llm.submit(prompt, params) for params, prompt in order([(a, b) for a in PARAMS for b in PROMPTS])]
        for s in streams:
            assert s.result().outputs[0].finish_reason == "length"
    return found


def same(want: Found, got: Found) -> None:
    assert want.keys() == got.keys()
    assert all(torch.equal(logits, got[key]) for key, logits in want.items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_logits_are_those_made_alone(case: tuple[Path, dict[str, Any], Found], variant: str) -> None:
    folder, options, want = case
    changes = dict(VARIANTS[variant])
    if variant == "without room":
        groups = load(folder, **options).plan.groups
        itemsize = 2 if options.get("dtype") == "bfloat16" else 4
        room = 170 if folder.name.startswith("hybrid") else 110  # tokens: two run together, and outgrow it
        changes["kv_cache_memory_bytes"] = room * sum(g.bytes_per_token(itemsize) for g in groups)
    llm = load(folder, **options, **changes)
    same(want, together(llm))
    same(want, together(llm, lambda all: all[::-1]))  # what the first left in the cache is there
    counters = llm.engine.scheduler.counters
    assert (counters.preemptions > 0) == (variant == "without room")
    assert (counters.cached_tokens > 0) == (variant != "nothing is kept")


def test_the_cases_are_worth_comparing(case: tuple[Path, dict[str, Any], Found]) -> None:
    _, _, want = case
    assert len(want) > 100 and all(x.isfinite().all() for x in want.values())
    assert len({x.argmax().item() for x in want.values()}) > 10


def test_this_can_fail(llama: Path) -> None:
    """The normal mode, whose answers are the same but for their last bits."""
    want, got = (make(load(llama, batch_invariant=False, dtype="float32")) for make in (alone, together))
    shared = want.keys() & got.keys()
    assert len(shared) > 100
    assert not all(torch.equal(want[key], got[key]) for key in shared)
    assert all(torch.allclose(want[key], got[key], atol=1e-3) for key in shared)


def test_two_threads(llama: Path) -> None:
    """Work is divided otherwise among two; the sums are not."""
    want = alone(load(llama, num_threads=1))
    try:
        same(want, together(load(llama, num_threads=2)))
    finally:
        torch.set_num_threads(1)


def test_the_plan_says_so(llama: Path) -> None:
    plan = load(llama).plan
    assert "asked for" in plan.why["batch_invariant"]
    names = {c.op: c.name for c in plan.choices}
    assert names == {
        "norm": "reference", "attention_input": "reference", "attention": "native",
        "activation": "native_invariant", "sampling": "reference", "linear[dense]": "native_invariant",
    }  # fmt: skip
    for c in plan.choices:
        for name, why in c.rejected:
            assert why and (name, why) != ("torch", "None")
    normal = load(llama, batch_invariant=False).plan
    assert "batch_invariant" not in normal.why
    assert not any("invariant" in c.name for c in normal.choices)


@pytest.mark.parametrize("forced", [{"attn_implementation": "sdpa"}, {"linear_implementation": "torch"}])
def test_what_cannot_keep_it_is_an_error_that_names_it(llama: Path, forced: dict[str, str]) -> None:
    with pytest.raises(KernelError, match=f"'{next(iter(forced.values()))}'.*order"):
        load(llama, **forced)


def test_without_a_compiler(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "build", lambda name, strict=False: "there is no C compiler (cc) on this machine")
    with pytest.raises(KernelError, match="no C compiler"):
        load(llama)
