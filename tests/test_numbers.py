"""docs/numbers.md says what the records say, and nothing else."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def numbers() -> ModuleType:
    path = ROOT / "benchmarks/page.py"
    spec = importlib.util.spec_from_file_location("numbers_page", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def record(claim: str, value: float, date: str = "2026-01-02T00:00:00+00:00", **more: Any) -> dict[str, Any]:
    base = {
        "claim": claim,
        "value": value,
        "unit": "tok/s",
        "limit": 800.0,
        "baseline": {},
        "ratio": None,
        "machine": "a card",
    }
    return base | {"command": "python x.py", "commit": "abc", "date": date} | more


def test_the_page_is_what_the_records_say(numbers: ModuleType) -> None:
    page = (ROOT / "docs/numbers.md").read_text()
    assert numbers.filled(page, numbers.last_records()) == page, "run python benchmarks/page.py"


def test_every_goal_of_the_page_is_a_claim_that_a_benchmark_names(numbers: ModuleType) -> None:
    sources = "".join(f.read_text() for f in (ROOT / "benchmarks").glob("gpu_*.py"))
    for goal in (*numbers.GOALS, *numbers.FRACTIONS):
        kind, _, last = goal.claim.rpartition(".")
        assert goal.claim in sources or (kind in sources and re.search(rf"\b{last}\b", sources)), goal.claim


def test_the_last_record_counts(numbers: ModuleType, tmp_path: Path) -> None:
    rows = [record("a.b", 1, "2026-01-03T00:00:00+00:00"), record("a.b", 2), record("a.c", 3), record("a.c", 4)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = numbers.last_records(tmp_path)
    assert {claim: r["value"] for claim, r in found.items()} == {"a.b": 1, "a.c": 4}


@pytest.mark.parametrize(
    ("goal", "value", "more", "answer"),
    [
        ({"must": 480}, 480.0, {}, "yes"),
        ({"must": 480}, 479.9, {}, "no"),
        ({"must": 55, "lower": True}, 55.0, {}, "yes"),
        ({"must": 55, "lower": True}, 55.1, {}, "no"),
        ({"must": 0.6, "of_limit": True}, 3.0, {"fraction": 0.61}, "yes"),
        ({"must": 0.6, "of_limit": True}, 3.0, {"fraction": 0.59}, "no"),
    ],
)
def test_whether_a_goal_is_reached(
    numbers: ModuleType, goal: dict[str, Any], value: float, more: dict[str, Any], answer: str
) -> None:
    wanted = numbers.Goal("it", "a.b", **goal)
    text = numbers.goals((wanted,), {"a.b": record("a.b", value, **more)}, vllm=False)
    assert [cell.strip() for cell in text.splitlines()[-1].split("|")][6] == answer
    assert "no record" in numbers.goals((wanted,), {}, vllm=False)


def test_tables_are_whole_and_the_rest_of_the_page_stays(numbers: ModuleType) -> None:
    found = {"gpu.decode.b1": record("gpu.decode.b1", 12345.6), "cpu.x": record("cpu.x", 0.01234, baseline={"peer": 2})}
    page = "before\n" + "\nbetween\n".join(
        f"{numbers.BEGIN.format(n)}\nold\n{numbers.END.format(n)}" for n in numbers.parts(found)
    )
    new = numbers.filled(page, found)
    assert "old" not in new and new.startswith("before\n") and new.count("\nbetween\n") == 3
    assert "| 12,346 | 800 | yes | a card |" in new and "| `cpu.x` | 0.01234 | tok/s | peer 2 |  | a card |" in new
    assert "`gpu.decode.b1` | `python x.py` | `abc` | 2026-01-02" in new
    assert numbers.filled(new, found) == new
    for text in numbers.parts(found).values():
        assert len({line.count("|") for line in text.splitlines()}) == 1
    with pytest.raises(SystemExit, match="no place for"):
        numbers.filled("nothing", found)


def test_no_benchmark_hides_a_module_that_others_import() -> None:
    """Run as a script, a benchmark finds its own folder first."""
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert not names & {*sys.stdlib_module_names, "torch", "numpy", "transformers", "triton", "slipstream"}
