"""Files of a checkpoint folder that we dare to open, and JSON that we dare to believe."""

from __future__ import annotations

import contextlib
import gc
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slipstream.errors import CheckpointError

MAX_JSON = 16 << 20  # a shard names some thousand tensors at about 150 bytes each, so real headers stay near 1 MB
MAX_DEPTH = 32
MAX_TENSORS = 200_000
# Colons bound how many keys a parser makes, and all marks (commas, colons, brackets) how many values. A matrix has 4
# colons and 13 marks in a header; a tensor has 1 and 2 in an index.
MAX_COLONS_HEADER, MAX_MARKS_HEADER = 4 * MAX_TENSORS + 100_000, 13 * MAX_TENSORS
MAX_COLONS, MAX_MARKS = MAX_TENSORS + 50_000, 2 * MAX_TENSORS + 100_000
_BLOB = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """While a million objects are made, none of them garbage, do not look for garbage among them."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def member(folder: Path, name: str) -> Path:
    """The real path of the regular file `name` directly inside `folder` (already resolved).

    A link may not lead out of the folder, with one exception: the cache of the Hugging Face Hub, where
    `snapshots/<revision>/<name>` is a link to `../../blobs/<hash>` of the same repository.
    """
    if not name or name in (".", "..") or not name.isprintable() or "/" in name or "\\" in name or len(name) > 255:
        raise CheckpointError(f"{folder}: {name[:300]!r} is not a plain file name, so it could lie outside the folder")
    path = (folder / name).resolve()
    cached = folder.parent.name == "snapshots" and path.parent == folder.parent.parent / "blobs"
    if path.parent != folder and not (cached and _BLOB.fullmatch(path.name)):
        raise CheckpointError(f"{folder / name}: is a link that leaves the folder; put a copy of the file there")
    if not path.exists():
        raise CheckpointError(f"{folder / name}: is missing; the download or copy is incomplete, so fetch it again")
    if not path.is_file():
        raise CheckpointError(f"{folder / name}: is not a regular file")
    return path


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that must hold one object of at most MAX_DEPTH levels."""
    size = path.stat().st_size
    if size > MAX_JSON:
        raise CheckpointError(f"{path}: has {size:,} bytes, more than the {MAX_JSON:,} that a real one could need")
    with path.open("rb") as f:
        value = parse_object(f.read(MAX_JSON + 1), path)
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [x for v in level for x in (v.values() if isinstance(v, dict) else v) if isinstance(x, (dict, list))]
        if not level:
            return value
    raise CheckpointError(f"{path}: nests deeper than {MAX_DEPTH} levels")


def parse_object(raw: bytes, path: Path, max_colons: int = MAX_COLONS, max_marks: int = MAX_MARKS) -> dict[str, Any]:
    """Strict JSON: one object, no key twice, no NaN or Infinity, no flood of values."""
    colons = raw.count(b":")
    if colons > max_colons or colons + sum(map(raw.count, (b",", b"[", b"{"))) > max_marks:
        raise CheckpointError(f"{path}: holds far more values than the JSON of a real model could need")
    objects = 0

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal objects
        objects += 1
        if objects > MAX_TENSORS + 100:
            raise CheckpointError(f"{path}: names more than {MAX_TENSORS:,} tensors; no real model does")
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{path}: has the key {twice[:100]!r} twice, so which one counts is unclear")
        return found

    def constant(name: str) -> None:
        raise CheckpointError(f"{path}: holds {name}, which is not valid JSON")

    try:
        with no_collection():
            value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: is not valid JSON ({e}); the file is damaged, so fetch it again") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, but holds a {type(value).__name__}")
    return value
