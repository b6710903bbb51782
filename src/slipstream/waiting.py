"""Who waits, and who is let in next. Plain integers; no torch."""

from __future__ import annotations

import bisect
import heapq
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slipstream.scheduler import Sequence

TURNS = 8  # that others may take before whoever came first is next, whatever their priorities


class Waiting:
    """Those that were thrown out come first, in the order in which they were let in before. Then the lowest priority, first
    come first served; but after TURNS in a row that passed over whoever came first of all, it is that one's turn.
    """

    def __init__(self) -> None:
        self._back: list[Sequence] = []
        self._new: OrderedDict[int, Sequence] = OrderedDict()  # in the order of their coming
        self._heap: list[tuple[int, int]] = []  # (priority, id); those that are no longer in `_new` are passed over
        self._passed = 0

    def __len__(self) -> int:
        return len(self._back) + len(self._new)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._back
        yield from self._new.values()

    def add(self, seq: Sequence) -> None:
        """At the end."""
        self._new[seq.id] = seq
        heapq.heappush(self._heap, (seq.params.priority, seq.id))

    def put_back(self, seq: Sequence) -> None:
        """One that was let in once already."""
        bisect.insort(self._back, seq, key=lambda other: other.rank)

    def first(self) -> Sequence | None:
        """Whose turn it is."""
        if self._back:
            return self._back[0]
        while self._heap and self._heap[0][1] not in self._new:
            heapq.heappop(self._heap)
        if not self._heap:
            return None
        first = next(iter(self._new))
        return self._new[first if self._passed >= TURNS else self._heap[0][1]]

    def take(self, seq: Sequence) -> None:
        """It is let in, as its turn has come."""
        if seq.id in self._new:
            self._passed = 0 if seq.id == next(iter(self._new)) else self._passed + 1
        self.remove(seq)

    def remove(self, seq: Sequence) -> None:
        """It does not wait any more, if it did."""
        if self._new.pop(seq.id, None) is None and seq in self._back:
            self._back.remove(seq)
