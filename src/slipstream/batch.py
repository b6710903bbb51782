"""`Batch`: the tensors of one Step. Built once a step; every layer reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

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
        groups: one for each cache group.
    """

    token_ids: Tensor
    positions: Tensor
    query_starts: tuple[int, ...]
    starts: tuple[int, ...]
    logits_rows: Tensor
    groups: tuple[GroupBatch, ...]

    @property
    def num_tokens(self) -> int:
        return self.query_starts[-1]

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """`query_starts` (sequences + 1,) and `starts` (sequences,) on the device, int32."""
        device = self.token_ids.device
        starts = torch.tensor(self.starts, dtype=torch.int32, device=device)
        return torch.tensor(self.query_starts, dtype=torch.int32, device=device), starts

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
    token_ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    query_starts = [0]
    for c in chunks:
        if c.sequence in all_logits:
            rows.extend(range(len(token_ids), len(token_ids) + len(c.token_ids)))
        elif c.sample:
            rows.append(len(token_ids) + len(c.token_ids) - 1)
        token_ids.extend(c.token_ids)
        positions.extend(range(c.start, c.end))
        query_starts.append(len(token_ids))
    starts = tuple(c.start for c in chunks)
    where = torch.tensor(positions)
    rows_of = torch.repeat_interleave(torch.tensor([len(c.token_ids) for c in chunks]))
    return Batch(
        token_ids=torch.tensor(token_ids, device=device),
        positions=where.to(device),
        query_starts=tuple(query_starts),
        starts=starts,
        logits_rows=torch.tensor(rows, dtype=torch.int64, device=device),
        groups=tuple(_group(i, g, chunks, page_size, device, where, rows_of) for i, g in enumerate(groups)),
    )


def neighbours(pages: tuple[int, ...]) -> bool:
    """Whether each page follows the one before it: the whole context is then one slice of the cache."""
    low, high = pages[0], pages[-1] + 1
    return high - low == len(pages) and pages == tuple(range(low, high))


def _group(
    index: int,
    group: CacheGroup,
    chunks: Sequence[Chunk],
    size: int,
    device: torch.device,
    positions: Tensor,
    rows: Tensor,
) -> GroupBatch:
    tables = tuple(c.tables[index] for c in chunks)
    most = max(len(t.pages) for t in tables)
    pages = torch.tensor([t.pages + (0,) * (most - len(t.pages)) for t in tables], dtype=torch.int32)
    first = torch.tensor([t.first for t in tables], dtype=torch.int32)
    slots = pages[rows, positions // size - first[rows]].long() * size + positions % size
    ranges = tuple((c.start, c.end) for c in chunks)
    return GroupBatch(group, size, tables, ranges, pages.to(device), first.to(device), slots.to(device))
