"""Who owns which page. Plain integers; the tensors are in `storage`. No torch.

Each cache group has a pool of its own, since a page of a sliding group and one of a full group hold different layers.
A sequence gives back the pages of a sliding group as soon as no later token can see into them.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from slipstream.cache.spec import CacheGroup
from slipstream.request import PageTable


class PagePool:
    """The free pages of one group. The lowest number goes out first, so a lone sequence gets neighbouring pages."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages))  # a sorted list is a heap
        self._held = bytearray(num_pages)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        pages = [heapq.heappop(self._free) for _ in range(count)]
        for p in pages:
            self._held[p] = 1
        return pages

    def give(self, pages: Sequence[int]) -> None:
        for p in pages:
            if not self._held[p]:
                raise AssertionError(f"page {p} was given back twice")
            self._held[p] = 0
            heapq.heappush(self._free, p)

    def check(self) -> None:
        """Free and held pages make up the whole pool. Raises AssertionError: a bug of ours."""
        if len(set(self._free)) != len(self._free) or sum(self._held) + len(self._free) != self.num_pages:
            raise AssertionError("a page is lost or counted twice")


class _Table:
    """The live pages of one sequence in one group."""

    __slots__ = ("first", "pages")

    def __init__(self) -> None:
        self.first = 0
        self.pages: list[int] = []


class Pages:
    """Page tables of all sequences over all groups.

    Args:
        groups: as `group_layers` gives them.
        num_pages: size of each group's pool.
        page_size: tokens a page.
    """

    def __init__(self, groups: Sequence[CacheGroup], num_pages: Sequence[int], page_size: int) -> None:
        self.groups = tuple(groups)
        self.page_size = page_size
        self.pools = tuple(PagePool(n) for n in num_pages)
        self._tables: dict[int, tuple[_Table, ...]] = {}

    def reserve(self, sequence: int, start: int, end: int) -> bool:
        """Make room for the tokens at positions start..end-1, first dropping pages that none of them sees.

        All groups or none: where one has too few free pages nothing new is taken, and False comes back.
        """
        tables = self._tables.get(sequence)
        if tables is None:
            tables = self._tables[sequence] = tuple(_Table() for _ in self.groups)
        wanted = []
        for group, pool, table in zip(self.groups, self.pools, tables, strict=True):
            self._drop(group, pool, table, start)
            wanted.append(max(0, -(-end // self.page_size) - (table.first + len(table.pages))))
        if any(n > pool.num_free for n, pool in zip(wanted, self.pools, strict=True)):
            return False
        for n, pool, table in zip(wanted, self.pools, tables, strict=True):
            table.pages += pool.take(n)
        return True

    def _drop(self, group: CacheGroup, pool: PagePool, table: _Table, start: int) -> None:
        dead = min(group.first_visible(start) // self.page_size - table.first, len(table.pages))
        if dead > 0:
            pool.give(table.pages[:dead])
            del table.pages[:dead]
            table.first += dead

    def fits(self, length: int, chunk: int) -> bool:
        """Whether the free pages are enough to compute `length` tokens from the first on, `chunk` at a time."""
        need = (group.max_pages(length, chunk, self.page_size) for group in self.groups)
        return all(n <= pool.num_free for n, pool in zip(need, self.pools, strict=True))

    def tables(self, sequence: int) -> tuple[PageTable, ...]:
        return tuple(PageTable(t.first, tuple(t.pages)) for t in self._tables[sequence])

    def held(self, sequence: int) -> tuple[int, ...]:
        """Pages held in each group."""
        return tuple(len(t.pages) for t in self._tables.get(sequence, ()))

    def free(self, sequence: int) -> None:
        """Give everything back; a sequence that holds nothing is fine."""
        for pool, table in zip(self.pools, self._tables.pop(sequence, ()), strict=False):
            pool.give(table.pages)

    def check(self) -> None:
        """Every page is free or in exactly one table. Raises AssertionError: a bug of ours."""
        for i, pool in enumerate(self.pools):
            pool.check()
            owned = [p for tables in self._tables.values() for p in tables[i].pages]
            if len(set(owned)) != len(owned) or len(owned) + pool.num_free != pool.num_pages:
                raise AssertionError(f"group {i}: {len(owned)} owned + {pool.num_free} free != {pool.num_pages}")
