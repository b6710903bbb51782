"""Decoding steps as CUDA graphs: the launches of a whole step are recorded once for each size, and replayed from then on.

A graph reads its inputs where they stood when it was recorded, so the inputs of all graphs share one buffer, to which a
step's are copied at once. Steps of other sizes are filled up with rows that write to a page of their own. Page tables
come in a few widths, since kernels are launched for the width.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slipstream.batch import DTYPES, Batch, GroupBatch, aligned
from slipstream.cache.storage import Storage
from slipstream.errors import KernelError
from slipstream.layers.transformer import Transformer
from slipstream.plan import Plan
from slipstream.request import UNKNOWN, Chunk, PageTable

Run = Callable[[], Tensor]
Record = Callable[[Run, Callable[[], None]], Run]
NARROW = 32  # pages of the narrowest table


def ladder(most: int) -> tuple[int, ...]:
    """Numbers of rows that graphs are recorded for: at most a quarter of the rows is filled up from 8 on."""
    sizes = [n for n in (1, 2, 4) if n < most]
    step, at = 4, 8
    while at < most:
        sizes.append(at)
        step = max(step, 1 << (at.bit_length() - 3))
        at += step
    return (*sizes, most)


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a step: rows, and for each cache group the width of its page table."""

    rows: int
    widths: tuple[int, ...]


