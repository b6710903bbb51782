"""What a benchmark found: figures beside their limits, and what one must know to read them."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from slipstream import __version__


@dataclass(frozen=True)
class Figure:
    """One number.

    Attributes:
        at: what it was measured at, such as the batch size.
        value: the median of `runs`, in `unit`.
        limit: what the machine's measured rates allow, in the same unit; `bound_by` is which of them: bandwidth or matrices.
        fraction: how much of that rate was reached.
        against: the peer's median, measured in the same way after it; `ratio`: how many times better than that, above 1 is good.
    """

    name: str
    at: Mapping[str, int]
    value: float
    unit: str
    runs: Sequence[float]
    limit: float
    bound_by: str
    fraction: float
    more: Mapping[str, float] = field(default_factory=dict)
    against: Mapping[str, float] = field(default_factory=dict)
    ratio: float | None = None


@dataclass(frozen=True)
class Report:
    """All that is known of one benchmark; `chosen` holds the options that it set by itself."""

    model: str
    figures: Sequence[Figure]
    machine: Mapping[str, Any]
    plan: Mapping[str, Any]
    chosen: Mapping[str, Any]
    versions: Mapping[str, str | None]
    notes: Sequence[str] = ()
    commit: str | None = field(default_factory=lambda: commit())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def versions(*more: str) -> dict[str, str | None]:
    """Of Python, slipstream, and the packages that matter."""
    found: dict[str, str | None] = {"python": platform.python_version(), "slipstream": __version__}
    for name in ("torch", "triton", *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """Of the checkout that this code lies in, if it lies in one."""
    here = Path(__file__)

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here.parent), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no", "--", str(here.parents[1]))
    return f"{git('rev-parse', '--short=12', 'HEAD')}{'+changes' if changed else ''}"
