"""`slipstream tune`: what it prints of what was found, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slipstream.tuning.run import Line, Tuning
from tests.cli.conftest import Run

FOUND = Tuning(
    "m", "a card", Path("/cache/tuned.json"), [Line("moe", "mxfp4 8 x 6 x 4", "one token", "this", 9.26, "that", 7.0)]
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def tune(model: str, options: dict[str, Any], tell: Any, **progress: Any) -> Tuning:
        found.update(model=model, options=options)
        tell("experts")
        for report in progress.values():
            report(1, 2)
        return FOUND if model == "m" else Tuning(model, "a card", FOUND.path)

    monkeypatch.setattr("slipstream.tuning.run.tune", tune)
    return found


def test_before_and_after(slipstream: Run, asked: dict[str, Any]) -> None:
    ran = slipstream("tune", "m", "--weights", "random", "--max-num-seqs", 9)
    assert ran.code == 0 and asked == {"model": "m", "options": {"weights": "random", "max_num_seqs": 9}}
    title, columns, line = ran.out.splitlines()
    assert title == "m on a card" and columns.split() == ["op", "shape", "at", "before", "now"]
    assert [cell.strip() for cell in line.split("  ") if cell] == [
        "moe",
        "mxfp4 8 x 6 x 4",
        "one token",
        "this",
        "9.3 us",
        "that",
        "7.0 us",
    ]
    assert "/cache/tuned.json" in ran.err
    assert slipstream("tune", "other").out.splitlines()[1].strip() == "nothing to choose for these weights"


def test_json(slipstream: Run, asked: dict[str, Any]) -> None:
    got = slipstream("tune", "m", "--json").json
    assert got["card"] == "a card" and got["path"] == "/cache/tuned.json"
    assert got["lines"][0]["before_us"] == 9.26 and got["lines"][0]["after"] == "that"


def test_a_cpu_has_nothing_to_tune(slipstream: Run, model: str) -> None:
    ran = slipstream("tune", model, "--device", "cpu", "--json")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: --device: tune measures kernels of CUDA devices") and ran.err.count("\n") == 1


def test_an_interrupt(slipstream: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def tune(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("slipstream.tuning.run.tune", tune)
    ran = slipstream("tune", "m")
    assert ran.code == 130 and ran.out == ""


def test_help_is_by_example(slipstream: Run) -> None:
    ran = slipstream("tune", "--help")
    assert ran.code == 0 and "slipstream tune gpt-oss-20b --weights random" in ran.out