class Inputs:
    """The buffer on the device, and where a shape's inputs stand in it."""

    def __init__(self, widest: Shape, device: torch.device) -> None:
        self._cuts: dict[Shape, list[tuple[int, np.dtype[Any], tuple[int, ...]]]] = {}
        self.buffer = torch.zeros(self._cut(widest)[-1][0], dtype=torch.uint8, device=device)

    def _cut(self, shape: Shape) -> list[tuple[int, np.dtype[Any], tuple[int, ...]]]:
        """Offset, type and size of each part, and last the bytes in all."""
        found = self._cuts.get(shape)
        if found is None:
            rows, groups, at = -(-shape.rows // 32) * 32, len(shape.widths), 0  # so that each row of a part is aligned
            found = []
            kinds: list[tuple[type, tuple[int, ...]]] = [
                (
                    np.int64,
                    (4 + groups, rows),
                ),  # token ids, whose answers they are, positions, noise, slots of each group
                (np.int32, (1 + groups, rows)),  # positions, first pages
                *((np.int32, (shape.rows, width)) for width in shape.widths),
                (np.float32, (rows,)),  # temperatures
                (np.bool_, (rows,)),  # which token ids are known
            ]
            for kind, size in kinds:
                found.append((at, np.dtype(kind), size))
                at += aligned(math.prod(size) * np.dtype(kind).itemsize)
            found.append((at, np.dtype(np.uint8), ()))
            self._cuts[shape] = found
        return found

    def host(self, shape: Shape) -> tuple[Tensor, list[np.ndarray]]:
        """A buffer to fill, and its parts. It is a new one each time, as a copy of the last one may be under way."""
        *parts, (count, _, _) = self._cut(shape)
        buffer = torch.empty(count, dtype=torch.uint8, pin_memory=self.buffer.is_cuda)
        whole = buffer.numpy()
        sizes = ((at, kind, size, math.prod(size) * kind.itemsize) for at, kind, size in parts)
        return buffer, [whole[at : at + count].view(kind).reshape(size) for at, kind, size, count in sizes]

    def device(self, shape: Shape) -> list[Tensor]:
        return [
            self.buffer[at : at + math.prod(size) * kind.itemsize].view(DTYPES[kind.str[1:]]).view(size)
            for at, kind, size in self._cut(shape)[:-1]
        ]

    def send(self, buffer: Tensor) -> None:
        self.buffer[: len(buffer)].copy_(buffer, non_blocking=True)


class Decoder:
    """Runs steps in which every sequence has one token and wants the next.

    Args:
        answers: the tokens that `pick` writes, and whether each is one; also where unknown ones are found.
        record: makes of a step on fixed inputs what replays it. It is also given what makes it possible to run the step once
            more: by itself each run overwrites the tokens that it begins with.

    Attributes:
        recorded: what replays the steps of each shape; clear it to let go of all that they hold.
    """

    def __init__(
        self,
        plan: Plan,
        model: Transformer,
        storage: Storage,
        answers: tuple[Tensor, Tensor],
        record: Record | None = None,
    ) -> None:
        self._plan, self._model, self._storage, self._answers = plan, model, storage, answers
        self._record = record or CudaGraphs()
        self._sizes = ladder(plan.max_num_seqs)
        most = tuple(g.max_pages(plan.max_model_len, 1, plan.page_size) for g in plan.groups)
        self._inputs = Inputs(Shape(plan.max_num_seqs, tuple(map(_width, most, most))), plan.device)
        self._most = most
        # Graphs read and write these for as long as they are, so they are made once and kept.
        self._logits = torch.empty(plan.max_num_seqs, plan.model_config.vocab_size, device=plan.device)
        self._rows = torch.arange(plan.max_num_seqs, device=plan.device)
        self._starts = torch.arange(plan.max_num_seqs + 1, dtype=torch.int32, device=plan.device)
        self.recorded: dict[Shape, Run] = {}
        self._tables: dict[tuple[int, int], tuple[PageTable, np.ndarray]] = {}  # as arrays, while they do not change

    def forget(self, sequence: int) -> None:
        for group in range(len(self._most)):
            self._tables.pop((sequence, group), None)

    def run(self, chunks: Sequence[Chunk], sources: Sequence[int], heat: Sequence[float], noise: np.ndarray) -> Tensor:
        """Logits, (sequences, vocab); they hold until the next call. Tokens are picked as well.

        Args:
            sources: of those whose token is UNKNOWN, the row of `answers` that it is in.
            heat: temperatures.
            noise: `streams` of seeds and positions.
        """
        shape = self._shape(chunks)
        buffer, parts = self._inputs.host(shape)
        self._fill(parts, chunks)
        wide, heats = parts[0], parts[-2]
        wide[1, : len(chunks)], wide[3, : len(chunks)], heats[: len(chunks)] = sources, noise, heat
        self._inputs.send(buffer)
        run = self.recorded.get(shape)
        if run is None:
            before = [t.clone() for t in self._answers]

            def again() -> None:
                for there, here in zip(self._answers, before, strict=True):
                    there.copy_(here)

            def record(step: Run) -> Run:
                return self._record(step, again)

            step, used = self._step(shape), self._plan.ops.used
            try:
                run = record(step) if used is None else used.record(record, step)
            except (RuntimeError, AssertionError) as e:
                # Other ranks may have recorded it, and would run it another number of times.
                if self._model.ranks.ranks.size > 1:
                    raise KernelError(
                        f"a step of {shape.rows} rows cannot be recorded as a CUDA graph: {e}; try enforce_eager=True"
                    ) from e
                warnings.warn(f"a step of {shape.rows} rows cannot be recorded, and runs slower: {e}", stacklevel=2)
                run = step  # this size goes on kernel by kernel
                again()
            self.recorded[shape] = run
        return run()[: len(chunks)]

    def rehearse(self) -> None:
        """Run a step of every size and every width once, unrecorded: `warm` gathers what they launch."""
        widths = [tuple(_width(pages, most) for most in self._most) for pages in _widths(max(self._most))]
        few = {*self._sizes[:3], self._sizes[-1]}  # rows by which the inputs may stand in memory in another way
        for rows in self._sizes:
            for wide in widths if rows in few else widths[:1]:
                self._step(Shape(rows, wide))()

    def _step(self, shape: Shape) -> Run:
        rows = shape.rows
        *parts, heat, known = self._inputs.device(shape)
        wide, narrow, tables = parts[0][:, :rows], parts[1][:, :rows], parts[2:]
        heat, known, out = heat[:rows], known[:rows], self._logits[:rows]
        groups = tuple(
            GroupBatch(group, self._plan.page_size, (), (), pages, narrow[1 + g], wide[4 + g])
            for g, (group, pages) in enumerate(zip(self._plan.groups, tables, strict=True))
        )
        bounds = (self._starts[: rows + 1], narrow[0])
        batch = Batch(wide[0], wide[2], tuple(range(rows + 1)), (0,) * rows, self._rows[:rows], bounds, groups)
        tokens, ok = self._answers

        def step() -> Tensor:
            batch.token_ids = torch.where(known, wide[0], tokens[wide[1]])
            self._model(batch, self._storage, out)
            self._plan.ops.pick(out, heat, wide[3], (tokens[:rows], ok[:rows]))
            return out

        return step

    def _shape(self, chunks: Sequence[Chunk]) -> Shape:
        rows = next(n for n in self._sizes if n >= len(chunks))
        widths = (max(len(c.tables[g].pages) for c in chunks) for g in range(len(self._most)))
        return Shape(rows, tuple(map(_width, widths, self._most)))

    def _fill(self, parts: list[np.ndarray], chunks: Sequence[Chunk]) -> None:
        wide, narrow, *tables, heat, known = parts
        size, count = self._plan.page_size, len(chunks)
        positions = np.array([c.start for c in chunks])
        wide[:4, count:], narrow[:, count:], heat[count:], known[count:] = 0, 0, 0, True
        wide[0, :count] = [c.token_ids[0] for c in chunks]
        known[:count] = wide[0, :count] != UNKNOWN
        wide[2, :count] = narrow[0, :count] = positions
        for g, pages in enumerate(tables):
            pages[count:] = self._plan.num_pages[g]  # the page behind those that are given away
            wide[4 + g, count:] = self._plan.num_pages[g] * size
            firsts = narrow[1 + g]
            firsts[:count] = [c.tables[g].first for c in chunks]
            for row, c in zip(pages, chunks, strict=False):
                known_pages = self._array(c, g)
                row[: len(known_pages)] = known_pages
            page = pages[np.arange(count), positions // size - firsts[:count]]
            wide[4 + g, :count] = page.astype(np.int64) * size + positions % size

    def _array(self, chunk: Chunk, group: int) -> np.ndarray:
        table, key = chunk.tables[group], (chunk.sequence, group)
        found = self._tables.get(key)
        if found is None or found[0] is not table:
            found = self._tables[key] = (table, np.array(table.pages, np.int32))
        return found[1]


def _width(pages: int, most: int) -> int:
    width = NARROW
    while width < pages:
        width *= 4
    return min(width, most)


def _widths(most: int) -> list[int]:
    """All widths of tables, for a group whose widest has so many pages."""
    found = [NARROW]
    while found[-1] < most:
        found.append(4 * found[-1])
    return found


class CudaGraphs:
    """Records on the current device. Graphs share the memory of what they compute on the way, as one runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._side: Any = None  # one stream for all: torch keeps a workspace for each that cuBLAS was used on

    def __call__(self, run: Run, again: Callable[[], None]) -> Run:
        side = self._side = self._side or torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled and chosen before anything is recorded
            want = run().clone()
        torch.cuda.current_stream().wait_stream(side)
        again()
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with what is forbidden while this one records, such as loading another model.
        with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
            out = run()
        self._pool = graph.pool()
        graph.replay()
        if not torch.equal(out.nan_to_num(), want.nan_to_num()):
            raise AssertionError("a recorded step gives other numbers than the same step run kernel by kernel")
        again()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay
