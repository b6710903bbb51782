"""Files that are either whole or not there: hashes, lists of hashes, writing in one move, and a lock between processes.

Lists of hashes are in the format of `sha256sum`: `X.gguf.sha256` beside a file, `SHA256SUMS` in a folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from slipstream.checkpoint.save import sync_folder
from slipstream.errors import CheckpointError

# (what is being done, bytes done, bytes in all or None)
Progress = Callable[[str, int, int | None], None]

CHUNK = 1 << 20
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def silent(label: str, done: int, total: int | None) -> None:
    """The Progress that shows nothing."""


def read_chunks(path: Path, label: str, progress: Progress) -> Iterator[bytes]:
    total, done = path.stat().st_size, 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk
            done += len(chunk)
            progress(label, done, total)


def sha256_of(path: Path, progress: Progress = silent) -> str:
    digest = hashlib.sha256()
    for chunk in read_chunks(path, f"verifying {path.name}", progress):
        digest.update(chunk)
    return digest.hexdigest()


def write_whole(path: Path, chunks: Iterable[bytes]) -> str:
    """Write a file so that `path` is the old content or the new, whatever happens meanwhile. Returns its SHA-256."""
    digest = hashlib.sha256()
    handle, name = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return digest.hexdigest()


def sums_text(sums: Mapping[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def read_sums(path: Path) -> dict[str, str]:
    """File name -> SHA-256. Names that leave the folder are refused."""
    sums = {}
    for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
        match = _LINE.fullmatch(line)
        name = PurePosixPath(match[2]) if match else None
        if match is None or name is None or name.is_absolute() or ".." in name.parts:
            raise CheckpointError(f"{path}: line {number} is not '<SHA-256>  <file in this folder>': {line[:80]!r}")
        sums[match[2]] = match[1]
    return sums


@contextlib.contextmanager
def locked(folder: Path, progress: Progress) -> Iterator[None]:
    """Hold the folder's lock. The kernel frees it when its holder dies, however it dies, so it is never stale."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that pulls this model", 0, None)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`, whose lock is held: so what other processes left there is dead, and goes."""
    for left in folder.glob(".partial-*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder, ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            why = "the disk is full; nothing unfinished was kept. Free some space"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            why = "not allowed to read or write there. Change its permissions"
        else:
            why = f"{error.strerror or error}. Check the disk"
        where = error.filename or folder
        raise CheckpointError(
            f"{where}: {why}, or name another folder with SLIPSTREAM_HOME (or HF_HOME for the Hub)"
        ) from error
