"""A folder against what was pinned: every file, nothing else, and no link; then only what was read is used."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from slipstream.errors import TrustError
from slipstream.trust.lock import Build, File, bad_name, tree_sha256

_CHUNK = 1 << 20
_MAX_FILES = 20_000
_TEXTS = (".py", ".json", ".sigstore")  # what is used from memory


def hash_tree(folder: Path) -> dict[str, File]:
    """Every file below `folder`.

    Raises:
        TrustError: it has links, bytecode, or anything else that is not a plain file.
    """
    found = {}
    for name in _names(folder):
        with _opened(folder, name) as file:
            digest, size = hashlib.sha256(), 0
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
        found[name] = File(size, digest.hexdigest())
    return found


def verify(folder: Path, build: Build, target: Path | None = None) -> dict[str, bytes]:
    """Read every file once and compare it with `build`; what was read is written to `target` where one is given.

    Returns:
        Python sources and metadata, as they were read: executing these and not the files leaves no time between check and use.

    Raises:
        TrustError: names each difference.
    """
    names = _names(folder)
    wrong = [f"{n} was added" for n in names if n not in build.files]
    wrong += [f"{n} is missing" for n in sorted(build.files.keys() - set(names))]
    texts, found = {}, {}
    for name in [] if wrong else names:
        pinned = build.files[name]
        digest, size, kept = hashlib.sha256(), 0, []
        with _opened(folder, name) as file, _written(target, name) as copy:
            while size <= pinned.size and (chunk := file.read(_CHUNK)):
                digest.update(chunk)
                size += len(chunk)
                if copy is not None:
                    copy.write(chunk)
                if name.endswith(_TEXTS):
                    kept.append(chunk)
        found[name] = File(size, digest.hexdigest())
        if size != pinned.size:
            wrong.append(f"{name} has not the {pinned.size:,} bytes that were pinned")
        elif found[name] != pinned:
            wrong.append(f"{name} differs: SHA-256 {digest.hexdigest()[:16]}..., pinned {pinned.sha256[:16]}...")
        elif name.endswith(_TEXTS):
            texts[name] = b"".join(kept)
    if wrong:
        raise TrustError("; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""))
    assert tree_sha256(found) == build.sha256
    return texts


def check_private(path: Path) -> None:
    """Nobody but this user (or root) may be able to change what is at `path`, or to put something else in its place.

    Raises:
        TrustError: says which folder, and how to close it.
    """
    mine = {0, os.getuid()}
    path = path.absolute()
    inside = [p for p in path.rglob("*") if not p.is_symlink()] if path.is_dir() else []
    for p in (path, *path.resolve().parents, *inside):
        found = p.stat()
        # In a folder with the sticky bit, such as /tmp, others cannot replace what is not theirs.
        open_to_others = found.st_mode & 0o022 and not (stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX)
        if found.st_uid not in mine or open_to_others:
            raise TrustError(
                f"{p} could be changed by another user, so nothing is run from there; take the rights away (chmod go-w {p}) or "
                f"set SLIPSTREAM_HOME to a folder of your own"
            )


def _names(folder: Path) -> list[str]:
    """Names relative to `folder`, with / between."""
    names: list[str] = []
    left = [""]
    while left:
        at = left.pop()
        try:
            entries = sorted(os.scandir(folder / at), key=lambda e: e.name)
        except OSError as e:
            raise TrustError(f"{folder / at} cannot be read: {e.strerror}") from e
        for entry in entries:
            name = f"{at}{entry.name}"
            if why := bad_name(name):
                raise TrustError(f"{_shown(name)} was added: {why}; remove it")
            if entry.is_symlink():
                raise TrustError(f"{name} is a symbolic link, and may point to anything")
            if entry.is_dir(follow_symlinks=False):
                left.append(f"{name}/")
            elif entry.is_file(follow_symlinks=False):
                names.append(name)
            else:
                raise TrustError(f"{name} is not a plain file")
            if len(names) + len(left) > _MAX_FILES:
                raise TrustError(f"{folder} has more than {_MAX_FILES:,} files")
    return sorted(names)


def _shown(name: str) -> str:
    return name if name.isprintable() else repr(name)


def _opened(folder: Path, name: str) -> BinaryIO:
    """No link on the way below `folder` is followed, not even one that was put there a moment ago."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    *folders, last = name.split("/")
    try:
        at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in folders:
                below = os.open(part, flags | os.O_DIRECTORY, dir_fd=at)
                os.close(at)
                at = below
            handle = os.open(last, flags | os.O_NONBLOCK, dir_fd=at)
        finally:
            os.close(at)
    except OSError as e:
        raise TrustError(f"{name} cannot be read, or was replaced meanwhile: {e.strerror}") from e
    file = os.fdopen(handle, "rb")
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        file.close()
        raise TrustError(f"{name} is not a plain file")
    return file


@contextmanager
def _written(target: Path | None, name: str) -> Iterator[BinaryIO | None]:
    if target is None:
        yield None
        return
    path = target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        yield file
        os.fchmod(file.fileno(), 0o444)
