"""`slipstream.json`: what a folder was made of, and the size and SHA-256 of each of its shards. No torch."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from slipstream.checkpoint.files import member, read_object
from slipstream.errors import CheckpointError
from slipstream.parallel.shares import ALONE, Ranks

NAME = "slipstream.json"
VERSION = 1
HASHERS = 4  # hashlib leaves the interpreter free; more than this wait for the disk
_CHUNK = 4 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Shard:
    """What the manifest says of one file."""

    bytes: int
    sha256: str


def read_manifest(folder: Path) -> dict[str, Shard] | None:
    """File name -> what it must be; None where the folder has no manifest.

    Raises:
        CheckpointError: the manifest is damaged, or names what is no file of this folder.
    """
    if not os.path.lexists(folder / NAME):
        return None
    where = folder / NAME
    content = read_object(member(folder.resolve(), NAME))
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{where}: is of version {str(content.get('version'))[:20]!r}, and {VERSION} is the one known here; "
            "update slipstream, or make the folder again"
        )
    shards = content.get("shards")
    if not isinstance(shards, Mapping) or not shards:
        raise CheckpointError(f"{where}: has no list of shards; the file is damaged, so make the folder again")
    found = {}
    for name, entry in shards.items():
        size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, Mapping) else (None, None)
        plain = name == Path(name).name and name.endswith(".safetensors") and name.isprintable() and "\\" not in name
        if not plain:
            raise CheckpointError(f"{where}: {name[:100]!r} is not the name of a .safetensors file in this folder")
        if type(size) is not int or size < 0 or not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise CheckpointError(f"{where}: {name[:100]!r} must have bytes and sha256; the file is damaged")
        found[name] = Shard(size, digest)
    return found


def check_sizes(folder: Path, names: Iterable[str]) -> None:
    """Hold the shards that are about to be read against the manifest, without reading them.

    Args:
        names: of the files in use.

    Raises:
        CheckpointError: the manifest is damaged, misses a shard or names one too many, or a size is another.
    """
    shards = read_manifest(folder)
    if shards is None:
        return
    used = set(names)
    for name in sorted(used ^ shards.keys()):
        fault = "does not list" if name in used else "lists"
        also = "is in use" if name in used else "is not in use"
        raise CheckpointError(
            f"{folder / NAME}: {fault} {name}, which {also}: the folder is mixed or incomplete; make or copy it again"
        )
    for name, shard in shards.items():
        size = member(folder.resolve(), name).stat().st_size
        if size != shard.bytes:
            raise CheckpointError(
                f"{folder / name}: has {size:,} bytes, and {NAME} says {shard.bytes:,}; make or copy it again"
            )


def shards_of(folder: Path, ranks: Ranks = ALONE) -> dict[Path, Shard]:
    """The files themselves, and what the manifest says of them; {} where there is none.

    Args:
        ranks: only files whose turn it is with this rank, as whoever checks a hash must read all of a file.

    Raises:
        CheckpointError: the manifest is damaged, or a file is missing.
    """
    shards = read_manifest(folder) or {}
    found = {member(folder.resolve(), name): shard for name, shard in shards.items()}
    return dict(list(found.items())[ranks.rank :: ranks.size])


def verify(folder: Path, ranks: Ranks = ALONE) -> None:
    """Hash every shard that the manifest names; takes as long as reading them. Does nothing without a manifest.

    Args:
        ranks: see shards_of.

    Raises:
        CheckpointError: a file is damaged; the message names it.
    """
    shards = shards_of(folder, ranks)
    with ThreadPoolExecutor(HASHERS) as pool:
        try:
            for (file, shard), digest in zip(shards.items(), pool.map(sha256_of, shards), strict=True):
                check_digest(file, digest, shard)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def check_digest(file: Path, digest: str, shard: Shard) -> None:
    """Hold the SHA-256 of what was read against the manifest. Raises CheckpointError."""
    if digest != shard.sha256:
        raise CheckpointError(
            f"{file}: is damaged: its SHA-256 is {digest}, and {NAME} says {shard.sha256}; make or copy it again"
        )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        CheckpointError: it cannot be read.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    try:
        with path.open("rb", buffering=0) as file:
            while got := file.readinto(buffer):
                digest.update(buffer[:got])
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e}") from e
    return digest.hexdigest()
