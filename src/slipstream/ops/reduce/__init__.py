"""The sum over ranks, alone or with the residual and the norm that follow it.

    reduce(x, speak) -> like x                              the sum of what ranks have; speak(say, *words) has them all say something
    reduce(x, slots) -> like x                              the same through memory that all see
    reduce_norm(part, x, weight, eps, slots, dtype)         add_norm(x, reduce(part, slots), weight, eps, dtype)

x, part (rows, width), contiguous rows. The sum is made in float32 in the order of the ranks, so it has the same bits on all of them,
and is rounded to the dtype of what they have before anything else is done with it; unless reduce_norm adds it to a float32 x.

`peers` writes what a rank has straight into the memory of the others' cards, in one kernel, and so is for messages of a decoding
step; its `reduce_norm` also takes what experts left to add (ops/moe: Pairs). Larger ones, and all where it cannot be had, go by
`collective`: torch.distributed, with NCCL on GPUs and gloo on CPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slipstream.ops.choose import Case, Impl, needs_triton

if TYPE_CHECKING:
    from torch import Tensor

    from slipstream.ops.moe import Pairs

ROWS, WORDS = 256, 4096  # of the largest message; a word is 4 bytes of a row
RANKS = 8


@dataclass(frozen=True, slots=True)
class Slots:
    """Where ranks find each other's memory.

    Attributes:
        table: for each rank the address of its slots, (size) int64. Slots are (2, size, ROWS, WORDS) int64, zeros at first: of every
            second sum, from each rank, a row's words, each beside the number of the sum.
        counts: numbers of the next sum, (ROWS) int32, ones at first.
        stop: (1) int32, zero; with another number nobody is waited for any more, and sums mean nothing.
    """

    rank: int
    size: int
    table: Tensor
    counts: Tensor
    stop: Tensor

    def take(self, x: Tensor | Pairs) -> bool:
        """Whether there is room for it."""
        return len(x) <= ROWS and x.shape[1] * x.itemsize % 4 == 0 and x.shape[1] * x.itemsize <= 4 * WORDS


def _collective() -> Any:
    from slipstream.ops.reduce.reference import reduce

    return reduce


def _peers() -> Any:
    from slipstream.ops.reduce import triton

    return triton


def _reject_peers(case: Case) -> str | None:
    if (why := needs_triton(case)) is not None:
        return why
    if case.get("ranks", 1) > RANKS:
        return f"is for {RANKS} ranks at most, not {case.get('ranks')}"
    if case.get("machines", 1) > 1:
        return "is for ranks of one machine"
    if case.dtype not in ("bfloat16", "float32"):
        return f"takes bfloat16 and float32, not {case.dtype}"
    width = case.get("width", 0) * (2 if case.dtype == "bfloat16" else 4)
    if width % 4 or width > 4 * WORDS:
        return f"takes rows of at most {4 * WORDS:,} bytes in words of 4, not of {width:,}"
    why_not: str | None = case.get("unreachable")
    return why_not


IMPLS = (Impl("peers", _peers, _reject_peers), Impl("collective", _collective, lambda case: None))
