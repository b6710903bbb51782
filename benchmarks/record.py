"""Writes one measured claim: a line in benchmarks/results/<family>.jsonl, and the same as the last line of output."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def record(
    claim: str,
    value: float,
    unit: str,
    *,
    limit: float | None = None,
    baseline: dict[str, float] | None = None,
    ratio: float | None = None,
    versions: tuple[str, ...] = (),
    choices: dict[str, str] | None = None,
    family: str | None = None,
    machine: str | None = None,
    **more: Any,
) -> None:
    """Append the claim to its family's file.

    Args:
        value: the median of what was measured, in `unit`.
        limit: what the hardware, or the interpreter, allows at best.
        baseline: peers measured in this same run.
        ratio: how many times better than the peer; above 1 is good.
        versions: packages whose versions matter, beside slipstream and Python.
        choices: the implementations that ran.
        family: the file's name, if it is not the first part of the claim's (`gpu.decode.b1` -> gpu.jsonl).
        machine: the card, where one is used; else it is the processor.
    """
    packages = ("slipstream", *versions)
    line = {
        "claim": claim,
        "value": round(value, 3),
        "unit": unit,
        "limit": limit,
        "baseline": baseline or {},
        "ratio": None if ratio is None else round(ratio, 3),
        "machine": machine or _machine(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "choices": choices or {},
        **more,
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    text = json.dumps(line, ensure_ascii=False)
    path = ROOT / "benchmarks/results" / f"{family or claim.split('.')[0]}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(text + "\n")
    print(text, flush=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        if package != "slipstream":
            return None
        import slipstream  # run from its folder, not installed

        return slipstream.__version__


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def _commit() -> str:
    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
