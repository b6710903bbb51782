"""kernels.lock: for each repository the commit, and for each build variant every file with its SHA-256."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class File:
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Build:
    """One build variant, such as torch-cuda or torch213-cxx11-cu130-x86_64-linux. `sha256` is that of the tree."""

    variant: str
    sha256: str
    files: Mapping[str, File]
    signer: str | None = None


@dataclass(frozen=True, slots=True)
class Pin:
    """A repository of the Hub (`org/repo`), or a folder on this machine (a path; then there is no revision)."""

    repo: str
    revision: str | None
    version: int | None
    builds: Mapping[str, Build]
    depends: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Lock:
    pins: Mapping[str, Pin]
    path: Path | None = None

    @classmethod
    def read(cls, path: Path) -> Lock:
        raise NotImplementedError
