"""Headers of safetensors files, one or sharded, checked down to the last byte before a tensor is read.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from slipstream.checkpoint.files import (
    MAX_COLONS_HEADER,
    MAX_JSON,
    MAX_MARKS_HEADER,
    MAX_TENSORS,
    member,
    parse_object,
    read_object,
)
from slipstream.checkpoint.tensors import DENSE, TensorInfo, check_name
from slipstream.errors import CheckpointError

INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def read_folder(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of the safetensors files in `folder`."""
    names = sorted(p.name for p in folder.iterdir() if p.name.endswith(".safetensors"))
    if (folder / INDEX).is_symlink() or (folder / INDEX).exists():
        return _read_shards(folder, names)
    shards = [n for n in names if _SHARD.fullmatch(n)]
    if shards and "model.safetensors" not in names:
        raise CheckpointError(f"{folder}: has {shards[0]} but no {INDEX}; fetch or save the checkpoint again")
    if "model.safetensors" in names:
        if shards:
            raise CheckpointError(f"{folder}: has both model.safetensors and {shards[0]}; remove the stale ones")
        names = ["model.safetensors"]
    if len(names) != 1:
        raise CheckpointError(f"{folder}: has {len(names)} safetensors files ({', '.join(names[:5])}) and no {INDEX}")
    return read_header(member(folder, names[0]))


def _read_shards(folder: Path, names: list[str]) -> dict[str, TensorInfo]:
    where = folder / INDEX
    index = read_object(member(folder, INDEX)).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{where}: has no weight_map that says which file holds which tensor")
    if len(index) > MAX_TENSORS:
        raise CheckpointError(f"{where}: names {len(index):,} tensors, more than {MAX_TENSORS:,}")
    for name, file in index.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise CheckpointError(f"{where}: {name[:100]!r} must be in a .safetensors file, not {str(file)[:100]!r}")
    files = {file: member(folder, file) for file in sorted(set(index.values()))}
    stale = [n for n in names if n not in files and (_SHARD.fullmatch(n) or n == "model.safetensors")]
    if stale:
        raise CheckpointError(
            f"{where}: does not name {stale[0]}, which lies beside it: two saves are mixed; fetch or save again"
        )
    found: dict[str, TensorInfo] = {}
    for file, expected in Counter(index.values()).items():
        shard = read_header(files[file])
        surplus = [n for n in shard if index.get(n) != file]
        if surplus:
            raise CheckpointError(f"{folder / file}: holds {surplus[0]!r}, which {INDEX} does not place there")
        if len(shard) != expected:
            missing = next(n for n, f in index.items() if f == file and n not in shard)
            raise CheckpointError(f"{folder / file}: lacks {missing[:100]!r}, which {INDEX} places there")
        found.update(shard)
    return found


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors that one file holds. Ranges must tile the data: no gap, no overlap, nothing left over."""
    size = path.stat().st_size
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or 8 + length > size:
            raise CheckpointError(f"{path}: is truncated: a header of {length:,} bytes in a file of {size:,}")
        if length > MAX_JSON:
            raise CheckpointError(f"{path}: says its header has {length:,} bytes; over {MAX_JSON:,} is not read")
        raw = f.read(length)
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{path}: is not a safetensors file: no header stands at its start")
    header = parse_object(raw, path, MAX_COLONS_HEADER, MAX_MARKS_HEADER)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(map(_is_text, (*metadata, *metadata.values()))):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{path}: has {len(header):,} tensors, more than {MAX_TENSORS:,}")
    data = 8 + length
    tensors = {name: _tensor(path, name, entry, data) for name, entry in header.items()}
    end = data
    for t in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if t.offset != end:
            fault = "overlaps the tensor before it" if t.offset < end else "leaves a gap before it"
            raise CheckpointError(f"{path}: {t.name!r} {fault}")
        end += t.nbytes
    if end != size:
        fault = "is truncated" if end > size else "has bytes that belong to no tensor"
        raise CheckpointError(f"{path}: {fault}: its tensors end at byte {end:,}, the file at {size:,}")
    return tensors


def _tensor(path: Path, name: str, entry: Any, data: int) -> TensorInfo:
    check_name(name, path)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: {name!r} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DENSE:
        found = repr(dtype[:50]) if isinstance(dtype, str) else "that is no string"
        raise CheckpointError(f"{path}: {name!r} has a dtype {found}; known are {', '.join(DENSE)}")
    if not _naturals(shape) or len(shape) > 8:
        raise CheckpointError(f"{path}: {name!r} has no valid shape")
    if not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path}: {name!r} has no valid data_offsets")
    nbytes = math.prod(shape) * DENSE[dtype][0]
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(f"{path}: {name!r} of shape {shape} in {dtype} needs {nbytes:,} bytes, not {offsets}")
    return TensorInfo(name, dtype, tuple(shape), nbytes, path, data + offsets[0])


def _is_text(value: Any) -> bool:
    """Whether it is a string, and not with half a surrogate pair in it."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and 0 <= x < 2**63 for x in value)
