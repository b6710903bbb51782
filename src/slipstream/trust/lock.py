"""kernels.lock: for each repository the commit, and for each build variant every file with its size and SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from slipstream.errors import TrustError

MAX_BYTES = 64 << 20
_FORMAT = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = r"\w(?:[\w.-]{0,94}\w)?"
_REPO = re.compile(f"{_NAME}/{_NAME}", re.ASCII)
_VARIANT = re.compile(r"[\w-][\w.+-]{0,127}", re.ASCII)


@dataclass(frozen=True, slots=True)
class File:
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Build:
    """One build variant, such as torch-cuda or torch213-cxx11-cu130-x86_64-linux.

    Attributes:
        sha256: of the tree, see tree_sha256.
        signer: who had signed it when it was pinned, and `issuer` who vouched for that name.
    """

    variant: str
    sha256: str
    files: Mapping[str, File]
    signer: str | None = None
    issuer: str | None = None

    @property
    def size(self) -> int:
        return sum(f.size for f in self.files.values())

    @property
    def is_native(self) -> bool:
        """Whether it has machine code, which cannot be reviewed as it is."""
        return any(is_native(name) for name in self.files)


@dataclass(frozen=True, slots=True)
class Pin:
    """A repository of the Hub (`org/repo`), or a folder of this machine (an absolute path; then there is no revision)."""

    repo: str
    revision: str | None
    version: int | None
    builds: Mapping[str, Build]
    depends: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        return self.revision is None


@dataclass(frozen=True, slots=True)
class Lock:
    pins: Mapping[str, Pin]
    path: Path | None = None

    @classmethod
    def parse(cls, data: bytes, path: Path) -> Lock:
        """
        Raises:
            TrustError: it is no lock of slipstream, or says two things at once.
        """
        try:
            if len(data) > MAX_BYTES:
                raise ValueError(f"is larger than {MAX_BYTES >> 20} MiB")
            value = json.loads(data, object_pairs_hook=_once)
            _only(value, {"format", "kernels"}, "the file")
            if value.get("format") != _FORMAT:
                raise ValueError(
                    f'does not say "format": {_FORMAT}; it may be of another program or a later slipstream'
                )
            pins = [_pin(repo, entry, path.parent) for repo, entry in value["kernels"].items()]
            found = _once([(pin.repo, pin) for pin in pins])  # a folder can be written in several ways
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            what = f"has no {e}" if isinstance(e, KeyError) else str(e)
            raise TrustError(f"{path}: {what}; make it again with: slipstream kernels lock org/repo") from e
        return cls(found, path)

    def text(self) -> str:
        """The file's content. A folder below that of the lock is written relative to it, so that a project can move."""
        base = self.path.parent if self.path else Path("/")
        kernels = {}
        for repo, pin in sorted(self.pins.items()):
            name = repo
            if pin.is_local and Path(repo).is_relative_to(base):
                name = f"./{Path(repo).relative_to(base)}"
            builds = {
                b.variant: {
                    "sha256": b.sha256,
                    **({"signer": b.signer, "issuer": b.issuer} if b.signer else {}),
                    "files": {n: [f.size, f.sha256] for n, f in sorted(b.files.items())},
                }
                for b in sorted(pin.builds.values(), key=lambda b: b.variant)
            }
            depends = {"depends": list(pin.depends)} if pin.depends else {}
            kernels[name] = {"revision": pin.revision, "version": pin.version, **depends, "builds": builds}
        text = json.dumps({"format": _FORMAT, "kernels": kernels}, indent=1)
        return re.sub(r"\[\s+(\d+),\s+(\"[0-9a-f]{64}\")\s+\]", r"[\1, \2]", text) + "\n"


def tree_sha256(files: Mapping[str, File]) -> str:
    """Of the lines `SHA-256  size  name`, sorted by name in bytes: no two different trees have the same lines."""
    ordered = sorted(files.items(), key=lambda item: item[0].encode())
    return hashlib.sha256("".join(f"{f.sha256}  {f.size}  {n}\n" for n, f in ordered).encode()).hexdigest()


def is_native(name: str) -> bool:
    return bool(re.search(r"\.(so(\.[\d.]+)?|dylib|dll|pyd|a|o|cubin|fatbin|hsaco|metallib)$", name))


def bad_name(name: str) -> str | None:
    """Why a file of this name is never part of a kernel."""
    parts = PurePosixPath(name).parts
    if not name or name.startswith("/") or ".." in parts or "/".join(parts) != name or "\\" in name:
        return "its path leaves the folder"
    if not name.isprintable():
        return "its name has characters that cannot be shown"
    if "__pycache__" in parts or name.endswith((".pyc", ".pyo")):
        return "it is bytecode, which hides what it does"
    return None


def is_repo(name: str) -> bool:
    return bool(_REPO.fullmatch(name)) and ".." not in name and "--" not in name


def write_atomically(path: Path, text: str, mode: int = 0o644) -> None:
    """`path` is the old content or the new, whatever happens meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({k for k, _ in pairs}) < len(pairs):
        raise ValueError(f"says something twice: {sorted(k for k, _ in pairs)}")
    return dict(pairs)


def _only(value: Any, known: set[str], what: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not an object")
    if unknown := value.keys() - known:
        raise ValueError(f"{what} has the unknown entries {sorted(unknown)}")


def _pin(name: str, entry: dict[str, Any], base: Path) -> Pin:
    _only(entry, {"revision", "version", "builds", "depends"}, name)
    revision, version = entry["revision"], entry["version"]
    if is_repo(name):
        if not isinstance(revision, str) or not _COMMIT.fullmatch(revision):
            raise ValueError(f"{name}: its revision is not a whole commit: {revision!r}")
    elif name.startswith(("./", "/")) and revision is None:
        name = str((base / name).resolve())
    else:
        raise ValueError(f"{name!r} is neither org/repo nor a path that begins with ./ or /")
    if version is not None and (not isinstance(version, int) or isinstance(version, bool) or version < 0):
        raise ValueError(f"{name}: its version is not a whole number: {version!r}")
    depends = tuple(entry.get("depends", ()))
    if not all(isinstance(d, str) and is_repo(d) for d in depends):
        raise ValueError(f"{name}: depends is not a list of org/repo: {depends!r}")
    builds = {variant: _build(name, variant, b) for variant, b in entry["builds"].items()}
    if not builds:
        raise ValueError(f"{name}: it has no builds")
    return Pin(name, revision, version, builds, depends)


def _build(repo: str, variant: str, entry: dict[str, Any]) -> Build:
    what = f"{repo}, {variant}"
    _only(entry, {"sha256", "signer", "issuer", "files"}, what)
    if not _VARIANT.fullmatch(variant):
        raise ValueError(f"{what}: that is no name of a build")
    files = {}
    for name, (size, digest) in entry["files"].items():
        if why := bad_name(name):
            raise ValueError(f"{what}: {name!r}: {why}")
        if type(size) is not int or size < 0 or not _SHA256.fullmatch(digest):
            raise ValueError(f"{what}: {name}: not [bytes, SHA-256]: {[size, digest]}")
        files[name] = File(size, digest)
    if not files:
        raise ValueError(f"{what}: it has no files")
    if tree_sha256(files) != entry["sha256"]:
        raise ValueError(f"{what}: its files do not make up its sha256, so it was edited by hand or damaged")
    signer, issuer = entry.get("signer"), entry.get("issuer")
    if not all(who is None or isinstance(who, str) for who in (signer, issuer)):
        raise ValueError(f"{what}: its signer is not text")
    return Build(variant, entry["sha256"], files, signer, issuer)
