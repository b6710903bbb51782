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
    """What is particular to one cache group."""

    window: int | None
    tables: tuple[PageTable, ...]
    page_size: int
    slots: Tensor  # (tokens,) int64: where each token's key and value are written
    contexts: tuple[Context, ...]  # one for each sequence
    masks: dict[tuple[int, int, torch.dtype], Tensor] = field(
        default_factory=dict
    )  # made on first use, shared by the group's layers

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

    @cached_property
    def page_table(self) -> tuple[Tensor, Tensor]:
        """For kernels that find the pages themselves: pages (sequences, most pages of one) int32, filled up with 0, and the
        logical page that each row begins with, (sequences,) int32."""
        pages = torch.zeros(len(self.tables), max(len(t.pages) for t in self.tables), dtype=torch.int32)
        for row, table in zip(pages, self.tables, strict=True):
            row[: len(table.pages)] = torch.tensor(table.pages, dtype=torch.int32)
        first = torch.tensor([t.first for t in self.tables], dtype=torch.int32)
        return pages.to(self.slots.device), first.to(self.slots.device)

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
        found = (torch.tensor(v, dtype=torch.int32, device=self.token_ids.device) for v in (self.query_starts, self.starts))
        return next(found), next(found)

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
    return Batch(
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.tensor(positions, device=device),
        query_starts=tuple(query_starts),
        starts=tuple(c.start for c in chunks),
        logits_rows=torch.tensor(rows, dtype=torch.int64, device=device),
        groups=tuple(_group(i, g, chunks, page_size, device) for i, g in enumerate(groups)),
    )


def neighbours(pages: tuple[int, ...]) -> bool:
    """Whether each page follows the one before it: the whole context is then one slice of the cache."""
    low, high = pages[0], pages[-1] + 1
    return high - low == len(pages) and pages == tuple(range(low, high))


def _group(index: int, group: CacheGroup, chunks: Sequence[Chunk], page_size: int, device: torch.device) -> GroupBatch:
    slots: list[int] = []
    contexts: list[Context] = []
    offsets = torch.arange(page_size)
    for c in chunks:
        table = c.tables[index]
        base = table.first * page_size
        first = group.first_visible(c.start)
        if neighbours(table.pages):
            shift = table.pages[0] * page_size - base
            slots.extend(range(c.start + shift, c.end + shift))
            contexts.append(Context(first, c.end, slice(first + shift, c.end + shift)))
            continue
        where = (torch.tensor(table.pages)[:, None] * page_size + offsets).flatten()[first - base : c.end - base]
        slots.extend(where[c.start - first :].tolist())
        contexts.append(Context(first, c.end, where.to(device)))
    tables = tuple(c.tables[index] for c in chunks)
    return GroupBatch(group.window, tables, page_size, torch.tensor(slots, device=device), tuple(contexts))
