"""`Batch`: the tensors of one Step. Built once a step; every layer reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from slipstream.cache.spec import CacheGroup
from slipstream.request import Chunk, PageTable


@dataclass(frozen=True, slots=True)
class Context:
    """The keys that one sequence's queries may look at: positions first..end-1, in these slots of the cache."""

    first: int
    end: int
    slots: slice | Tensor  # a slice where the pages are neighbours, so that no copy is needed

    def take(self, cache: Tensor) -> Tensor:
        """(num_slots, kv_heads, head_dim) -> (end - first, kv_heads, head_dim)"""
        return cache[self.slots] if isinstance(self.slots, slice) else cache.index_select(0, self.slots)


@dataclass(eq=False)
class GroupBatch:
    """What is particular to one cache group. What only some implementations of attention look at is made on first use, and
    shared by the group's layers."""

    group: CacheGroup
    page_size: int
    tables: tuple[PageTable, ...]  # one for each sequence
    ranges: tuple[tuple[int, int], ...]  # and the positions of its tokens: start, end
    pages: Tensor  # (sequences, most pages of one) int32, filled up with 0
    first_pages: Tensor  # (sequences,) int32: the logical page that each row begins with
    slots: Tensor  # (tokens,) int64: where each token's key and value are written
    masks: dict[tuple[int, int, torch.dtype], Tensor] = field(default_factory=dict)

    @property
    def window(self) -> int | None:
        return self.group.window

    @property
    def page_table(self) -> tuple[Tensor, Tensor]:
        return self.pages, self.first_pages

    @cached_property
    def contexts(self) -> tuple[Context, ...]:
        """What each sequence's queries may look at."""
        return tuple(map(self._context, self.tables, self.ranges))

    def _context(self, table: PageTable, positions: tuple[int, int]) -> Context:
        (start, end), size = positions, self.page_size
        first, base = self.group.first_visible(start), table.first * size
        if neighbours(table.pages):
            shift = table.pages[0] * size - base
            return Context(first, end, slice(first + shift, end + shift))
        where = (torch.tensor(table.pages)[:, None] * size + torch.arange(size)).flatten()[first - base : end - base]
        return Context(first, end, where.to(self.slots.device))

    @cached_property
    def padding_is_small(self) -> bool:
        """Whether contexts padded to the longest take at most twice their own memory (or little anyway)."""
        lengths = [c.end - c.first for c in self.contexts]
        return len(lengths) * max(lengths) <= 2 * sum(lengths) + 4096

    @cached_property
    def decode_index(self) -> tuple[Tensor, Tensor]:
        """Slots of all contexts, padded to the longest: index (sequences, keys) and whether each is real.

        A padded place repeats the sequence's first slot, so that memory nobody wrote is never read.
        """
        longest = max(c.end - c.first for c in self.contexts)
        index = torch.empty(len(self.contexts), longest, dtype=torch.int64)
        real = torch.zeros(len(self.contexts), longest, dtype=torch.bool)
        for i, c in enumerate(self.contexts):
            slots = torch.arange(c.slots.start, c.slots.stop) if isinstance(c.slots, slice) else c.slots.cpu()
            index[i, : len(slots)] = slots
            index[i, len(slots) :] = slots[0]
            real[i, : len(slots)] = True
        return index.to(self.slots.device), real.to(self.slots.device)

    def mask(self, sequence: int, start: int, end: int, dtype: torch.dtype = torch.bool) -> Tensor:
        """(queries, keys): which of the context's keys each query at positions start..end-1 may see; as a float dtype,
        0 or -inf to add to its scores."""
        found = self.masks.get((sequence, start, dtype))
        if found is None:
            context, device = self.contexts[sequence], self.slots.device
            query = torch.arange(start, end, device=device)[:, None]
            key = torch.arange(context.first, context.end, device=device)[None, :]
            found = key <= query
            if self.window is not None:
                found &= key > query - self.window
            if dtype != torch.bool:
                found = torch.zeros(found.shape, dtype=dtype, device=device).masked_fill_(~found, float("-inf"))
            self.masks[sequence, start, dtype] = found
        return found


