"""The pages of one cache group: free, held by sequences, or cached for whoever comes with the same beginning. No torch."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence


class PagePool:
    """Counts who holds each page. A page that is full may have a name, by which others find it.

    The lowest free number goes out first, so a lone sequence gets neighbouring pages. When none is free, the named page
    that nobody has held for longest loses its name and goes out.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free: list[int] = []  # a heap; all of them are below those
        self._fresh = 0  # that were never taken: from this number on
        self._holders = [0] * num_pages
        self._names: dict[int, bytes] = {}
        self._pages: dict[bytes, int] = {}  # the way back
        self._cached: OrderedDict[int, None] = OrderedDict()  # named and held by nobody, the longest unused first

    @property
    def num_free(self) -> int:
        """Pages that can be taken: nobody holds them."""
        return len(self._free) + self.num_pages - self._fresh + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Those of them that still can be found by name."""
        return len(self._cached)

    def take(self, count: int) -> list[int]:
        pages = []
        for _ in range(count):
            if self._free:
                page = heapq.heappop(self._free)
            elif self._fresh < self.num_pages:
                page, self._fresh = self._fresh, self._fresh + 1
            else:
                page, _ = self._cached.popitem(last=False)
                self.forget((page,))
            self._holders[page] = 1
            pages.append(page)
        return pages

    def find(self, name: bytes) -> int | None:
        """The page of this name."""
        return self._pages.get(name)

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each of these pages, which were found by name."""
        for page in pages:
            self._cached.pop(page, None)
            self._holders[page] += 1

    def idle(self, pages: Iterable[int]) -> int:
        """How many of these pages nobody holds."""
        return sum(page in self._cached for page in pages)

    def name(self, page: int, name: bytes) -> None:
        """Let others find a page, which is full and will not change. The first page of a name keeps it."""
        if page not in self._names and name not in self._pages:
            self._names[page], self._pages[name] = name, page

    def forget(self, pages: Iterable[int]) -> None:
        """Nobody shall find these pages any more."""
        for page in pages:
            name = self._names.pop(page, None)
            if name is not None:
                del self._pages[name]
            if page in self._cached:
                del self._cached[page]
                heapq.heappush(self._free, page)

    def give(self, pages: Sequence[int]) -> None:
        """One holder fewer. The last ones are the first to lose their names later: a beginning serves more than an end."""
        for page in reversed(pages):
            if self._holders[page] < 1:
                raise AssertionError(f"page {page} was given back twice")
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._names:
                self._cached[page] = None
            else:
                heapq.heappush(self._free, page)

    def check(self) -> None:
        """Free, cached and held pages make up the whole pool. Raises AssertionError: a bug of ours."""
        held = {page for page, holders in enumerate(self._holders) if holders}
        fresh = range(self._fresh, self.num_pages)
        free, cached = {*self._free, *fresh}, set(self._cached)
        if len(free) != len(self._free) + len(fresh) or len(held) + len(free) + len(cached) != self.num_pages:
            raise AssertionError("a page is lost or counted twice")
        if held & free or held & cached or free & cached:
            raise AssertionError("a page is counted twice")
        if {name: page for page, name in self._names.items()} != self._pages or not cached <= self._names.keys():
            raise AssertionError("a name leads to another page")
        if free & self._names.keys():
            raise AssertionError("a free page can still be found by name")

    def holders(self, page: int) -> int:
        return self._holders[page]
