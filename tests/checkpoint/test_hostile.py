"""Spoiled checkpoints (see fuzz.py): every one opens or ends in a typed error, in under 2 s and 1 GB each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.fuzz import FLOODS, MEMORY, NUM_FLOODS

FUZZ = Path(__file__).with_name("fuzz.py")


def fuzz(kind: str, first: int, count: int) -> dict[str, Any]:
    """Run cases in a process of their own, as a limit on memory cannot be taken back."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, str(FUZZ), kind, str(first), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["faults"] == []
    assert result["seconds"] < 2, f"{kind} case {result['slowest']}"
    assert result["peak"] < MEMORY
    assert result["opened"] + result["refused"] == count
    return result


@pytest.mark.parametrize("kind", ["header", "index", "config", "packed", "gguf"])
def test_a_sample(kind: str) -> None:
    result = fuzz(kind, 0, 200)
    assert result["opened"] > 5 and result["refused"] > 50  # neither all harmless nor all hopeless


@pytest.mark.parametrize("case", [0, 10, 18, 19, 2 * len(FLOODS), NUM_FLOODS - 2])
def test_some_of_the_slowest(case: int) -> None:
    fuzz("flood", case, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count"), [("header", 3500), ("index", 1500), ("config", 2000), ("packed", 2000), ("gguf", 2000)]
)
def test_all(kind: str, count: int) -> None:
    fuzz(kind, 0, count)


@pytest.mark.slow
@pytest.mark.parametrize("case", range(NUM_FLOODS))
def test_all_of_the_slowest(case: int) -> None:
    fuzz("flood", case, 1)
