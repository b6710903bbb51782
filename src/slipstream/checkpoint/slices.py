"""What a rank reads of the files: rows and experts are runs of bytes, so it reads its own alone. No torch.

Columns of a matrix lie apart, a few kilobytes in each row: such a matrix is read whole, and cut when it is there. So is what a
transform would mix up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from slipstream.checkpoint.rules import (
    Transform,
    part_gate_up,
    part_rows,
    rows,
    stack_experts,
    stack_gate_up,
    transpose_experts,
)
from slipstream.checkpoint.tensors import TensorInfo

Sources = tuple[TensorInfo, ...]


def narrow(turn: Transform, sources: Sources, at: int, ranges: Sequence[range]) -> Sources | None:
    """Sources of which the transform makes `ranges` of dim `at` of the parameter alone; None where these are no runs of bytes."""
    try:
        if turn is rows and at == 0:
            return _of_rows(sources, ranges)
        if turn is stack_experts:
            return _of_stack([(s,) for s in sources], at, [ranges])
        if turn is stack_gate_up:
            width = sources[0].shape[0]
            halves = [[r for r in ranges if r.stop <= width], [_moved(r, -width) for r in ranges if r.start >= width]]
            return _of_stack(list(zip(sources[::2], sources[1::2], strict=True)), at, [ranges] if at == 0 else halves)
        if len(sources) != 1:
            return None
        if turn is part_rows and at == 1:  # gate and up alternate: what is a pair of ranges is one run of rows
            half = len(ranges) // 2
            width = sources[0].shape[1] // 2
            if [_moved(r, width) for r in ranges[:half]] != list(ranges[half:]):
                return None
            return (take(sources[0], 1, [range(2 * r.start, 2 * r.stop) for r in ranges[:half]]),)
        if turn is transpose_experts and at > 0:
            at = 3 - at
        elif turn not in (rows, part_rows, transpose_experts) and (turn is not part_gate_up or at > 0):
            return None
        return (take(sources[0], at, ranges),)
    except _ApartError:
        return None


class _ApartError(Exception):
    """They are no runs of bytes."""


def take(info: TensorInfo, dim: int, ranges: Iterable[range]) -> TensorInfo:
    """`ranges` of a dim of one tensor, one after the other."""
    ranges = [r for r in ranges if len(r)]
    if dim > 0 and dim == len(info.shape) - 1:
        raise _ApartError
    if info.parts:
        parts = tuple(take(p, dim, ranges) for p in info.parts)
        return replace(info, shape=_shape(info, dim, ranges), nbytes=sum(p.nbytes for p in parts), parts=parts)
    outer, size = math.prod(info.shape[:dim]), info.shape[dim]
    heads = info.row_permute
    if heads is not None:
        head = size // heads
        if any(r.start % head or r.stop % head for r in ranges):
            raise _ApartError
        heads = sum(map(len, ranges)) // head
    each = info.nbytes // max(outer * size, 1)
    runs: list[tuple[int, int]] = []
    for begin, r in itertools.product(range(outer), ranges):
        start, nbytes = info.offset + (begin * size + r.start) * each, len(r) * each
        if runs and sum(runs[-1]) == start:
            runs[-1] = runs[-1][0], runs[-1][1] + nbytes
        else:
            runs.append((start, nbytes))
    return replace(
        info, shape=_shape(info, dim, ranges), nbytes=sum(n for _, n in runs), runs=tuple(runs), row_permute=heads
    )


def _shape(info: TensorInfo, dim: int, ranges: Sequence[range]) -> tuple[int, ...]:
    return (*info.shape[:dim], sum(map(len, ranges)), *info.shape[dim + 1 :])


def _of_rows(sources: Sources, ranges: Iterable[range]) -> Sources:
    """Of sources that stand one above the other."""
    wanted: list[tuple[int, range]] = []  # which source, and rows of it
    for r in ranges:
        first = 0
        for i, source in enumerate(sources):
            size = source.shape[0]
            found = range(max(r.start - first, 0), min(r.stop - first, size))
            if len(found):
                wanted.append((i, found))
            first += size
    return tuple(take(sources[i], 0, [r for _, r in group]) for i, group in itertools.groupby(wanted, lambda w: w[0]))


def _of_stack(experts: Sequence[Sources], at: int, ranges: Sequence[Sequence[range]]) -> Sources:
    """Of a tensor or two for each expert; `ranges` are of experts, or for each of the two of its rows."""
    if at == 0:
        return tuple(s for r in ranges[0] for e in r for s in experts[e])
    return tuple(take(s, at - 1, r) for one in experts for s, r in zip(one, ranges, strict=True))


def _moved(r: range, by: int) -> range:
    return range(r.start + by, r.stop + by)
