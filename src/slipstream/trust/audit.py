"""Where the code in this process came from: kernels of the Hub, Triton kernels, what was compiled here, and mapped libraries.

Everything is read from the process itself: sys.modules, /proc/self/maps, and the lists of files that installed packages carry.
"""

from __future__ import annotations

import base64
import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from slipstream.config.paths import cache_root
from slipstream.errors import TrustError
from slipstream.trust.imports import packages
from slipstream.trust.lock import is_native, tree_sha256
from slipstream.trust.tree import hash_tree

MAPS = Path("/proc/self/maps")


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece of code.

    Attributes:
        kind: hub (a kernel that was downloaded or lies in a folder), foreign (downloaded by another library of this process, so
            under no policy of ours), triton (source of ours, compiled by Triton), compiled (a
            library that slipstream compiled here), package, python, or system (libraries of an installed package, of Python, of
            neither).
        sha256: of the file, or of the tree.
        origin: package and version, org/repo@commit, or what else is known.
        matches: whether it is what its package's own list says, or for a kernel the lock; None where there is no such list.
    """

    kind: str
    name: str
    path: str
    sha256: str
    size: int
    origin: str
    version: str | None = None
    native: bool = True
    matches: bool | None = None
    details: Mapping[str, str] = field(default_factory=dict)


def audit() -> list[Piece]:
    """Everything native or downloaded in this process as it is now."""
    owners = {owner.path: owner for owner in _owned()}
    found = [*_kernels(), *_foreign(), *_triton()]
    stores = {p.path for p in found if p.kind in ("hub", "foreign")}
    for path in mapped_files(MAPS):
        if not any(path.is_relative_to(s) for s in stores):
            found.append(_library(path, owners.get(str(path))))
    return sorted(found, key=lambda p: (_KINDS.index(p.kind), p.name, p.path))


def mapped_files(maps: Path) -> list[Path]:
    """Files that are mapped as executable code. Where the system has no such list (macOS) there are none."""
    try:
        lines = maps.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    columns = (line.split(maxsplit=5) for line in lines)
    # A deleted file is named "path (deleted)"; what it was can no longer be read.
    return sorted({Path(c[5]) for c in columns if len(c) == 6 and "x" in c[1] and c[5].startswith("/")})


_KINDS = ("hub", "foreign", "triton", "compiled", "package", "python", "system")


@dataclass(frozen=True, slots=True)
class _Owner:
    path: str
    package: str
    version: str
    sha256: str | None  # as the package's list has it


def _owned() -> Iterator[_Owner]:
    """Every library of every installed package."""
    for package in metadata.distributions():
        for file in package.files or ():
            if is_native(file.name):
                stated = None
                if file.hash is not None and file.hash.mode == "sha256":
                    value = file.hash.value
                    stated = base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).hex()
                path = str(Path(str(package.locate_file(file))).resolve())
                yield _Owner(path, package.metadata["Name"], package.version, stated)


def _library(path: Path, owner: _Owner | None) -> Piece:
    sha256, size = _hash(path)
    if owner is not None:
        matches = None if owner.sha256 is None else owner.sha256 == sha256
        origin = f"{owner.package} {owner.version}"
        return Piece("package", path.name, str(path), sha256, size, origin, owner.version, matches=matches)
    if path.is_relative_to(cache_root() / "native"):
        return Piece("compiled", path.name, str(path), sha256, size, "compiled on this machine from slipstream's own C")
    if ".triton" in path.parts or "triton" in path.parent.parts[-2:]:
        return Piece("compiled", path.name, str(path), sha256, size, "compiled on this machine by Triton")
    prefixes = {Path(p).resolve() for p in (sys.base_prefix, sys.prefix)} - {Path("/usr"), Path("/")}
    if any(path.is_relative_to(p) for p in prefixes):
        return Piece("python", path.name, str(path), sha256, size, f"Python {sys.version.split()[0]}")
    return Piece("system", path.name, str(path), sha256, size, "the system; no Python package lists it")


def _hash(path: Path) -> tuple[str, int]:
    """An empty hash says that the file is not there any more."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
            return digest.hexdigest(), file.tell()
    except OSError:
        return "", 0


