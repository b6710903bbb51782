"""How weights are held: each format's layout, its size, and the way from numbers and back.

| format | data | scales | a value is |
|---|---|---|---|
| dense | (..., out, in) floats | none | itself |
| mxfp4 | (..., out, in / 32, 16) uint8, low nibble first | (..., out, in / 32) uint8, E8M0 | E2M1[code] * 2^(scale - 127) |
| int8 | (..., out, in) int8 | (..., out, 1) bfloat16 | code * scale |
| int4 | (..., out, in / 2) uint8, low nibble first | (..., out, in / group) bfloat16 | (code - 8) * scale |
| Q4_1 and the other names in `blocks.BLOCKS` | (..., out, bytes_per_row) uint8 | none: they stand in the blocks | GGUF's |

`...` is nothing for a matrix and (experts) for a stack of them. Rows (out) are independent in every format, so what
cuts, joins or reorders rows works on data and scales alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slipstream.ops.formats.blocks import BLOCKS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MADE = ("mxfp4", "int8", "int4")  # the formats that `encode` makes
GROUPS = (128, 64, 32)  # weights that share a scale in int4, largest first


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix, or a stack of them, as it is held.

    Attributes:
        format: "dense", one of MADE, or a GGUF block type.
        data, scales: as the table above says.
        shape: logical shape: (out, in) or (experts, out, in).
    """

    format: str
    data: Tensor
    shape: tuple[int, ...]
    scales: Tensor | None = None

    def map(self, turn: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None) -> Weight:
        """`turn` on data and scales: a move to a device, or anything that treats rows as wholes."""
        scales = None if self.scales is None else turn(self.scales)
        return Weight(self.format, turn(self.data), self.shape if shape is None else shape, scales)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)


def joined(turn: Callable[[Sequence[Tensor]], Tensor], parts: Sequence[Weight], shape: tuple[int, ...]) -> Weight:
    """Weights of one format made into one by something that treats rows as wholes."""
    scales = [p.scales for p in parts if p.scales is not None]
    return Weight(parts[0].format, turn([p.data for p in parts]), shape, turn(scales) if scales else None)


def cut(weight: Weight, dim: int, ranges: Sequence[range]) -> Weight:
    """Parts of a weight, one after the other.

    Args:
        dim: 1 for inputs, 2 for rows, as counted from the end of the logical shape.

    Raises:
        ValueError: inputs that share a scale or a block would be cut apart.
    """
    import torch

    at = len(weight.shape) - dim
    shape = (*weight.shape[:at], sum(map(len, ranges)), *weight.shape[at + 1 :])

    def take(t: Tensor, where: int, each: int, size: int = 1) -> Tensor:
        """`size` of t's numbers along `where` stand for `each` inputs."""
        if any(r.start % each or r.stop % each for r in ranges):
            raise ValueError(f"{weight.format} cannot be cut within {each} inputs")
        parts = [t.narrow(where, r.start // each * size, len(r) // each * size) for r in ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, where)

    if dim != 1:
        return weight.map(lambda t: take(t, at, 1), shape)
    width, data, scales = weight.shape[-1], weight.data, weight.scales
    if scales is None:
        _, values, bytes = BLOCKS.get(weight.format, (0, 1, 1))
        return Weight(weight.format, take(data, at, values, bytes), shape)
    if weight.format == "mxfp4":
        return Weight("mxfp4", take(data, at, 32), shape, take(scales, at, 32))
    share = width // scales.shape[-1]
    codes = take(data, at, 1) if weight.format == "int8" else take(data, at, share, share // 2)
    return Weight(weight.format, codes, shape, scales if weight.format == "int8" else take(scales, at, share))


def packed_shapes(format: str, shape: tuple[int, ...], group: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of data and scales of a logical shape in one of MADE, in the units of the table above.

    Args:
        group: weights that share a scale in int4.

    Raises:
        ValueError: the innermost size is not a multiple of what shares a scale, or int4 has no such group.
    """
    *outer, width = shape
    size = {"mxfp4": 32, "int8": 1, "int4": group}[format]
    if format == "int4" and group not in GROUPS:
        raise ValueError(f"int4 needs groups of {', '.join(map(str, GROUPS))}, not of {group}")
    if width == 0 or width % size:
        raise ValueError(f"{format} needs rows of a multiple of {size} weights, not {width}")
    if format == "mxfp4":
        return (*outer, width // 32, 16), (*outer, width // 32)
    if format == "int8":
        return (*outer, width), (*outer, 1)
    return (*outer, width // 2), (*outer, width // group)


def encode(values: Tensor, format: str, group: int = 0) -> Weight:
    """Numbers (..., out, in) in the nearest of `format`.

    Args:
        format: one of MADE.
        group: weights that share a scale in int4; one of GROUPS.

    Raises:
        ValueError: the rows are not a multiple of what shares a scale, or int4 has no such group.
    """
    packed_shapes(format, tuple(values.shape), group)
    from slipstream.ops.formats import integers, mxfp4

    if format == "mxfp4":
        data, scales = mxfp4.encode(values)
    elif format == "int8":
        data, scales = integers.encode8(values)
    else:
        data, scales = integers.encode4(values, group)
    return Weight(format, data, tuple(values.shape), scales)


def decode(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The numbers that a weight stands for, (..., out, in). Computed in float32, then rounded once to `dtype`."""
    if weight.scales is None:
        if weight.format not in BLOCKS:
            return weight.data.to(dtype)
        from slipstream.ops.formats.blocks import dequantize_rows

        rows = weight.data.reshape(-1, weight.data.shape[-1])
        return dequantize_rows(rows, weight.format, dtype).view(weight.shape)
    from slipstream.ops.formats import integers, mxfp4

    turn = {"mxfp4": mxfp4.decode, "int8": integers.decode8, "int4": integers.decode4}[weight.format]
    return turn(weight.data, weight.scales, dtype)
