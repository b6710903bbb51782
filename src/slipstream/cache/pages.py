"""Who owns which page. Plain integers; the tensors are in `storage`. No torch.

Each cache group has a pool of its own, since a page of a sliding group and one of a full group hold different layers.
A sequence gives back the pages of a sliding group as soon as no later token can see into them.

Keys and values depend on all tokens before them, so a full page is named after the tokens from the first on (a chain of
hashes). Who comes with the same beginning shares these pages: in a full group from the first on, in a sliding group those
that the next token still sees.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence

from slipstream.cache.pool import PagePool
from slipstream.cache.spec import CacheGroup
from slipstream.request import PageTable


class _Table:
    """The live pages of one sequence in one group."""

    __slots__ = ("_shown", "first", "pages")

    def __init__(self, first: int = 0, pages: Sequence[int] = ()) -> None:
        self.first = first
        self.pages = list(pages)
        self._shown: PageTable | None = None

    def change(self, dead: int, more: Sequence[int]) -> None:
        """Some pages go at the beginning, others come at the end."""
        self.first += dead
        self.pages = self.pages[dead:]
        self.pages += more
        self._shown = None

    def show(self) -> PageTable:
        if self._shown is None:
            self._shown = PageTable(self.first, tuple(self.pages))
        return self._shown


class Chain:
    """The names of the full pages of one row of tokens: each is a hash of its tokens and of the name before it.

    Args:
        salt: only rows of the same salt have the same names.
    """

    def __init__(self, page_size: int, salt: str = "") -> None:
        self._size = page_size
        self._start = hashlib.blake2b(salt.encode(errors="surrogatepass"), digest_size=16).digest()
        self._names: list[bytes] = []

    def names(self, tokens: Sequence[int], end: int) -> list[bytes]:
        """Of the pages that the first `end` tokens fill."""
        done, full = len(self._names), end // self._size
        data = memoryview(array("q", tokens[done * self._size : full * self._size])).cast("B")
        name = self._names[-1] if self._names else self._start
        for at in range(0, len(data), 8 * self._size):
            name = hashlib.blake2b(name + data[at : at + 8 * self._size], digest_size=16).digest()
            self._names.append(name)
        return self._names[:full]


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
        self._named: dict[int, int] = {}  # sequence -> how many of its pages have been offered to others

    def reserve(self, sequence: int, start: int, end: int) -> bool:
        """Make room for the tokens at positions start..end-1, first dropping pages that none of them sees.

        All groups or none: where one has too few free pages nothing new is taken, and False comes back.
        """
        tables = self._tables.get(sequence)
        if tables is None:
            tables = self._tables[sequence] = tuple(_Table() for _ in self.groups)
        last = -(-end // self.page_size)
        wanted = []
        for group, pool, table in zip(self.groups, self.pools, tables, strict=True):
            if group.window is not None:
                self._drop(group, pool, table, start)
            wanted.append(last - table.first - len(table.pages))
        if max(wanted) <= 0:  # as in most steps: there is room in the last page
            return True
        if any(n > pool.num_free for n, pool in zip(wanted, self.pools, strict=True)):
            return False
        for n, pool, table in zip(wanted, self.pools, tables, strict=True):
            if n > 0:
                table.change(0, pool.take(n))
        return True

    def _drop(self, group: CacheGroup, pool: PagePool, table: _Table, start: int) -> None:
        dead = min(group.first_visible(start) // self.page_size - table.first, len(table.pages))
        if dead > 0:
            pool.give(table.pages[:dead])
            table.change(dead, ())

    def begins_with(self, name: bytes) -> bool:
        """Whether a first page of this name is there, in the groups that see it for ever."""
        return all(p.find(name) is not None for g, p in zip(self.groups, self.pools, strict=True) if g.window is None)

    def known(self, names: Sequence[bytes]) -> int:
        """Pages at the beginning that need not be computed: for the next token, every group has what it sees.

        Args:
            names: from `Chain`, of the pages at the beginning.
        """
        count = len(names)
        while count:
            missing = [
                self._missing(group, pool, names, count) for group, pool in zip(self.groups, self.pools, strict=True)
            ]
            if min(missing) == count:
                return count
            count = min(missing)  # with more pages than that the missing one would be seen too
        return 0

    def _missing(self, group: CacheGroup, pool: PagePool, names: Sequence[bytes], count: int) -> int:
        """Of the pages that a token after `count` full ones sees, one that is not there: the first in a full group, the
        last in a sliding one. `count`: all are there."""
        pages = range(group.first_visible(count * self.page_size) // self.page_size, count)
        order = pages if group.window is None else reversed(pages)
        return next((i for i in order if pool.find(names[i]) is None), count)

    def _seen(self, names: Sequence[bytes], count: int) -> Iterator[tuple[int, list[int | None]]]:
        """For each group the first page that a token after `count` full ones sees, and the pages from there on."""
        for group, pool in zip(self.groups, self.pools, strict=True):
            first = group.first_visible(count * self.page_size) // self.page_size
            yield first, [pool.find(name) for name in names[first:count]]

    def fits(self, length: int, chunk: int, names: Sequence[bytes] = ()) -> bool:
        """Whether the free pages are enough to compute `length` tokens `chunk` at a time, beside the known ones.

        Args:
            names: of the known pages. Those that others hold need no room.
        """
        seen = [found for _, found in self._seen(names, len(names))]
        return all(
            group.max_pages(length, chunk, self.page_size) - (len(found) - pool.idle(p for p in found if p is not None))
            <= pool.num_free
            for group, pool, found in zip(self.groups, self.pools, seen, strict=True)
        )

    def share(self, sequence: int, names: Sequence[bytes]) -> None:
        """Begin a sequence with these known pages."""
        tables = []
        for pool, (first, found) in zip(self.pools, list(self._seen(names, len(names))), strict=True):
            pages = [p for p in found if p is not None]
            pool.share(pages)
            tables.append(_Table(first, pages))
        self._tables[sequence] = tuple(tables)
        self._named[sequence] = len(names)

    def offer(self, sequence: int, names: Sequence[bytes]) -> None:
        """Let others find the pages that are full by now."""
        done = self._named.get(sequence, 0)
        for pool, table in zip(self.pools, self._tables[sequence], strict=True):
            for i in range(max(done, table.first), len(names)):
                pool.name(table.pages[i - table.first], names[i])
        self._named[sequence] = len(names)

    def tables(self, sequence: int) -> tuple[PageTable, ...]:
        return tuple(t.show() for t in self._tables[sequence])

    def held(self, sequence: int) -> tuple[int, ...]:
        """Pages held in each group."""
        return tuple(len(t.pages) for t in self._tables.get(sequence, ()))

    def free(self, sequence: int) -> None:
        """Give everything back; a sequence that holds nothing is fine."""
        for pool, table in zip(self.pools, self._tables.pop(sequence, ()), strict=False):
            pool.give(table.pages)
        self._named.pop(sequence, None)

    def forget(self, names: Sequence[bytes]) -> None:
        """Nobody shall find these pages any more: what is in them is not to be trusted."""
        for pool in self.pools:
            pool.forget([page for name in names if (page := pool.find(name)) is not None])

    @property
    def num_cached(self) -> tuple[int, ...]:
        """In each group the pages that nobody holds and that can be found."""
        return tuple(pool.num_cached for pool in self.pools)

    def check(self) -> None:
        """Every page has as many holders as tables that name it. Raises AssertionError: a bug of ours."""
        for i, pool in enumerate(self.pools):
            pool.check()
            owned: dict[int, int] = {}
            for tables in self._tables.values():
                for page in tables[i].pages:
                    owned[page] = owned.get(page, 0) + 1
            if any(pool.holders(page) != count for page, count in owned.items()):
                raise AssertionError(f"group {i}: a page has another number of holders than tables that name it")
            if len(owned) + pool.num_free != pool.num_pages:
                raise AssertionError(f"group {i}: {len(owned)} owned + {pool.num_free} free != {pool.num_pages}")