def _kernels() -> Iterator[Piece]:
    for package in packages():
        opened: Any = package.tag
        if opened is None:
            continue
        files = [p for p in opened.where.rglob("*") if p.is_file()]
        origin = f"{opened.repo}@{opened.revision}" if opened.revision else opened.repo
        details = {"variant": opened.variant, "signer": opened.signer or "not signed", "files": str(len(files))}
        native = any(is_native(p.name) for p in files)
        version = None if opened.version is None else str(opened.version)
        size = sum(p.stat().st_size for p in files)
        sha256 = _tree_hash(opened.where)
        same = sha256 == opened.sha256
        yield Piece("hub", opened.repo, str(opened.where), sha256, size, origin, version, native, same, details)


def _foreign() -> Iterator[Piece]:
    """What the `kernels` library or `transformers` (remote code) fetched and imported beside us, if they are here at all."""
    for loaded in getattr(sys.modules.get("kernels"), "get_loaded_kernels", list)():
        where = Path(str(loaded.module.__file__)).parent
        info = loaded.repo_info
        origin = f"{info.repo_id}@{info.revision}" if info else "a folder or a lock of the kernels library"
        yield _folder(str(loaded.metadata.name), where, origin)
    folders = {
        Path(str(m.__file__)).parent: name
        for name, m in list(sys.modules.items())
        if name.startswith("transformers_modules.") and getattr(m, "__file__", None)
    }
    for where, name in folders.items():
        yield _folder(name, where, "remote code of transformers")


def _folder(name: str, where: Path, origin: str) -> Piece:
    files = [p for p in where.rglob("*") if p.is_file()]
    native = any(is_native(p.name) for p in files)
    size = sum(p.stat().st_size for p in files)
    return Piece("foreign", name, str(where), _tree_hash(where), size, origin, None, native)


def _tree_hash(where: Path) -> str:
    """Empty where there is something that no pinned tree may have, such as links or bytecode."""
    try:
        return tree_sha256(hash_tree(where))
    except TrustError:
        return ""


def _triton() -> Iterator[Piece]:
    """Sources with Triton kernels that were imported, ours and those of the Hub, with the names of the kernels."""
    runtime = sys.modules.get("triton.runtime.jit")
    jit = getattr(runtime, "JITFunction", None)
    if jit is None:
        return
    by_file: dict[str, tuple[ModuleType, list[Any]]] = {}
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType) or not module.__name__.startswith(("slipstream.", "_kernel_")):
            continue
        for value in list(vars(module).values()):
            value = getattr(value, "fn", value) if not isinstance(value, jit) else value  # an autotuner wraps one
            if isinstance(value, jit) and value.__module__ == module.__name__ and module.__file__:
                by_file.setdefault(module.__file__, (module, []))[1].append(value)
    for file, (module, kernels) in by_file.items():
        sha256, size = _hash(Path(file))
        details = {"kernels": ", ".join(sorted({k.__name__ for k in kernels}))}
        if binaries := sorted({b for k in kernels for b in _binaries(k)}):
            details["binaries"] = ", ".join(binaries)
        yield Piece(
            "triton", module.__name__, file, sha256, size, module.__name__.split(".")[0], None, False, None, details
        )  # fmt: skip


def _binaries(kernel: Any) -> Iterator[str]:
    """Name and SHA-256 of the machine code that a Triton kernel has loaded so far, compiled now or found in Triton's cache."""
    for cache, *_ in list(getattr(kernel, "device_caches", {}).values()):
        for compiled in list(cache.values()):
            for kind in ("cubin", "hsaco"):
                if isinstance(code := getattr(compiled, "asm", {}).get(kind), bytes):
                    yield f"{kernel.__name__} {hashlib.sha256(code).hexdigest()}"
