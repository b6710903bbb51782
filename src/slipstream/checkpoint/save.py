"""Write safetensors files as the tensors come: the header first, then bytes in order, hashed on the way.

Format: https://github.com/huggingface/safetensors#format. The same tensors always make the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipstream.checkpoint.safetensors import INDEX
from slipstream.checkpoint.tensors import DENSE

_ALIGN = 8  # bytes: the largest element


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be written. `dtype` is a key of DENSE."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DENSE[self.dtype][0]


def shard_names(count: int) -> list[str]:
    """The file names of a checkpoint of so many shards."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def layout(entries: Iterable[Entry]) -> list[Entry]:
    """The order in the file: as given, but sizes that would put what follows at an odd address come last, the widest
    elements first. So every tensor stands at a multiple of its element's size, though nothing lies between two."""
    entries = list(entries)
    even = [e for e in entries if e.nbytes % _ALIGN == 0]
    odd = [e for e in entries if e.nbytes % _ALIGN]
    return even + sorted(odd, key=lambda e: -DENSE[e.dtype][0])


def header(entries: Sequence[Entry]) -> bytes:
    """All that stands before the first tensor, padded so that this begins at a multiple of 8."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for e in entries:
        content[e.name] = {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [at, at + e.nbytes]}
        at += e.nbytes
    raw = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _ALIGN)
    return len(raw).to_bytes(8, "little") + raw


def file_bytes(entries: Sequence[Entry]) -> int:
    """The size of the file."""
    return len(header(layout(entries))) + sum(e.nbytes for e in entries)


def write_shard(path: Path, entries: Sequence[Entry], pieces: Iterable[tuple[str, Any]]) -> str:
    """Write a file and have it on the disk. Returns its SHA-256.

    Args:
        pieces: (name, bytes), those of one tensor in their order. What comes before its turn in `layout` waits in memory.
    """
    digest = hashlib.sha256()
    order = layout(entries)
    left = {e.name: e.nbytes for e in order}
    waiting: dict[str, list[Any]] = {e.name: [] for e in order}
    turn = iter([e.name for e in order if e.nbytes])
    with path.open("wb") as file:

        def put(data: Any) -> int:
            digest.update(data)
            file.write(data)
            return memoryview(data).nbytes

        put(header(order))
        now = next(turn, None)
        for name, data in pieces:
            if memoryview(data).nbytes:
                waiting[name].append(data)
            while now is not None and waiting[now]:
                left[now] -= sum(put(piece) for piece in waiting.pop(now))
                waiting[now] = []
                if left[now]:
                    break
                now = next(turn, None)
        if any(left.values()) or any(waiting.values()):
            raise AssertionError(f"{path}: pieces and entries differ: {[n for n, size in left.items() if size][:5]}")
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def write_index(folder: Path, shards: Mapping[str, Sequence[Entry]]) -> None:
    """The list that says which shard holds which tensor; one file alone needs none."""
    if len(shards) < 2:
        return
    places = {e.name: file for file, entries in shards.items() for e in entries}
    total = sum(e.nbytes for entries in shards.values() for e in entries)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_text(path: Path, text: str | bytes) -> None:
    """Write a small file and have it on the disk."""
    with path.open("wb") as file:
        file.write(text.encode() if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
