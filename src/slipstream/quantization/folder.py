"""A folder that appears whole or not at all: written under a hidden name, with a journal to go on from, then renamed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slipstream.checkpoint.manifest import sha256_of
from slipstream.checkpoint.save import sync_folder, write_text
from slipstream.errors import CapacityError, CheckpointError, ConfigError

JOURNAL = ".journal"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NOTED = {"shard", "bytes", "sha256", "errors"}  # of each finished shard
_SPARE = 16 << 20  # bytes of disk beyond the weights: config, tokenizer, manifest


def check_target(out: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse what could not end well, before any work.

    Args:
        out: absolute; its parent resolved.

    Raises:
        ConfigError: `out` exists, is part of the source or holds it, or cannot be made.
    """
    if out in (source, *source.parents) or source in out.parents:
        raise ConfigError(f"out: {out} and the model {source} must not contain each other; name another folder")
    check_parent(out)
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise ConfigError(
            f"out: {out} exists; name another folder, or allow it to be replaced (overwrite=True, --overwrite)"
        )
    if out.is_symlink() or not out.is_dir():
        raise ConfigError(f"out: {out} is not a folder; remove it first")
    inside = list(out.iterdir())
    if inside and (not (out / "config.json").is_file() or any(p.is_dir() for p in inside)):
        raise ConfigError(f"out: {out} holds more than a model, or none, so it is not replaced; name another folder")


def check_parent(out: Path) -> None:
    """Raises ConfigError if there is no folder to put `out` into, or it cannot be written."""
    if not out.parent.is_dir():
        raise ConfigError(f"out: there is no folder {out.parent} to put {out.name} into; make it first")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"out: not allowed to write in {out.parent}; name another folder")


def hidden_beside(out: Path) -> Path:
    """Where `out` is made."""
    return out.with_name(f".{out.name}.partial")


def check_space(folder: Path, needed: int) -> None:
    """Raises CapacityError if the disk has no room for so many bytes more."""
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE:
        raise CapacityError(
            f"{folder}: the new files take {needed + _SPARE:,} bytes more, and the disk has {free:,} free; free some space "
            "or name a folder on another disk"
        )


@contextlib.contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """The hidden folder beside `out`, locked. The kernel frees the lock when its holder dies, however it dies.

    Raises:
        ConfigError: another process writes the same folder.
    """
    hidden = hidden_beside(out)
    while True:
        hidden.mkdir(exist_ok=True)
        handle = os.open(hidden, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"out: another process is writing {out}; wait for it, or name another folder"
                ) from None
            if _is(handle, hidden):  # else its holder has just renamed it
                try:
                    yield hidden
                finally:
                    with contextlib.suppress(OSError):
                        hidden.rmdir()  # if there is nothing in it to go on from
                return
        finally:
            os.close(handle)


def _is(handle: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), folder.stat())
    except FileNotFoundError:
        return False


class Journal:
    """What a run was asked and which shards it has finished: a line of JSON each, on the disk before the next is begun.

    Attributes:
        finished: shard -> what was noted of it; its file is there and has the noted hash.
        restarted: whether an earlier run was found that had been asked something else.
    """

    def __init__(self, folder: Path, asked: Mapping[str, Any]) -> None:
        self._path = folder / JOURNAL
        self.finished: dict[str, dict[str, Any]] = {}
        lines = self._lines()
        same = bool(lines) and lines[0] == json.loads(json.dumps(asked))
        self.restarted = bool(lines) and not same
        for line in lines[1:] if same else ():
            path = folder / str(line.get("shard"))
            if path.name in self.finished or not path.is_file() or sha256_of(path) != line.get("sha256"):
                break
            self.finished[path.name] = line
        for path in folder.iterdir():
            if path.name not in self.finished and path.name != JOURNAL:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        whole = self._path.with_suffix(".new")
        write_text(whole, "".join(json.dumps(line) + "\n" for line in (dict(asked), *self.finished.values())))
        whole.replace(self._path)
        sync_folder(folder)
        self._file = self._path.open("a", encoding="utf-8")

    def _lines(self) -> list[dict[str, Any]]:
        try:
            text = self._path.read_text("utf-8")
            lines = [json.loads(line) for line in text.split("\n")[:-1]]  # a line without its end was cut off
        except (OSError, ValueError):
            return []
        return lines[:1] + [line for line in lines[1:] if isinstance(line, dict) and line.keys() == _NOTED]

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self, shard: str, *, bytes: int, sha256: str, errors: Mapping[str, tuple[float, float]]) -> None:
        """Note that a shard is on the disk."""
        self.finished[shard] = {"shard": shard, "bytes": bytes, "sha256": sha256, "errors": errors}
        self._append(self.finished[shard])

    def close(self, *, remove: bool = False) -> None:
        self._file.close()
        if remove:
            self._path.unlink()


def publish(hidden: Path, out: Path) -> None:
    """Give the hidden folder its name. What had the name before is removed."""
    sync_folder(hidden)
    if os.path.lexists(out):
        _exchange(hidden, out)
        sync_folder(out.parent)
        (hidden / "config.json").unlink(missing_ok=True)  # so that what is left of it never opens
        shutil.rmtree(hidden)
    else:
        hidden.rename(out)
    sync_folder(out.parent)


def _exchange(a: Path, b: Path) -> None:
    """Swap two names in one move (Linux, renameat2). Raises OSError where that cannot be done."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    if call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(b))


def check_exchange(hidden: Path, out: Path) -> None:
    """Raises ConfigError if `out` stands in the way and this system cannot swap it with another folder in one move."""
    if not os.path.lexists(out):
        return
    a, b = hidden / "a", hidden / "b"  # if we are killed here, whoever goes on removes them
    a.mkdir(exist_ok=True)
    b.mkdir(exist_ok=True)
    try:
        _exchange(a, b)
    except OSError as e:
        raise ConfigError(f"out: {out} cannot be replaced in one move on this system; remove it first") from e
    finally:
        a.rmdir()
        b.rmdir()


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn what the disk refuses into an error that says what to do."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(
                f"{out}: the disk is full; free some space and run the same again, which goes on from here"
            ) from e
        raise CheckpointError(f"{e.filename or out}: {e.strerror or e}; check the disk, then run the same again") from e
