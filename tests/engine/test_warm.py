"""Kernels compiled ahead: gathered by running steps on a machine with an H100 that is only believed to be there."""

from __future__ import annotations

import dataclasses
import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from slipstream.engine import warm
from slipstream.engine.graphs import Shape
from slipstream.engine.runner import Runner
from slipstream.ops.moe import Pairs
from slipstream.ops.reduce import Slots
from slipstream.ops.reduce import triton as reduce_triton
from slipstream.parallel.collectives import Wires
from tests.engine import hopper

SHAPE = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 320, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 999,
    "num_local_experts": 8, "num_experts_per_tok": 4, "sliding_window": 24, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "attention_bias": True, "swiglu_limit": 7.0, "rope_theta": 150000, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "eos_token_id": 5, "quantization_config": {"quant_method": "mxfp4"},
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
Keys = set[tuple[str, str]]


@triton.jit
def _double(x, y, n, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    tl.store(y + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def _broken(x, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.static_assert(SIZE == 3)
    tl.store(x, 1)


@pytest.fixture
def card(tmp_path: Path) -> Iterator[Path]:
    with hopper.compiler(tmp_path / "kernels"):
        yield tmp_path / "kernels"


def test_launches_are_compiled_and_do_not_run(card: Path) -> None:
    x, y = torch.arange(12.0), torch.zeros(12)
    finished, told = [], []

    def work() -> None:
        for n in (12, 12, 11, 16):  # 16 can be divided by 16, the others are alike
            _double[(1,)](x, y, n, SIZE=16)
        _double[(1,)](x[1:], y, 12, SIZE=16)  # begins at 4 bytes
        _double[(1,)](x, y, 12, SIZE=32, num_warps=2)

    kernels, failed = warm.compile_all(work, finished.append, lambda done, total: told.append((done, total)))
    assert not failed and not y.any()
    assert len(kernels) == len(finished) == 4 and told == [(i, 4) for i in (1, 2, 3, 4)]
    assert {k.metadata.num_warps for k in kernels} == {2, 4} and all(k.asm["cubin"] for k in kernels)
    folders = {name for k in kernels for name in warm._folders(k)}
    assert folders == {f.name for f in card.iterdir()}
    again, _ = warm.compile_all(work, finished.append)
    assert {k.hash for k in again} == {k.hash for k in kernels} and len(finished) == 4, "this process has them"


def test_what_cannot_be_compiled_does_not_stop_the_others(card: Path) -> None:
    x = torch.arange(12.0)

    def work() -> None:
        _broken[(1,)](x, SIZE=4)
        _double[(1,)](x, x, 12, SIZE=64)

    kernels, failed = warm.compile_all(work, lambda kernel: None)
    assert [k.name for k in kernels] == ["_double"] and len(failed) == 1 and "static_assert" in str(failed[0])


@pytest.mark.timeout(60)
def test_an_interrupt_ends_it(card: Path) -> None:
    x, before = torch.arange(12.0), JITFunction.run

    def work() -> None:
        for size in range(12):
            _double[(1,)](x, x, 12, SIZE=1 << size)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    finished: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        warm.compile_all(work, finished.append, interrupt)
    assert len(finished) < 12 and JITFunction.run is before
    assert len(warm.compile_all(work, finished.append)[0]) == 12, "and it can be done again"


def test_other_threads_launch_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[bool] = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, grid, warmup, **options: ran.append(warmup))
    with warm.diverted() as kernels:
        thread = threading.Thread(target=lambda: _double[(1,)](1, 2, 3, SIZE=4))
        thread.start()
        thread.join()
        assert ran == [False] and kernels == []
        _double[(1,)](1, 2, 3, SIZE=4)
        _double[(1,)](1, 2, 3, SIZE=4)
    assert ran == [False, True]


@pytest.fixture
def keys(card: Path, monkeypatch: pytest.MonkeyPatch) -> Keys:
    """Name and key of each kernel that would be compiled."""
    found: Keys = set()
    monkeypatch.setattr(JITFunction, "_do_compile", lambda self, key, *_: found.add((self.__name__, key)))
    return found


@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}], ids=["graphs", "eager"])
def test_every_kernel_of_any_step_is_among_them(
    options: dict[str, bool], tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = hopper.runner_for(
        tmp_path / "model",
        SHAPE,
        monkeypatch,
        max_num_seqs=24,
        max_num_batched_tokens=1200,
        max_model_len=2100,
        **options,
    )
    before = [t.clone() for t in runner.answers]
    with warm.diverted():
        warm.rehearse(runner)
    names = {name for name, _ in keys}
    assert names >= {
        "_attend", "_decode", "_combine", "_attention_input", "_add_norm", "part", "choice", "at_once",
        "_one", "_some", "_race", "_finish",
        "schedule", "tiles", "gather", "grouped",
    }  # fmt: skip
    assert len(keys) < 90 and not runner.rows and not runner._sources
    assert all(torch.equal(a, b) for a, b in zip(runner.answers, before, strict=True))
    ahead = set(keys)
    draw = random.Random(3)
    with torch.inference_mode(), warm.diverted():
        for _ in range(40):
            counts = [
                draw.choice((1, draw.randrange(1, 40), draw.randrange(1, 400))) for _ in range(draw.randrange(1, 6))
            ]
            warm._run(
                runner, [(draw.choice((0, 0, draw.randrange(2100 - n))), n) for n in counts if sum(counts) <= 1200]
            )
        for rows in range(1, 25):
            _decode(runner, rows, draw.randrange(2100))
    assert not keys - ahead


def test_a_large_step_may_end_in_any_number_of_rows(
    tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x is as the layers compute then, and what experts leave of few rows is as in a decoding step, in more or fewer parts."""
    runner = hopper.runner_for(
        tmp_path / "model", SHAPE | {"intermediate_size": 1024}, monkeypatch, max_num_seqs=140, max_num_batched_tokens=1100,
        max_model_len=2100,
    )  # fmt: skip
    with warm.diverted():
        warm.rehearse(runner)
    ahead = set(keys)
    with torch.inference_mode(), warm.diverted():
        for answers in (1, 2, 5, 30, 47, 100, 127, 138):
            for prompt in (15, 380, 700):
                warm._run(runner, [(9, 1)] * answers + [(0, prompt)])
    assert not keys - ahead


@pytest.mark.parametrize("spread", [False, True], ids=["cut", "spread"])
def test_one_of_two_ranks_speaks_to_nobody(
    spread: bool, tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels are those of its part of the model, with the sums through shared memory and the norms in them."""

    def speak(*_: object, **more: object) -> None:
        raise AssertionError("the other rank is not there")

    for name in ("all_reduce", "all_to_all_single"):
        monkeypatch.setattr(torch.distributed, name, speak)
    monkeypatch.setattr("slipstream.parallel.collectives.gather_into", speak)
    places = (torch.zeros(2, dtype=torch.int64), *(torch.zeros(n, dtype=torch.int32) for n in (256, 1)))
    peers: Any = SimpleNamespace(slots=Slots(0, 2, *places))
    runner = hopper.runner_for(
        tmp_path / "model", SHAPE, monkeypatch, wires=Wires(peers=peers), max_num_seqs=5, max_num_batched_tokens=300,
        max_model_len=400, tensor_parallel_size=2, enable_expert_parallel=spread,
    )  # fmt: skip
    assert {c.op: c.name for c in runner.plan.choices}["reduce"] == "peers"
    assert "norm before the router" not in runner.plan.why and ("choice of experts" in runner.plan.why) is not spread
    launched: list[tuple[bool, int]] = []
    left: list[bool] = []
    launch = reduce_triton._launch

    def seen(part: torch.Tensor, x: torch.Tensor | None, *more: Any) -> None:
        launched.append((x is not None, len(part)))
        left.append(isinstance(part, Pairs))
        launch(part, x, *more)

    monkeypatch.setattr(reduce_triton, "_launch", seen)
    with warm.diverted():
        warm.rehearse(runner)
    names = {name for name, _ in keys}
    assert names >= {"_sum", "_attend", "_decode", "_attention_input", "at_once", "choice", "_race", "tiles"}
    assert any(left), "the sum over ranks begins with that of the experts"
    layers = SHAPE["num_hidden_layers"]
    norms = [norm for norm, _ in launched]
    # Of larger steps only the last two sums are small, as only rows that get logits are in them.
    larger = 2 * (sum(n > 256 for n in warm.sizes(300)) + len(warm.sizes(5)) - 1)
    assert norms.count(True) - larger == 2 * layers * norms.count(False) > 0 < larger, (
        "but for the embedding, each sum is one with a norm"
    )
    assert max(rows for _, rows in launched) <= 256 and runner.plan.ops.ranks.is_silent is False
    assert not runner.model.expert_load()


def _decode(runner: Runner, rows: int, start: int) -> None:
    if runner.decoder is None:
        warm._run(runner, [(start, 1)] * rows)
        return
    size = next(n for n in runner.decoder._sizes if n >= rows)
    most = runner.decoder._most
    widths = tuple(min(m, 32 << max(0, (start // 16).bit_length() - 5)) for m in most)
    runner.decoder._step(Shape(size, widths))()


def test_attention_is_one_kernel_in_a_decoding_layer(
    tmp_path: Path, card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one more where sequences are so few that several programs share the keys of each."""
    runner = hopper.runner_for(tmp_path / "model", SHAPE, monkeypatch, max_num_seqs=64, max_model_len=400)
    launched: list[str] = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **more: launched.append(self.__name__))
    with torch.inference_mode():
        _decode(runner, 64, 250)
        assert launched.count("_decode") == SHAPE["num_hidden_layers"]
        assert not {"_attention_input", "_attend", "_combine"} & {*launched}
        _decode(runner, 1, 250)
    assert launched.count("_decode") == 2 * SHAPE["num_hidden_layers"]
    assert "_combine" in launched and not {"_attention_input", "_attend"} & {*launched}


def test_attention_takes_its_input_where_both_are_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slipstream.ops.attention.decode import decode

    plan = hopper.plan_for(tmp_path / "model", SHAPE, monkeypatch)
    assert plan.ops.decode is decode and "part of attention[triton]" in plan.why["attention_input"]
    for options in ({"kernels": {"rotary": "torch"}}, {"attn_implementation": "triton_invariant"}):
        plan = hopper.plan_for(tmp_path / "model", SHAPE, monkeypatch, **options)
        assert plan.ops.decode is None and "attention_input" not in plan.why


def test_a_card_is_in_use_before_there_are_weights_to_lay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[torch.device] = []
    monkeypatch.setattr("slipstream.ops.moe.layout.begin", begun.append)
    hopper.plan_for(tmp_path / "experts", SHAPE, monkeypatch)
    assert begun == [torch.device("cuda", 0)]
    begun.clear()
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "head_dim": 64}
    absent = {"attention_bias": False, "layer_types": None, "quantization_config": None}
    dense = {k: v for k, v in SHAPE.items() if "experts" not in k} | llama | absent
    hopper.plan_for(tmp_path / "dense", dense, monkeypatch)
    assert not begun, "floats are not laid out"
    hopper.plan_for(tmp_path / "packed", dense, monkeypatch, quantization="mxfp4")
    assert begun == [torch.device("cuda", 0)]


def test_experts_leave_their_sum_to_the_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = hopper.plan_for(tmp_path / "experts", SHAPE, monkeypatch)
    assert "norm[triton]" in plan.why["sum of experts"]
    assert plan.ops.experts.kernel.experts.keywords["leave"] is True  # type: ignore[attr-defined]


def test_another_norm_gets_sums_that_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = hopper.plan_for(tmp_path / "model", SHAPE, monkeypatch, kernels={"norm": "torch"})
    assert {c.op: c.name for c in plan.choices}["norm"] == "torch" and "sum of experts" not in plan.why
    assert "leave" not in getattr(plan.ops.experts.kernel.experts, "keywords", {})


@pytest.mark.parametrize("options", [{"kernels": {"norm": "torch"}}, {"batch_invariant": True}], ids=str)
def test_no_other_norm_or_router_is_passed_by(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = hopper.plan_for(tmp_path / "model", SHAPE, monkeypatch)
    assert both.ops.add_norm_router is not None
    assert both.why["norm before the router"] == "is part of router[triton] in steps of at most 8 tokens"
    assert both.why["choice of experts"] == "is part of moe[triton] in steps of one token"
    plan = hopper.plan_for(tmp_path / "model", SHAPE, monkeypatch, **options)
    assert plan.ops.add_norm_router is None and not {"norm before the router", "choice of experts"} & {*plan.why}


def test_a_step_counts_what_it_calls(tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = hopper.runner_for(
        tmp_path / "model", SHAPE, monkeypatch, count_calls=True, max_num_seqs=24, max_num_batched_tokens=300,
        max_model_len=400,
    )  # fmt: skip
    used, layers = runner.plan.ops.used, SHAPE["num_hidden_layers"]
    assert used is not None
    for rows, norms in ((1, layers + 1), (8, layers + 1), (9, 2 * layers + 1)):
        used.calls.clear()
        with torch.inference_mode(), warm.diverted():
            _decode(runner, rows, 30)
        assert used.calls["norm", "triton"] == norms and used.calls["router", "triton"] == layers, rows


def test_sizes_are_few_and_reach_the_most() -> None:
    for most in (1, 2, 7, 100, 2048, 8192):
        found = warm.sizes(most)
        assert found[0] == 1 and found[-1] == most and found == sorted(set(found))
    assert len(warm.sizes(8192)) < 70


def test_it_is_done_once(tmp_path: Path, card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path / "home"))
    plan = hopper.plan_for(tmp_path / "model", SHAPE, monkeypatch)
    runner: Any = dataclasses.make_dataclass("Fake", ["plan"])(plan)
    files = {"cubin": str(card / "folder" / "x.cubin")}
    kernel = dataclasses.make_dataclass("Kernel", ["metadata_group"])(files)
    (card / "folder").mkdir(parents=True)
    calls: list[int] = []
    failed: list[BaseException] = [RuntimeError("no room")]

    def compile_all(*_: Any) -> tuple[list[Any], list[BaseException]]:
        calls.append(1)
        return [kernel], failed

    monkeypatch.setattr(warm, "compile_all", compile_all)
    assert warm.warm(runner) == 1 and "1 cannot be: no room" in plan.why["kernels"]
    failed.clear()
    assert warm.warm(runner) == 1 and "1 compiled once for this card" in plan.why["kernels"]
    assert warm.warm(runner) == 0 and plan.why["kernels"].startswith("compiled before") and len(calls) == 2
    (note,) = (tmp_path / "home" / "kernels").iterdir()
    assert json.loads(note.read_text()) == ["folder"]
    note.write_text("{")
    assert warm.warm(runner) == 1, "a damaged note is no note"
    (card / "folder").rmdir()
    assert warm.warm(runner) == 1, "Triton's cache was emptied"
    other: Any = dataclasses.replace(runner, plan=dataclasses.replace(plan, max_num_seqs=3))
    (card / "folder").mkdir()
    assert warm.warm(other) == 1 and warm.warm(other) == 0
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path / "model" / "config.json"))
    assert warm.warm(other) == warm.warm(other) == 1, "nothing can be noted there"
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "tuned.json").write_text("{}")
    assert warm.warm(other) == 1, "other choices are other kernels"


def test_a_failure_costs_time_alone(tmp_path: Path, card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path / "home"))
    plan = hopper.plan_for(tmp_path / "model", SHAPE, monkeypatch)
    runner: Any = dataclasses.make_dataclass("Fake", ["plan"])(plan)

    def rehearse(runner: object) -> None:
        raise torch.OutOfMemoryError("no room for 8192 tokens")

    monkeypatch.setattr(warm, "rehearse", rehearse)
    with pytest.warns(UserWarning, match="the first requests wait for them: no room"):
        assert warm.warm(runner) == 0
    assert "kernels" not in plan.why and not (tmp_path / "home").exists()


def test_there_is_nothing_to_do_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "compile_all", None)
    plan = hopper.plan_for(tmp_path / "model", SHAPE, monkeypatch)
    for changed in (
        dataclasses.replace(plan, device=torch.device("cpu")),
        dataclasses.replace(plan, choices=tuple(dataclasses.replace(c, op="moe", name="loop") for c in plan.choices)),
    ):
        runner: Any = dataclasses.make_dataclass("Fake", ["plan"])(changed)
        assert warm.warm(runner) == 0 and "kernels" not in changed.why
