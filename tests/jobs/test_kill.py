"""A job that is killed, torn or out of disk at random moments answers every line exactly once when it is called again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("kills", "seed"),
    [(30, 1), pytest.param(200, 2, marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
)
def test_killed_at_random_moments(tmp_path: Path, kills: int, seed: int) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(ROOT / "tests/jobs/killer.py"), str(tmp_path), str(kills), str(seed)]
    ran = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=800)
    assert ran.returncode == 0, ran.stderr
    counts = json.loads(ran.stdout)
    assert counts["kills"] >= kills
    assert min(counts["torn"], counts["full"], counts["resumed"]) >= kills // 15, counts
