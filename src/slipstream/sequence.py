"""One answer in the making; and the queue of those that wait: who is let in next. Plain integers; no torch."""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from slipstream.cache.pages import Chain
from slipstream.request import FinishReason, SamplingParams

TURNS = 8  # that others may take before whoever came first is next, whatever their priorities


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer in the making: prompt and new tokens, and how many of them are in the cache."""

    id: int
    params: SamplingParams
    prompt_length: int
    tokens: list[int]
    seed: int
    end_ids: frozenset[int]  # the model's end tokens (unless ignored) and the request's own
    max_length: int
    chain: Chain | None = None  # names its full pages; None where they are neither looked up nor offered
    rank: int = 0  # the place in the order in which sequences were let in
    computed: int = 0
    known: bool = False  # the runner has been told of it
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def num_new(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def place(self) -> tuple[float, int]:
        """In the order of those that were let in and, behind them, of those that came."""
        return self.rank or math.inf, self.id

    @property
    def wants_prompt_logits(self) -> bool:
        """The next tokens to compute are scored one by one, so each of them has a row of logits."""
        return self.params.prompt_logprobs is not None and self.computed < self.prompt_length - 1


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

    def oldest(self) -> Sequence | None:
        """Who came first."""
        return min((*self._back, *itertools.islice(self._new.values(), 1)), key=lambda seq: seq.id, default=None)

    def take(self, seq: Sequence) -> None:
        """It is let in, as its turn has come."""
        if seq.id in self._new:
            self._passed = 0 if seq.id == next(iter(self._new)) else self._passed + 1
        self.remove(seq)

    def remove(self, seq: Sequence) -> None:
        """It does not wait any more, if it did."""
        if self._new.pop(seq.id, None) is None and seq in self._back:
            self._back.remove(seq)
        if len(self._heap) > 2 * len(self._new) + 64:  # many left from the middle of the queue
            self._heap = [(other.params.priority, other.id) for other in self._new.values()]
            heapq.heapify(self._heap)
