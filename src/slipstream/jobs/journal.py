"""What a job has answered so far: one line an answer, each with a checksum, so that a cut or damaged end is seen."""

from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from zlib import crc32

from slipstream.checkpoint.save import sync_folder
from slipstream.errors import ConfigError
from slipstream.quantization.folder import disk_errors

NAME = "journal"
_NONE = -1
_MOST_LINES, _MOST_SECONDS = 64, 1.0  # that may be lost when the power fails; a killed process loses none


class Journal:
    """The answers to one input under one set of settings, in the order in which they were finished.

    Memory: 8 bytes for each line of the input.

    Args:
        folder: the job's own, locked.
        out: the file that the job is to make, for messages.
        asked: {"input": SHA-256, "settings": {...}}; a journal that was begun with another is not gone on with.
        lines: how many there are to answer.
        overwrite: begin anew instead of refusing.

    Raises:
        ConfigError: there is a journal of another input or other settings.
    """

    def __init__(self, folder: Path, out: Path, asked: Mapping[str, Any], lines: int, *, overwrite: bool) -> None:
        self._path, self._out = folder / NAME, out
        self._at = array("q", [_NONE]) * lines
        self.done = self.errors = self.prompt_tokens = self.new_tokens = 0
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            header = _pack(json.dumps(asked, sort_keys=True).encode())
            self._end = self._read(header, overwrite=overwrite)
            os.ftruncate(self._handle, self._end)
            if not self._end:
                self._write(header)
                sync_folder(folder)
            self.resumed = self.done
            self.sync()
        except BaseException:
            os.close(self._handle)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._handle)

    def _read(self, header: bytes, *, overwrite: bool) -> int:
        """Take in what is whole; gives the bytes that are."""
        with self._path.open("rb") as file:
            first = file.readline()
            if first != header:
                begun = first.endswith(b"\n")  # else it was killed while it wrote its first line
                if begun and not overwrite:
                    raise ConfigError(self._refusal(_unpack(first), header))
                return 0
            end = file.tell()
            for line in file:
                body = _unpack(line)
                if body is None:
                    break
                head, _, _ = body.partition(b"\t")
                index, good, prompt, new = map(int, head.split())
                if self._at[index] == _NONE:
                    self._count(index, end, good, prompt, new)
                end += len(line)
        return end

    def _refusal(self, found: bytes | None, header: bytes) -> str:
        anew = "or begin anew with --overwrite"
        if found is None:
            return f"out: the journal of the unfinished job in {self._path.parent} is damaged; remove it, {anew}"
        old, new = json.loads(found), json.loads(_unpack(header) or b"{}")
        if old.get("input") != new["input"]:
            return (
                f"in: differs from what the unfinished job for {self._out} was begun with; put the old file back to go on, "
                f"name another output, {anew}"
            )
        before, now = old.get("settings") or {}, new["settings"]
        names = [n for n in sorted(before.keys() | now.keys()) if before.get(n) != now.get(n)]
        shown = (
            ", ".join(f"{n} was {before.get(n)!r} and is {now.get(n)!r}" for n in names[:5]) or "its format is another"
        )
        return (
            f"out: the unfinished job for {self._out} was begun with other settings: {shown}; give the same again to go "
            f"on, name another output, {anew}"
        )

    def _count(self, index: int, at: int, good: int, prompt: int, new: int) -> None:
        self._at[index] = at
        self.done += 1
        self.errors += not good
        self.prompt_tokens += prompt
        self.new_tokens += new

    def __contains__(self, index: int) -> bool:
        return self._at[index] != _NONE

    def add(self, index: int, value: Mapping[str, Any], *, good: bool, prompt_tokens: int, new_tokens: int) -> None:
        """Keep the answer to a line.

        Raises:
            CapacityError: the disk is full. What was kept before stays.
        """
        if index in self:
            raise AssertionError(f"line {index} is answered twice")
        text = json.dumps(value, ensure_ascii=False, allow_nan=False).encode(errors="replace")  # a message may quote it
        at = self._end
        self._write(_pack(b"%d %d %d %d\t%b" % (index, good, prompt_tokens, new_tokens, text)))
        self._count(index, at, good, prompt_tokens, new_tokens)
        self._unsynced += 1
        if self._unsynced >= _MOST_LINES or time.monotonic() - self._synced > _MOST_SECONDS:
            self.sync()

    def _write(self, data: bytes) -> None:
        with disk_errors(self._out):
            os.lseek(self._handle, self._end, os.SEEK_SET)  # over the part of a line that a full disk may have left
            left = memoryview(data)
            while left:
                left = left[os.write(self._handle, left) :]
            self._end += len(data)

    def sync(self) -> None:
        """Have all of it on the disk."""
        with disk_errors(self._out):
            os.fsync(self._handle)
        self._unsynced, self._synced = 0, time.monotonic()

    def answers(self) -> Iterator[bytes]:
        """Every answer as a line, in the order of the input."""
        with self._path.open("rb") as file:
            for at in self._at:
                file.seek(at)
                yield file.readline().partition(b"\t")[2]

    def remove(self) -> None:
        self._path.unlink()


def _pack(body: bytes) -> bytes:
    return b"%08x %b\n" % (crc32(body), body)


def _unpack(line: bytes) -> bytes | None:
    """What stands in a line, or None where it is cut off or damaged."""
    body = line[9:-1]
    return body if line.endswith(b"\n") and line[:9] == b"%08x " % crc32(body) else None
