"""Decoding steps as CUDA graphs: the launches of a whole step are recorded once for each size, and replayed from then on.

A graph reads its inputs where they stood when it was recorded, so the inputs of all graphs share one buffer, to which a
step's are copied at once. Steps of other sizes are filled up with rows that write to a page of their own. Page tables
come in a few widths, since kernels are launched for the width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slipstream.batch import Batch, GroupBatch
from slipstream.cache.storage import Storage
from slipstream.layers.transformer import Transformer
from slipstream.plan import Plan
from slipstream.request import Chunk, PageTable

Run = Callable[[], Tensor]
NARROW = 32  # pages of the narrowest table


def ladder(most: int) -> tuple[int, ...]:
    """Numbers of rows that graphs are recorded for: at most an eighth of the rows is filled up from 8 on."""
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
    """The buffer, on the device and on the host, and where a shape's inputs stand in it."""

    def __init__(self, plan: Plan, widest: Shape) -> None:
        self._plan = plan
        size = sum(a.nbytes for a in self._cut(np.zeros(0, np.uint8), widest, measure=True))
        pin = plan.device.type == "cuda"
        self.host = torch.zeros(size, dtype=torch.uint8, pin_memory=pin)
        self.device = torch.zeros(size, dtype=torch.uint8, device=plan.device)

    def _parts(self, shape: Shape) -> list[tuple[type, tuple[int, ...]]]:
        rows, groups = shape.rows, len(shape.widths)
        wide = [(np.int64, (2 + groups, rows))]  # token ids, positions, slots of each group
        return [*wide, (np.int32, (1 + groups, rows)), *((np.int32, (rows, w)) for w in shape.widths)]  # starts, firsts

    def _cut(self, buffer: np.ndarray, shape: Shape, *, measure: bool = False) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        at = 0
        for kind, size in self._parts(shape):
            count = int(np.prod(size)) * np.dtype(kind).itemsize
            found.append(np.zeros(size, kind) if measure else buffer[at : at + count].view(kind).reshape(size))
            at += count
        return found

    def on_host(self, shape: Shape) -> list[np.ndarray]:
        return self._cut(self.host.numpy(), shape)

    def on_device(self, shape: Shape) -> list[Tensor]:
        found: list[Tensor] = []
        at = 0
        for kind, size in self._parts(shape):
            dtype = torch.int64 if kind is np.int64 else torch.int32
            count = int(np.prod(size)) * dtype.itemsize
            found.append(self.device[at : at + count].view(dtype).view(size))
            at += count
        return found

    def send(self, shape: Shape) -> None:
        count = sum(a.nbytes for a in self.on_host(shape))
        self.device[:count].copy_(self.host[:count], non_blocking=True)


class Decoder:
    """Runs steps in which every sequence has one token and wants the next.

    Args:
        record: makes of the model on fixed inputs what replays it; the first call of what it makes is a run as well.
    """

    def __init__(
        self, plan: Plan, model: Transformer, storage: Storage, record: Callable[[Run], Run] | None = None
    ) -> None:
        self._plan, self._model, self._storage = plan, model, storage
        self._record = record or CudaGraphs()
        self._sizes = ladder(plan.max_num_seqs)
        most = tuple(g.max_pages(plan.max_model_len, 1, plan.page_size) for g in plan.groups)
        self._inputs = Inputs(plan, Shape(plan.max_num_seqs, tuple(map(_width, most, most))))
        self._most = most
        # Graphs read these for as long as they are, so they are made once and kept.
        self._rows = torch.arange(plan.max_num_seqs, device=plan.device)
        self._starts = torch.arange(plan.max_num_seqs + 1, dtype=torch.int32, device=plan.device)
        self._recorded: dict[Shape, Run] = {}
        self._tables: dict[tuple[int, int], tuple[PageTable, np.ndarray]] = {}  # as arrays, while they do not change

    def forget(self, sequence: int) -> None:
        for group in range(len(self._most)):
            self._tables.pop((sequence, group), None)

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits, (sequences, vocab) float32; they hold until the next call."""
        shape = self._shape(chunks)
        self._fill(chunks, shape)
        self._inputs.send(shape)
        run = self._recorded.get(shape)
        if run is None:
            batch = self._batch(shape)
            run = self._recorded[shape] = self._record(lambda: self._model(batch, self._storage))
        return run()[: len(chunks)]

    def _shape(self, chunks: Sequence[Chunk]) -> Shape:
        rows = next(n for n in self._sizes if n >= len(chunks))
        widths = (max(len(c.tables[g].pages) for c in chunks) for g in range(len(self._most)))
        return Shape(rows, tuple(map(_width, widths, self._most)))

    def _fill(self, chunks: Sequence[Chunk], shape: Shape) -> None:
        wide, narrow, *tables = self._inputs.on_host(shape)
        size, count = self._plan.page_size, len(chunks)
        positions = np.array([c.start for c in chunks])
        wide[:2, count:], narrow[:, count:] = 0, 0
        wide[0, :count] = [c.token_ids[0] for c in chunks]
        wide[1, :count] = narrow[0, :count] = positions
        for g, pages in enumerate(tables):
            pages[count:] = self._plan.num_pages[g]  # the page behind those that are given away
            wide[2 + g, count:] = self._plan.num_pages[g] * size
            firsts = narrow[1 + g]
            firsts[:count] = [c.tables[g].first for c in chunks]
            for row, c in zip(pages, chunks, strict=False):
                known = self._array(c, g)
                row[: len(known)] = known
            page = pages[np.arange(count), positions // size - firsts[:count]]
            wide[2 + g, :count] = page.astype(np.int64) * size + positions % size

    def _array(self, chunk: Chunk, group: int) -> np.ndarray:
        table, key = chunk.tables[group], (chunk.sequence, group)
        found = self._tables.get(key)
        if found is None or found[0] is not table:
            found = self._tables[key] = (table, np.array(table.pages, np.int32))
        return found[1]

    def _batch(self, shape: Shape) -> Batch:
        wide, narrow, *tables = self._inputs.on_device(shape)
        rows = shape.rows
        starts = tuple(range(rows + 1))
        groups = tuple(
            GroupBatch(group, self._plan.page_size, (), (), pages, narrow[1 + g], wide[2 + g])
            for g, (group, pages) in enumerate(zip(self._plan.groups, tables, strict=True))
        )
        batch = Batch(wide[0], wide[1], starts, (0,) * rows, self._rows[:rows], groups)
        batch.bounds = (self._starts[: rows + 1], narrow[0])
        return batch


def _width(pages: int, most: int) -> int:
    width = NARROW
    while width < pages:
        width *= 2
    return min(width, most)


class CudaGraphs:
    """Records on the current device. All graphs share their memory, as one runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Run) -> Run:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled and chosen before anything is recorded
            want = run().clone()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = run()
        self._pool = graph.pool()
        graph.replay()
        if not torch.equal(out.nan_to_num(), want.nan_to_num()):
            raise AssertionError("a recorded step gives other numbers than the same step run kernel by kernel")

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay
