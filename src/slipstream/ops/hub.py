"""Kernels of the Hugging Face Hub and of local folders: found with the `kernels` library, verified here, and only then imported.

The only file that imports `kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from slipstream.trust import Policy


@dataclass(frozen=True, slots=True)
class Opened:
    """A kernel that was verified and imported. `layer` is the class asked for with `org/repo:Layer`, else None."""

    module: ModuleType
    repo: str
    revision: str | None
    variant: str
    sha256: str  # of the tree
    where: Path  # the verified files that it was imported from
    layer: Any = None


def open_kernel(name: str, device: str, policy: Policy) -> Opened:
    """Verify and import `org/repo`, `org/repo:Layer`, or a folder that the lock lists (`/path` or `./path`, `:Layer` too).

    Opening the same bytes twice gives the same module.

    Args:
        device: cpu, cuda or mps; a build variant for it is looked for.

    Raises:
        TrustError: it is not allowed, not pinned, not equal to what was pinned, or cannot be had to compare.
        KernelError: nothing is wrong with it, but it cannot run: no build for this machine, or importing it failed; or the
            extra `kernels` is not installed.
    """
    raise NotImplementedError


def opened() -> list[Opened]:
    """The kernels that this process has imported, for `audit` and `explain --used`."""
    raise NotImplementedError
