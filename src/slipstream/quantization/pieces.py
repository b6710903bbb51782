"""From numbers to the bytes of a file, a few million at a time, and what was lost on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slipstream.checkpoint.save import Entry
from slipstream.errors import CheckpointError
from slipstream.ops.formats import Weight, decode, encode, packed_shapes
from slipstream.quantization.select import PER_I32

Piece = tuple[str, Any]  # the name of a tensor, and the next bytes of it
_VALUES = 1 << 22  # numbers that are converted at a time


@dataclass
class Errors:
    """Sums over each module: of the squared errors, and of the squared weights."""

    sums: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, module: str, error: float, size: float) -> None:
        old = self.sums.get(module, (0.0, 0.0))
        self.sums[module] = old[0] + error, old[1] + size

    def merge(self, sums: Mapping[str, Iterable[float]]) -> None:
        for module, (error, size) in sums.items():
            self.add(module, error, size)

    def relative(self) -> dict[str, float]:
        """||decoded - w|| / ||w|| of each module, to six digits."""
        return {m: float(f"{(error / size) ** 0.5:.6g}") if size else 0.0 for m, (error, size) in self.sums.items()}


def convert(values: Tensor, module: str, format: str, group: int, errors: Errors) -> Iterator[Weight]:
    """A matrix (out, in) of floats in `format`, some rows at a time.

    Raises:
        CheckpointError: it holds NaN or an infinity.
    """
    step = max(1, _VALUES // values.shape[1])
    for part in values.split(step):
        exact = part.double()
        if not exact.isfinite().all():
            raise CheckpointError(
                f"{module}: holds NaN or infinity, which {format} cannot; the checkpoint is damaged, or leave it out with "
                f"--skip {module}"
            )
        weight = encode(part, format, group)
        lost = decode(weight, torch.float32).double() - exact
        errors.add(module, lost.square().sum().item(), exact.square().sum().item())
        yield weight


def entries_of(module: str, format: str, shape: tuple[int, ...], group: int) -> tuple[Entry, ...]:
    """The tensors that hold a matrix in the layout of the compressed-tensors library."""
    _, scales = packed_shapes(format, shape, group)
    if format == "mxfp4":
        packed = Entry(f"{module}.weight_packed", "U8", (shape[0], shape[1] // 2))
        return packed, Entry(f"{module}.weight_scale", "U8", scales)
    packed = Entry(f"{module}.weight_packed", "I32", (shape[0], shape[1] // PER_I32[format]))
    return packed, Entry(f"{module}.weight_scale", "BF16", scales), Entry(f"{module}.weight_shape", "I64", (2,))


def pieces_of(entries: tuple[Entry, ...], weights: Iterable[Weight], shape: tuple[int, ...]) -> Iterator[Piece]:
    """The bytes of these tensors: of data, of scales, and what says the shape where there is one."""
    for weight in weights:
        assert weight.scales is not None
        codes = weight.data.view(torch.uint8) ^ 128 if weight.format == "int8" else weight.data  # stored as code + 128
        yield entries[0].name, raw(codes)
        yield entries[1].name, raw(weight.scales)
    for entry in entries[2:]:
        yield entry.name, raw(torch.tensor(shape))


def raw(values: Tensor) -> memoryview:
    """The bytes of a tensor, row after row."""
    return memoryview(values.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
