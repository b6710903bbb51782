"""In which format each weight is held, and the bytes that takes: as it arrived or as was asked for, never wider unasked."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch

from slipstream.checkpoint.load import Load, dry_run
from slipstream.checkpoint.open import Checkpoint
from slipstream.checkpoint.support import Rename
from slipstream.checkpoint.tensors import TensorInfo
from slipstream.config import EngineConfig, ModelConfig
from slipstream.errors import ConfigError, KernelError
from slipstream.layers.ops import Ops
from slipstream.layers.transformer import Transformer
from slipstream.ops.formats import MADE, packed_shapes
from slipstream.ops.formats.blocks import OURS
from slipstream.plan.random import imagine
from slipstream.quantization.select import Selection

LOOKED_UP = ("dense", *MADE, *OURS)  # whose rows torch can decode on any device


@dataclass
class _Holder:
    """Answers `dry_run` which format a matrix is held in, and notes what cannot run."""

    asked: str
    covered: Container[str]  # the tensors that become what was asked for
    tied: bool
    ops: Ops
    device: str
    refused: dict[str, str] = field(default_factory=dict)

    def __call__(self, to: str, source: TensorInfo, shape: tuple[int, ...]) -> str:
        if self.asked == "dequantize":
            return "dense"
        format = self.asked if source.name in self.covered else source.format
        if format == "dense" or (to == "head.weight" and self.tied):
            return format
        embedding = to == "embed.weight"
        if embedding and self.device != "cpu" and format not in LOOKED_UP:
            self.refused.setdefault(
                format, f"rows of an embedding are decoded on a {self.device} device from {LOOKED_UP}"
            )
        if not embedding or self.tied:
            try:
                self.ops.linear(format, shape[-2], shape[-1], embedding)
            except KernelError as e:
                here = [
                    f"{name} {why}" for name, why in e.rejected if f"not {format}" not in why
                ]  # not of other formats
                self.refused.setdefault(format, "; ".join(here) or f"no implementation takes {format}")
        return format


def plan_loads(asked: EngineConfig, checkpoint: Checkpoint, config: ModelConfig, model: Transformer, home: ModuleType,
               ops: Ops, device: str, why: dict[str, str]) -> tuple[Load, ...]:  # fmt: skip
    """Match the checkpoint with the model, and decide the format of every weight.

    Raises:
        CheckpointError: they do not fit each other.
        KernelError: a weight cannot run here as it arrived, or as was asked for; says what widening would cost.
        ConfigError: a weight has no form in the format that was asked for.
    """
    rename: Rename = getattr(home, "rename", str)
    rules = home.WEIGHTS
    if checkpoint.kind == "random":
        tensors, rules = imagine(checkpoint, model, rules, tied=config.tie_word_embeddings)
        checkpoint, rename = replace(checkpoint, tensors=tensors), str
        why["random weights"] = (
            f"asked for: shapes are those of config.json, numbers are drawn with the seed {checkpoint.seed}"
        )
    made = asked.quantization if asked.quantization in MADE else None
    selection = Selection(format=made or MADE[0], model_type=config.model_type)

    def takes(source: TensorInfo) -> bool:
        name = rename(source.name)
        return not source.parts and name is not None and selection.takes(name, source.shape)

    covered = {t.name: t.shape for t in checkpoint.tensors.values() if made and takes(t)}
    try:
        group = selection.check(covered) if covered else 0
    except ConfigError as e:
        raise ConfigError(f"quantization: {e}") from e
    if made and not covered and all(t.format != made for t in checkpoint.tensors.values()):
        packed = ", ".join(sorted({t.format for t in checkpoint.tensors.values() if t.parts}))
        why_not = f": its weights are {packed} already, and what is packed stays so" if packed else ""
        raise ConfigError(f"quantization: no weight in {checkpoint.path} can become {made} while loading{why_not}")
    hold = _Holder(asked.quantization, covered, config.tie_word_embeddings, ops, device)
    loads = dry_run(
        model, rules, checkpoint, num_layers=config.num_layers, num_experts=config.num_experts,
        tied=config.tie_word_embeddings, hold=hold, rename=rename,
    )  # fmt: skip
    embedding = next(item for item in loads if item.to == "embed.weight")
    loads = tuple(replace(item, formats=embedding.formats) if item.shared else item for item in loads)
    if hold.refused:
        raise KernelError(_refusal(hold.refused, loads, ops.dtype))
    if made:
        loads = tuple(replace(item, group=group) for item in loads)
        count = sum(checkpoint.tensors[n].format != made for n in covered)
        kept = sum(t.is_quantized for n, t in checkpoint.tensors.items() if n not in covered)
        rest = f", {kept} that arrived packed stay as they are" if kept else ""
        why["quantization"] = f"{made} was asked for: {count} tensors are quantized as they load{rest}"
    for item in loads:
        if item.widened and asked.quantization != "dequantize":
            raise KernelError(
                f"quantization: {item.to} arrives as {item.arrived}, and only matrices are held packed; "
                f"quantization='dequantize' makes {str(ops.dtype)[6:]} of it, and of all other packed weights"
            )
        if item.widened:
            why[f"{item.arrived} widened to {str(ops.dtype)[6:]}"] = "quantization='dequantize' was asked for"
    return loads


def _refusal(refused: dict[str, str], loads: tuple[Load, ...], dtype: torch.dtype) -> str:
    packed = wide = floats = 0
    for item in loads:
        for format, source in zip(item.formats, item.sources, strict=True):
            if format in refused and not source.is_quantized:
                floats += math.prod(source.shape) * dtype.itemsize
            elif format in refused and not item.shared:
                packed += source.nbytes
                wide += math.prod(source.shape) * dtype.itemsize
    reasons = ". ".join(f"{format}: {why}" for format, why in refused.items())
    said = f"quantization: weights cannot run here as {' and '.join(refused)}. {reasons}"
    if floats:
        said += f". quantization='auto' would hold floats as {str(dtype)[6:]}, {floats / 2**30:.2f} GiB"
    if wide:
        said += f". quantization='dequantize' would hold packed ones as {str(dtype)[6:]}, {wide / 2**30:.2f} GiB where the file has "
        said += f"{packed / 2**30:.2f} GiB"
    return said


def held_bytes(item: Load, ops: Ops) -> int:
    """Bytes in memory: as packed in the file, unless the kernel lays it out in a way of its own and says so."""
    total = 0
    for part in item.parts():
        format, shape = part.format, part.local
        if 0 in shape:
            continue
        if format == "dense":
            total += 0 if item.shared else math.prod(shape) * ops.dtype.itemsize
            continue
        kernel = None if item.to == "embed.weight" else ops.linear(format, shape[-2], shape[-1], item.shared)
        packed = packed_bytes(item, format, part.sources, part.shape) * math.prod(shape) // math.prod(part.shape)
        own = ops.experts.kernel.held_bytes(format, shape, ops.dtype) if len(shape) == 3 else None
        if own is None and kernel is not None and hasattr(kernel, "held_bytes"):
            own = kernel.held_bytes(format, shape, ops.dtype, packed)
        if own is not None:
            total += own
        elif not item.shared:
            total += packed
    return total


def packed_bytes(item: Load, format: str, sources: tuple[TensorInfo, ...], shape: tuple[int, ...]) -> int:
    """Bytes of data and scales in the format's own layout."""
    if all(s.format == format for s in sources):
        return sum(s.nbytes for s in sources)
    data, scales = packed_shapes(format, shape, item.group)
    return math.prod(data) + math.prod(scales) * (1 if format == "mxfp4" else 2)
