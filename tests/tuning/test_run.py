"""What `tune` tries, how it decides, and what it writes; kernels and the clock are stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from slipstream.errors import ConfigError
from slipstream.layers.linear import Linear
from slipstream.layers.mlp import MoE
from slipstream.ops import tuned
from slipstream.ops.linear.triton_few import FEW, Few
from slipstream.ops.tuned import Experts, Group, Tile
from slipstream.tuning import run
from tests.engine import hopper
from tests.engine.test_warm import SHAPE


def test_a_candidate_must_run_be_right_and_be_clearly_faster() -> None:
    right, wrong = torch.tensor([1.0, -4.0]), torch.tensor([1.0, -4.1])
    times = {"before": 10.0, "as fast": 9.9, "wrong": 1.0, "nan": 1.0, "better": 8.0, "best": 7.0}
    now: list[str] = []

    def trial(name: str, value: torch.Tensor) -> Callable[[], torch.Tensor]:
        def work() -> torch.Tensor:
            now[:] = [name]
            return value

        return work

    def too_big() -> torch.Tensor:
        raise OutOfResources(300_000, 232_448, "shared memory")

    def clock(call: Callable[[], object]) -> float:
        call()
        return times[now[0]]

    trials = {name: trial(name, right) for name in ("before", "as fast")}
    trials |= {"too big": too_big, "wrong": trial("wrong", wrong), "nan": trial("nan", right * float("nan"))}
    assert run.fastest("before", trials, clock) == ("before", {"before": 10.0, "as fast": 9.9})
    trials |= {name: trial(name, right * 1.001) for name in ("better", "best")}
    assert run.fastest("before", trials, clock)[0] == "best"

    def broken() -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        run.fastest("before", trials | {"broken": broken}, clock)


def test_candidates_are_a_handful_and_possible() -> None:
    for before in (Tile(8, 2, 16, 2, 3), Tile(16, 4, 4, 2, 4), Tile(128, 8, 2, 4, 3), Group(64), Group(128)):
        found = run.candidates(before, grouped=True)
        assert found[0] == before and len(found) == len(set(found)) and 3 < len(found) < 13
        assert all(tuned.possible(c) for c in found if isinstance(c, Tile))
    assert not any(isinstance(c, Group) for c in run.candidates(Tile(128, 8, 2, 4, 3), grouped=False))


def test_where_cublas_overtakes() -> None:
    assert run.crossover({1: (1, 2), 8: (2, 2), 32: (4, 3), 64: (1, 9)}) == 8
    assert run.crossover({1: (3, 2), 8: (1, 2)}) == 0
    assert run.crossover({1: (1, 2), 8: (1, 2)}) == 8


def test_the_table_is_made_of_the_fastest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model of 2 layers: sorted pairs win from 12 pairs an expert on, and else four stages."""
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path / "home"))
    runner = hopper.runner_for(tmp_path / "model", SHAPE, monkeypatch)
    plan, lines, calls = runner.plan, [], []

    def stacks(x: torch.Tensor, ids: torch.Tensor, *_: Any, tuned: Experts, **options: Any) -> torch.Tensor:
        pairs = ids.numel()
        assert int(ids.max()) < 8 and ids.shape[1] == 4
        choice = tuned.few if pairs <= 8 else tuned.choose(pairs / 8)
        calls.append((len(x), choice))
        return torch.ones(len(x), 320)

    def clock(call: Callable[[], object]) -> float:
        call()
        tokens, choice = calls[-1]
        if isinstance(choice, Group):
            return 5.0 if tokens * 4 / 8 > 12 else 500.0
        return 100.0 if choice is None else 20.0 if choice.stages == 4 else 100.0  # None: the kernels' own rule

    monkeypatch.setattr("slipstream.ops.moe.triton.stacks", stacks)
    monkeypatch.setattr(run, "compile_all", lambda work, finish: work())
    ((name, entry),) = run._experts(plan, lambda text: None, lines, clock)
    assert name == "mxfp4 8 x 192 x 320"
    assert [most for most, _ in entry.steps] == [5, 12, 24, 48, 96, float("inf")] and entry.few.stages == 4
    assert all(isinstance(c, Group) == (most > 12) and (most > 12 or c.stages == 4) for most, c in entry.steps)
    assert len(lines) == 7 and all(line.after_us <= line.before_us for line in lines)
    assert (
        lines[0].before == "by rule"
        and lines[0].entry == "one token"
        and lines[0].before_us == 50
        and lines[0].after_us == 10
    ), "two layers each"
    assert len([m for m in plan.model.modules() if isinstance(m, MoE)]) == 2


def test_linear_layers_by_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path / "home"))
    plan = hopper.runner_for(tmp_path / "model", SHAPE, monkeypatch).plan
    state: dict[str, Any] = {}

    def own(self: Few, x: torch.Tensor, weight: torch.Tensor, bias: object) -> None:
        state.update(ours=True, tokens=len(x), shape=tuple(weight.shape))

    def cublas(x: torch.Tensor, weight: torch.Tensor, bias: object) -> None:
        state.update(ours=False, tokens=len(x), shape=tuple(weight.shape))

    def clock(call: Callable[[], object]) -> float:
        call()
        overtaken = {(999, 320): 16, (320, 384): 0}.get(state["shape"], 99)
        return 7.0 if state["ours"] == (state["tokens"] <= overtaken) else 9.0

    monkeypatch.setattr(Few, "own", own)
    monkeypatch.setattr(torch.nn.functional, "linear", cublas)
    lines: list[run.Line] = []
    found = dict(run._linears(plan, lambda text: None, lines, clock))
    assert found["bfloat16 999 x 320"] == 16 and found["bfloat16 320 x 384"] == 0 and found["bfloat16 640 x 320"] == 64
    shapes = {tuple(m.parts[0][1][0].shape) for m in plan.model.modules() if isinstance(m, Linear)}
    assert len(found) == len(shapes) == len(lines)
    line = next(line for line in lines if line.shape == "bfloat16 999 x 320")
    assert (line.before, line.after, line.entry) == (f"up to {FEW}", "up to 16", "32 tokens")
    assert line.before_us == 9.0 and line.after_us == 7.0


def test_a_cpu_has_nothing_to_tune(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tune measures kernels of CUDA devices, and this model would run on cpu"):
        run.tune("no-such-model", {"device": "cpu"}, lambda text: None)
