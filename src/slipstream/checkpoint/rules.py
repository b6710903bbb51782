"""How a checkpoint's tensors become a model's parameters: the literal tables `WEIGHTS` of the architectures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Transform = Callable[["Sequence[Tensor]"], "Tensor"]


def rows(parts: Sequence[Tensor]) -> Tensor:
    """One tensor as it is, several one above the other. Works on rows of blocks as on rows of numbers."""
    import torch

    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), 0)


def stack_experts(parts: Sequence[Tensor]) -> Tensor:
    """(experts) matrices -> (experts, out, in)."""
    import torch

    return torch.stack(tuple(parts))


def stack_gate_up(parts: Sequence[Tensor]) -> Tensor:
    """gate, up, gate, up, ... of the experts -> (experts, 2 * intermediate, in), gate rows first."""
    import torch

    return torch.stack([torch.cat((gate, up), 0) for gate, up in zip(parts[::2], parts[1::2], strict=True)])


def part_rows(parts: Sequence[Tensor]) -> Tensor:
    """(experts, 2 * intermediate, ...), where gate and up rows alternate -> gate rows first (gpt-oss in MXFP4)."""
    import torch

    return torch.cat((parts[0][:, ::2], parts[0][:, 1::2]), 1)


def transpose_experts(parts: Sequence[Tensor]) -> Tensor:
    """(experts, in, out) -> (experts, out, in)."""
    return parts[0].transpose(1, 2)


def part_gate_up(parts: Sequence[Tensor]) -> Tensor:
    """(experts, in, 2 * intermediate) or a bias (experts, 2 * intermediate), where gate and up alternate along the last
    dim -> (experts, 2 * intermediate, in) or (experts, 2 * intermediate), gate first (gpt-oss)."""
    import torch

    both = torch.cat((parts[0][..., ::2], parts[0][..., 1::2]), -1)
    return both.transpose(1, 2) if both.dim() == 3 else both


def plus_one(parts: Sequence[Tensor]) -> Tensor:
    """weight -> 1 + weight in float32, for norms that are stored so (Gemma)."""
    return parts[0].float() + 1


ROWWISE = (rows, stack_experts, stack_gate_up, part_rows)  # these take rows as wholes, so they work on packed ones too


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter and where it comes from. Two rules for one parameter are two ways in which files spell it.

    Attributes:
        to: the parameter, with {layer} where it stands in a layer.
        sources: names in the checkpoint; {layer} as in `to`, and {expert} runs over all experts.
        shard: how ranks share it: vocab, column (output rows), row (input columns), heads, expert; None is replicated.
        transform: makes the parameter from the sources in their order.
    """

    to: str
    sources: tuple[str, ...]
    shard: str | None = None
    transform: Transform = rows

    def names(self, layer: int | None, num_experts: int) -> tuple[str, ...]:
        """The sources with numbers filled in, expert by expert."""
        names = [s.replace("{layer}", str(layer)) for s in self.sources]
        if not any("{expert}" in n for n in names):
            return tuple(names)
        return tuple(n.replace("{expert}", str(e)) for e in range(num_experts) for n in names)

    def shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """What the transform makes of sources of these shapes, without any memory.

        Raises:
            ValueError, RuntimeError, IndexError: it cannot take them.
        """
        return _shape(self.transform, shapes)


def _shape(turn: Transform, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """In plain numbers, as torch.cat and torch.stack on the meta device import a compiler for a second or two."""
    if turn is stack_gate_up:
        shapes = [_shape(rows, pair) for pair in zip(shapes[::2], shapes[1::2], strict=True)]
    if turn in (stack_experts, stack_gate_up):
        if len(set(shapes)) != 1:
            raise ValueError("experts of different shapes")
        return len(shapes), *shapes[0]
    first, *rest = shapes
    if turn is rows:
        if not first or any(s[1:] != first[1:] or not s for s in rest):
            raise ValueError("rows of different widths")
        return sum(s[0] for s in shapes), *first[1:]
    if turn is transpose_experts or (turn is part_gate_up and len(first) == 3):
        return first[0], first[2], first[1], *first[3:]
    if turn in (part_rows, part_gate_up):
        return first[0], *first[1:]
    if turn is plus_one:
        return first
    raise AssertionError(f"{turn} has no rule for its shape")
