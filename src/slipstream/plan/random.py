"""What a checkpoint with random weights would hold: one tensor for each parameter, in the format that config.json names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from slipstream.checkpoint.open import Checkpoint
from slipstream.checkpoint.packed import declared
from slipstream.checkpoint.rules import Weight
from slipstream.checkpoint.tensors import DENSE, TensorInfo
from slipstream.ops.formats import packed_shapes
from slipstream.quantization.select import eligible, module_of

_NAMES = {torch_name: (name, size) for name, (size, torch_name) in DENSE.items()}


def imagine(
    checkpoint: Checkpoint, model: nn.Module, rules: Iterable[Weight], *, tied: bool
) -> tuple[dict[str, TensorInfo], list[Weight]]:
    """Tensors by name, and the rules that make parameters of them, without a transform.

    A tensor has the first name that the architecture's own rules know, so that what goes by names, such as which matrices are
    quantized, goes as ever. A stack of experts has the name of a packed one, as it is laid out like that.
    """
    # Where some layers are a mixture and others are not, both have the same names.
    first: dict[tuple[str, bool], Weight] = {}
    for rule in rules:
        first.setdefault((rule.to, rule.shard == "expert"), rule)
    kinds = declared(checkpoint.config, checkpoint.path)
    packed = min((found for group in kinds.values() for found in group), default=None)
    said = checkpoint.config.get("quantization_config") or {}
    tensors, made = {}, []
    for to, parameter in model.named_parameters():
        number = next((part for part in to.split(".") if part.isdigit()), "")
        at = to.replace(f".{number}.", ".{layer}.", 1)
        is_stack = parameter.dim() == 3
        rule = first.get((at, is_stack)) or first[at, not is_stack]
        name = rule.sources[0].replace("{layer}", number).replace("{expert}", "0")
        if is_stack:
            name = f"model.layers.{number}.mlp.experts.{'gate_up' if 'gate_up' in to else 'down'}_proj_blocks"
        made.append(Weight(to, (name,), rule.shard))
        if tied and to == "head.weight":
            continue
        shape = tuple(parameter.shape)
        format, group = packed if packed and _is_packed(name, shape, said) else ("dense", 0)
        tensors[name] = _info(checkpoint, name, format, group, shape, str(parameter.dtype)[6:])
    return tensors, made


def _is_packed(name: str, shape: tuple[int, ...], said: Mapping[str, Any]) -> bool:
    if said["quant_method"] == "mxfp4":  # as OpenAI publishes it
        return len(shape) == 3
    module = module_of(name)
    ignored = (str(i).removeprefix("re:") for i in said.get("ignore") or ())
    return eligible(name, shape) and not any(fnmatchcase(module, i) for i in ignored)


def _info(checkpoint: Checkpoint, name: str, format: str, group: int, shape: tuple[int, ...], dtype: str) -> TensorInfo:
    if format == "dense" or shape[-1] % (group or 1):
        name_, size = _NAMES[dtype]
        return TensorInfo(name, name_, shape, math.prod(shape) * size, checkpoint.path, 0)
    sizes = (1, 2 if format != "mxfp4" else 1)
    types = ("I8" if format == "int8" else "U8", "U8" if format == "mxfp4" else "BF16")
    data, scales = (
        TensorInfo(f"{name}.{part}", kind, shape_, math.prod(shape_) * size, checkpoint.path, 0)
        for part, kind, shape_, size in zip(
            ("data", "scales"), types, packed_shapes(format, shape, group), sizes, strict=True
        )
    )
    return TensorInfo(name, format, shape, data.nbytes + scales.nbytes, checkpoint.path, 0, parts=(data, scales))