@dataclass(eq=False)
class Batch:
    """All chunks of a step, one after the other along `tokens`.

    Attributes:
        token_ids: (tokens,) int64.
        positions: (tokens,) int64.
        query_starts: first row of each sequence, and the number of tokens at the end.
        starts: position of each sequence's first query.
        logits_rows: (rows,) int64: the tokens whose logits are wanted.
        bounds: `query_starts` (sequences + 1,) and `starts` (sequences,) on the device, int32.
        groups: one for each cache group.
    """

    token_ids: Tensor
    positions: Tensor
    query_starts: tuple[int, ...]
    starts: tuple[int, ...]
    logits_rows: Tensor
    bounds: tuple[Tensor, Tensor]
    groups: tuple[GroupBatch, ...]

    @property
    def num_tokens(self) -> int:
        return self.query_starts[-1]

    @cached_property
    def decode_only(self) -> bool:
        """Every sequence has exactly one query."""
        return self.num_tokens == len(self.starts)


def build_batch(
    chunks: Sequence[Chunk],
    groups: Sequence[CacheGroup],
    page_size: int,
    device: torch.device,
    all_logits: frozenset[int] = frozenset(),
) -> Batch:
    """Lay out the chunks of a step. `all_logits` names sequences that want the logits of every token."""
    counts = np.array([len(c.token_ids) for c in chunks])
    ends = counts.cumsum()
    starts = np.array([c.start for c in chunks])
    whole = np.array([c.sequence in all_logits for c in chunks])
    wanted = whole | np.array([c.sample for c in chunks])
    firsts = np.where(whole, ends - counts, ends - 1)  # of the rows of logits
    rows_of = np.repeat(np.arange(len(chunks)), counts)
    positions = np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts)
    arrays = [
        np.fromiter(chain.from_iterable(c.token_ids for c in chunks), np.int64, int(ends[-1])),
        positions,
        np.concatenate([np.arange(i, j) for i, j, w in zip(firsts, ends, wanted, strict=True) if w] or [starts[:0]]),
        np.concatenate(([0], ends)).astype(np.int32),
        starts.astype(np.int32),
    ]
    for i in range(len(groups)):
        arrays += _places([c.tables[i] for c in chunks], page_size, positions, rows_of)
    token_ids, at, rows, query_starts, first_positions, *places = to_device(arrays, device)
    ranges = tuple((c.start, c.end) for c in chunks)

    def group(i: int) -> GroupBatch:
        pages, first, slots = places[3 * i : 3 * i + 3]
        return GroupBatch(groups[i], page_size, tuple(c.tables[i] for c in chunks), ranges, pages, first, slots)

    return Batch(
        token_ids=token_ids,
        positions=at,
        query_starts=(0, *ends.tolist()),
        starts=tuple(c.start for c in chunks),
        logits_rows=rows,
        bounds=(query_starts, first_positions),
        groups=tuple(map(group, range(len(groups)))),
    )


# By numpy's names.
DTYPES = {"i8": torch.int64, "i4": torch.int32, "f4": torch.float32, "f8": torch.float64, "b1": torch.bool}


def aligned(nbytes: int) -> int:
    """Triton compiles a kernel anew for pointers that are multiples of 16 bytes, and for others."""
    return -(-nbytes // 128) * 128


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays as tensors. They travel together, and nobody waits for them."""
    sizes = [aligned(a.nbytes) for a in arrays]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    bytes, at = buffer.numpy(), 0
    for a, size in zip(arrays, sizes, strict=True):
        bytes[at : at + a.nbytes] = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
        at += size
    there = buffer.to(device, non_blocking=True).split(sizes)
    return [t[: a.nbytes].view(DTYPES[a.dtype.str[1:]]).view(a.shape) for t, a in zip(there, arrays, strict=True)]


def neighbours(pages: tuple[int, ...]) -> bool:
    """Whether each page follows the one before it: the whole context is then one slice of the cache."""
    low, high = pages[0], pages[-1] + 1
    return high - low == len(pages) and pages == tuple(range(low, high))


def _places(
    tables: Sequence[PageTable], size: int, positions: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A group's page table, the logical pages that its rows begin with, and the slots of all tokens."""
    pages = np.zeros((len(tables), max(len(t.pages) for t in tables)), np.int32)
    for row, table in zip(pages, tables, strict=True):
        row[: len(table.pages)] = table.pages
    first = np.array([t.first for t in tables], np.int32)
    slots = pages[rows, positions // size - first[rows]].astype(np.int64) * size + positions % size
    return pages, first, slots
