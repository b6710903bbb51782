"""The header of a GGUF file: metadata and where each tensor lies, every length checked before it is used.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian).
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Any

from slipstream.checkpoint.files import MAX_TENSORS
from slipstream.checkpoint.tensors import DENSE, TensorInfo, check_name
from slipstream.errors import CheckpointError
from slipstream.ops.formats.blocks import BLOCKS

# A vocabulary of 262,144 tokens with as many merges, scores and types takes about 12 MB; 64 MB leaves room for
# vocabularies five times that.
MAX_HEADER = 64 << 20
MAX_ITEMS = 3_000_000  # in all arrays together
MAX_KEYS = 10_000

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {k: Struct("<" + c) for k, c in zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIifBQqd", strict=True)}
_LENGTH = _SCALARS[10]
_ENTRIES = {dims: Struct(f"<{dims}QIQ") for dims in range(1, 5)}  # sizes, type and offset of a tensor
_DENSE = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
# number in the file: name, values in a block, bytes of a block
_TYPES = {k: (name, 1, DENSE[name][0]) for k, name in _DENSE.items()}
_TYPES |= {number: (name, size, nbytes) for name, (number, size, nbytes) in BLOCKS.items()}
_SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


@dataclass(frozen=True, slots=True)
class _Span:
    """An array that nobody has asked for yet."""

    kind: int
    count: int
    start: int


class Metadata(Mapping[str, Any]):
    """Metadata by key. An array becomes a list the first time it is asked for."""

    def __init__(self, path: Path, header: bytes, values: dict[str, Any]) -> None:
        self._path, self._header, self._values = path, header, values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, _Span):
            value = self._values[key] = self._list(key, value)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def _list(self, key: str, span: _Span) -> list[Any]:
        if span.kind != _STRING:
            one = _SCALARS[span.kind]
            found = Struct(f"<{span.count}{one.format[1]}").unpack_from(self._header, span.start)
            return [v != 0 for v in found] if span.kind == _BOOL else list(found)
        data, pos, length, strings = self._header, span.start, _LENGTH.unpack_from, []
        try:
            for _ in range(span.count):
                start = pos + 8
                pos = start + length(data, pos)[0]
                strings.append(data[start:pos].decode())
        except UnicodeDecodeError as e:
            raise CheckpointError(f"{self._path}: {key} holds text that is not UTF-8 ({e}); the file is damaged") from e
        return strings


@dataclass(frozen=True, slots=True)
class GGUF:
    """A parsed header. The tensors carry the names that the file gives them."""

    path: Path
    metadata: Metadata
    tensors: dict[str, TensorInfo]


class _Reader:
    """Walks the header; never past its end."""

    def __init__(self, path: Path, data: mmap.mmap, whole: bool) -> None:
        self.path, self.data, self.whole, self.pos, self.items = path, data, whole, 0, 0

    def fault(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}; the file is damaged, so fetch it again")

    def take(self, count: int) -> int:
        """Pass over `count` bytes; returns where they start."""
        start = self.pos
        if count > len(self.data) - start:
            over = f"has a header of over {MAX_HEADER:,} bytes"
            raise self.fault("is truncated in its header" if self.whole else over)
        self.pos = start + count
        return start

    def scalar(self, kind: int) -> Any:
        one = _SCALARS[kind]
        value = one.unpack_from(self.data, self.take(one.size))[0]
        return value != 0 if kind == _BOOL else value

    def u32(self) -> int:
        return int(self.scalar(4))

    def u64(self) -> int:
        return int(self.scalar(10))

    def string(self) -> str:
        size = self.u64()
        start = self.take(size)
        try:
            return self.data[start : start + size].decode()
        except UnicodeDecodeError as e:
            raise self.fault(f"holds text that is not UTF-8 ({e})") from e

    def value(self, key: str) -> Any:
        kind = self.u32()
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(kind)
        if kind != _ARRAY:
            raise self.fault(f"{key} has the unknown type {kind}")
        kind, count = self.u32(), self.u64()
        self.items += count
        if self.items > MAX_ITEMS:
            raise self.fault(f"has arrays of over {MAX_ITEMS:,} values in {key}")
        span = _Span(kind, count, self.pos)
        if kind in _SCALARS:
            self.take(count * _SCALARS[kind].size)
        elif kind == _STRING:
            self.skip_strings(count)
        else:
            raise self.fault(f"{key} is an array of type {kind}, which is unknown or nested")
        return span

    def skip_strings(self, count: int) -> None:
        length, data, pos, last = _LENGTH.unpack_from, self.data, self.pos, len(self.data) - 8
        for _ in range(count):
            if pos > last:
                break
            pos += 8 + length(data, pos)[0]
        else:
            if pos <= len(data):
                self.pos = pos
                return
        self.take(len(data) + 1)  # raises


def is_split(path: Path) -> bool:
    """Whether the name says that the file is one of several parts."""
    found = _SPLIT.search(path.name)
    return found is not None and int(found[1]) > 1


def read_gguf(path: Path) -> GGUF:
    """Parse and check the header of one file."""
    size = path.stat().st_size
    if size < 24:
        raise CheckpointError(f"{path}: is no GGUF file: {size} bytes are too few")
    with path.open("rb") as f, mmap.mmap(f.fileno(), min(size, MAX_HEADER), access=mmap.ACCESS_READ) as data:
        reader = _Reader(path, data, whole=size <= MAX_HEADER)
        if data[:4] != b"GGUF":
            raise CheckpointError(f"{path}: is no GGUF file: it does not start with GGUF")
        reader.pos = 4
        version = reader.u32()
        if version not in (2, 3):
            what = "big-endian" if version in (2 << 24, 3 << 24) else f"version {version}"
            raise CheckpointError(f"{path}: is {what} GGUF; little-endian versions 2 and 3 are read: convert again")
        num_tensors, num_keys = reader.u64(), reader.u64()
        if num_tensors > MAX_TENSORS or num_keys > MAX_KEYS:
            raise reader.fault(f"claims {num_tensors:,} tensors and {num_keys:,} metadata keys")
        values = _metadata(reader, num_keys)
        if is_split(path) or values.get("split.count", 1) not in (0, 1):
            raise CheckpointError(
                f"{path}: is one part of a split GGUF, which is not supported; join the parts first: "
                "llama-gguf-split --merge FIRST_PART OUTPUT"
            )
        header = bytes(data[: reader.pos])
        tensors = _tensors(reader, num_tensors, values.get("general.alignment", 32), size)
    return GGUF(path, Metadata(path, header, values), tensors)


def _metadata(reader: _Reader, count: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for _ in range(count):
        key = reader.string()
        check_name(key, reader.path)
        if key in values:
            raise reader.fault(f"has the key {key} twice")
        values[key] = reader.value(key)
    return values


def _tensors(reader: _Reader, count: int, alignment: Any, size: int) -> dict[str, TensorInfo]:
    if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise reader.fault(f"general.alignment is {str(alignment)[:80]!r}, not a power of two")
    found = []
    for _ in range(count):
        name = reader.string()
        check_name(name, reader.path)
        dims = reader.u32()
        if not 1 <= dims <= 4:
            raise reader.fault(f"{name} has {dims} dimensions, not 1 to 4")
        entry = _ENTRIES[dims]
        *sizes, kind, offset = entry.unpack_from(reader.data, reader.take(entry.size))
        shape = tuple(sizes[::-1])
        if kind not in _TYPES:
            raise CheckpointError(f"{reader.path}: {name} has the type {kind}; known are {', '.join(_names())}")
        dtype, block, nbytes = _TYPES[kind]
        if 0 in shape or shape[-1] % block:
            raise reader.fault(f"{name} of shape {shape} does not divide into {dtype} blocks of {block}")
        found.append((name, dtype, shape, math.prod(shape) // block * nbytes, offset))
    start = end = -(-reader.pos // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, dtype, shape, nbytes, offset in sorted(found, key=lambda t: t[4]):
        if name in tensors:
            raise reader.fault(f"has the tensor {name} twice")
        if start + offset != -(-end // alignment) * alignment:
            what = "overlaps the tensor before it" if start + offset < end else "leaves a gap before it"
            raise reader.fault(f"{name} {what}")
        end = start + offset + nbytes
        if end > size:
            raise reader.fault(f"is truncated: {name} ends at byte {end:,}, the file at {size:,}")
        tensors[name] = TensorInfo(name, dtype, shape, nbytes, reader.path, start + offset)
    return tensors


def _names() -> list[str]:
    return [name for name, _, _ in _TYPES.values()]
