"""Weights that safetensors hold packed, as data and scales apart: gathered into one logical tensor each. Headers only.

| quant_method | data | scales | gathered |
|---|---|---|---|
| mxfp4 | `X_blocks` U8 (experts, out, in / 32, 16) | `X_scales` U8 (experts, out, in / 32) | `X_blocks`, mxfp4 |
| compressed-tensors | `N.weight_packed` U8 (out, in / 2) | `N.weight_scale` U8 (out, in / 32) | `N.weight`, mxfp4 |
| compressed-tensors | `N.weight_packed` I32 (out, in / 8) | `N.weight_scale` BF16 (out, in / group) | `N.weight`, int4 |
| compressed-tensors | `N.weight_packed` I32 (out, in / 4) | `N.weight_scale` BF16 (out, 1) | `N.weight`, int8 |
| compressed-tensors | `N.weight` I8 (out, in) | `N.weight_scale` BF16 (out, 1) | `N.weight`, int8 |

I32 also brings `N.weight_shape`, an I64 [2] whose value is not read: rows fill whole elements, so the other two shapes leave
one logical shape only, and the dry run holds that against the rest of config.json. `quantization_config` and the tensors
must agree on the format. Which modules are packed is told by the tensors: `targets`, `ignore` and `modules_to_not_convert`
may hold patterns, which are not followed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slipstream.checkpoint.files import no_collection
from slipstream.checkpoint.tensors import TensorInfo
from slipstream.errors import CheckpointError
from slipstream.ops.formats import GROUPS

_Kind = tuple[str, str]  # end of the name of data, and its dtype
_Kinds = dict[_Kind, set[tuple[str, int]]]  # our format, and how many weights share a scale; 0: those of a row

# end of the name of data: that of scales
_SCALES = {"_blocks": "_scales", ".weight_packed": ".weight_scale", ".weight": ".weight_scale"}
# dtype of data, our format: dtype of scales, weights in one element of data
_LAYOUTS = {
    ("U8", "mxfp4"): ("U8", 2),
    ("I32", "int4"): ("BF16", 8),
    ("I32", "int8"): ("BF16", 4),
    ("I8", "int8"): ("BF16", 1),
}
_ENDS = ("_blocks", "_scales", ".weight_packed", ".weight_scale", ".weight_shape")
# What compressed-tensors calls it: how it looks, and what config.json must say of the weights
_STORED = {
    "mxfp4-pack-quantized": (".weight_packed", "U8"),
    "pack-quantized": (".weight_packed", "I32"),
    "int-quantized": (".weight", "I8"),
    "naive-quantized": (".weight", "I8"),
}
_SAID: dict[str, dict[str, Any]] = {
    "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group"},
    "int4": {"num_bits": 4, "type": "int", "strategy": "group"},
    "int8": {"num_bits": 8, "type": "int", "strategy": "channel"},
}
_SIZES: dict[str, tuple[int | None, ...]] = {"mxfp4": (32,), "int4": GROUPS, "int8": (None, -1, 0)}
_DEFAULTS: dict[str, Any] = {"symmetric": True, "dynamic": False, "block_structure": None}
_ACTORDER = (None, False, "weight", "static")  # these only say how codes were found; others reorder columns
_FOREIGN = {
    ".weight_zero_point": "codes that are not symmetric about zero",
    ".weight_g_idx": "columns in the order of activations",
    ".weight_global_scale": "a second scale, of the scales (NVFP4)",
    ".input_global_scale": "quantized activations",
    ".input_scale": "quantized activations",
    ".input_zero_point": "quantized activations",
    ".output_scale": "quantized activations",
}
_TRY = "take the model in bfloat16, which `slipstream quantize` turns into mxfp4, int8 or int4, or a GGUF of it"


class Unsupported(CheckpointError):
    """Weights are quantized in a way that is not read; nothing need be wrong with the files."""


@no_collection()
def gather(tensors: dict[str, TensorInfo], config: Mapping[str, Any], path: Path) -> dict[str, TensorInfo]:
    """Logical tensors in the place of packed ones; all others as they are.

    What is quantized in an unsupported way comes back as it is, to be looked at; `support.refuse_quantized` is for
    whoever wants to run it.

    Raises:
        CheckpointError: a part is missing or of the wrong dtype or shape, or quantization_config says something else.
    """
    try:
        kinds = declared(config, path)
    except Unsupported:
        return tensors
    if not kinds:
        lone = next((name for name in tensors if name.endswith(_ENDS)), None)
        if lone is not None:
            raise CheckpointError(
                f"{path}: {lone!r} is a part of a packed weight, but config.json has no quantization_config that says how "
                "it is packed; fetch config.json again"
            )
        return tensors
    ends = tuple({end for end, _ in kinds})
    logical: dict[str, TensorInfo] = {}  # by the name of data
    parts: set[str] = set()
    for name, data in tensors.items():
        if name.endswith(ends) and (data.dtype == "I8" or not name.endswith(".weight")):
            end = next(e for e in ends if name.endswith(e))
            logical[name], names = _gather(name, end, tensors, kinds.get((end, data.dtype)), path)
            parts.update(names)
    if not logical:
        raise CheckpointError(
            f"{path}: config.json has a quantization_config, but no tensor is packed as it says; fetch the model again, or "
            "remove quantization_config if the weights are meant to be floats"
        )
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if name in parts and name not in logical:
            continue
        if name not in logical:
            _refuse_rest(name, path)
        info = logical.get(name, info)
        if info.name in found:
            raise CheckpointError(f"{path}: {info.name!r} is there twice, packed and as it is; fetch the model again")
        found[info.name] = info
    return found


def _gather(name: str, end: str, tensors: Mapping[str, TensorInfo], kinds: set[tuple[str, int]] | None,
            path: Path) -> tuple[TensorInfo, list[str]]:  # fmt: skip
    """One weight from its parts, and the names of all of these."""
    data, stem = tensors[name], name.removesuffix(end)
    if kinds is None:
        raise CheckpointError(
            f"{path}: {name!r} is {data.dtype}, which is not what quantization_config in config.json says; fetch both again"
        )
    formats = " or ".join(sorted({format for format, _ in kinds}))
    scales = tensors.get(stem + _SCALES[end])
    if scales is None:
        raise CheckpointError(f"{path}: {name!r} lacks its scales {stem + _SCALES[end]!r}; fetch the model again")
    dtype = _LAYOUTS[data.dtype, min(kinds)[0]][0]
    if scales.dtype != dtype:
        raise CheckpointError(
            f"{path}: {scales.name!r} is {scales.dtype}, and scales of {formats} must be {dtype}; {_TRY}"
        )
    dims = data.shape
    if end == "_blocks" and len(dims) == 4 and dims[-1] == 16:
        dims = (*dims[:-2], dims[-2] * 16)
    elif end == "_blocks" or len(dims) != 2:
        dims = ()
    if not dims or 0 in dims:
        raise CheckpointError(f"{path}: {name!r} of shape {list(data.shape)} is no weight in {formats}; fetch it again")
    for format, group in sorted(kinds):
        width = dims[-1] * _LAYOUTS[data.dtype, format][1]
        if width % (group or 1) == 0 and scales.shape == (*dims[:-1], width // group if group else 1):
            break
    else:
        each = " or ".join(f"{str(g) if g else 'all'} weights of a row in {f}" for f, g in sorted(kinds))
        raise CheckpointError(
            f"{path}: {scales.name!r} of shape {list(scales.shape)} does not fit {name!r}, {list(data.shape)} {data.dtype} with"
            f" a scale for {each}"
        )
    parts = [name, scales.name]
    if data.dtype == "I32":
        told = tensors.get(f"{stem}.weight_shape")
        if told is None or (told.dtype, told.shape) != ("I64", (2,)):
            raise CheckpointError(
                f"{path}: {name!r} lacks its '.weight_shape', two numbers in I64; fetch the model again"
            )
        parts.append(told.name)
    to = name if end == "_blocks" else f"{stem}.weight"
    nbytes, shape = data.nbytes + scales.nbytes, (*dims[:-1], width)
    return TensorInfo(to, format, shape, nbytes, data.file, data.offset, parts=(data, scales)), parts


def _refuse_rest(name: str, path: Path) -> None:
    for end, what in _FOREIGN.items():
        if name.endswith(end):
            raise CheckpointError(f"{path}: {name!r} means {what}, which is not supported; {_TRY}")
    if name.endswith(_ENDS):
        raise CheckpointError(
            f"{path}: {name!r} is part of no whole packed weight of the kind that quantization_config in config.json names; "
            "fetch the model again"
        )


def declared(config: Mapping[str, Any], path: Path) -> _Kinds:
    """What quantization_config says that packed weights look like; empty if there is none.

    Raises:
        Unsupported: weights are packed in another way, or it asks for more than packed weights.
        CheckpointError: it is malformed.
    """
    said = config.get("quantization_config")
    if said is None:
        return {}
    method = said.get("quant_method") if isinstance(said, dict) else None
    if not isinstance(said, dict) or not isinstance(method, str):
        raise _malformed(path, "quantization_config", said, "an object with a quant_method")
    if method == "mxfp4":
        _strings(path, "modules_to_not_convert", said)
        return {("_blocks", "U8"): {("mxfp4", 32)}}
    if method != "compressed-tensors":
        raise Unsupported(f"{path}: the weights are quantized by {method[:80]!r}, which is not supported; {_TRY}")
    _strings(path, "ignore", said)
    groups = said.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _malformed(path, "config_groups", groups, "an object that names at least one group")
    sparse = said.get("sparsity_config")
    for name, ok in (
        ("quantization_status", said.get("quantization_status") in (None, "compressed")),
        ("kv_cache_scheme", said.get("kv_cache_scheme") is None),
        ("transform_config", not said.get("transform_config")),
        ("moe_sparsity_config", not said.get("moe_sparsity_config")),
        ("sparsity_config", not sparse or (isinstance(sparse, dict) and sparse.get("format") == "dense")),
    ):
        if not ok:
            raise _unsupported(path, name, said[name])
    kinds: _Kinds = {}
    for key, group in groups.items():
        kind, format, size = _kind(path, f"config_groups.{key[:80]}", group, said)
        kinds.setdefault(kind, set()).add((format, size))
    return kinds


def _kind(path: Path, where: str, group: Any, said: dict[str, Any]) -> tuple[_Kind, str, int]:
    """What the weights of one group look like, their format, and how many share a scale."""
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise _malformed(path, where, group, "an object that describes weights")
    for name in ("input_activations", "output_activations"):
        if group.get(name) is not None:
            raise _unsupported(path, f"{where}.{name}", group[name])
    stored = group.get("format") or said.get("format")
    if not isinstance(stored, str) or stored not in _STORED:
        raise _unsupported(path, f"{where}.format", stored)
    end, dtype = _STORED[stored]
    formats = [format for data, format in _LAYOUTS if data == dtype]
    format = next((f for f in formats if _SAID[f]["num_bits"] == weights.get("num_bits")), formats[0])
    given, want = _DEFAULTS | weights, _DEFAULTS | _SAID[format]
    for name, value in want.items():
        if given.get(name) != value:
            raise _unsupported(path, f"{where}.weights.{name}", given.get(name))
    if weights.get("actorder") not in _ACTORDER:
        raise _unsupported(path, f"{where}.weights.actorder", weights["actorder"])
    size = weights.get("group_size")
    if type(size) not in (int, type(None)) or size not in _SIZES[format]:
        raise _unsupported(path, f"{where}.weights.group_size", size)
    return (end, dtype), format, max(size or 0, 0)


def _strings(path: Path, name: str, said: Mapping[str, Any]) -> None:
    value = said.get(name)
    if value is not None and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
        raise _malformed(path, name, value, "a list of names")


def _malformed(path: Path, name: str, value: Any, want: str) -> CheckpointError:
    return CheckpointError(f"{path}: config.json: {name} must be {want}, got {str(value)[:80]!r}")


def _unsupported(path: Path, name: str, value: Any) -> Unsupported:
    return Unsupported(f"{path}: config.json: {name} {str(value)[:80]!r} is not supported in packed weights; {_TRY}")
