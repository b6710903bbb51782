"""What the engine is doing, as one record of plain numbers that fronts print and export. No torch."""

from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass
from typing import Any, get_args

from slipstream.request import FinishReason
from slipstream.scheduler import Scheduler

SECONDS = 5.0  # tokens a second are of this long
_APART = 0.1  # seconds between two readings that are kept


@dataclass(frozen=True, slots=True)
class GroupPages:
    """The pages of one cache group: total = held + cached + free.

    Attributes:
        held: in use by running requests.
        cached: in use by nobody, but kept for requests that begin with the same tokens; given away when needed.
    """

    name: str
    total: int
    held: int
    cached: int
    free: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The engine at one moment. What is not said to be of the last seconds is a count since the start.

    Attributes:
        waiting, running: answers in the queue and under way (a request with n=3 has three).
        finished: reason -> answers that ended so.
        steps: forward passes.
        preemptions: how often an answer gave back its pages, to be computed again later.
        prompt_tokens: prompt tokens computed; those of a preempted answer count again.
        cached_tokens: tokens found in the cache instead of computed.
        new_tokens: tokens made.
        prompt_tokens_per_second, new_tokens_per_second: over the last 5 seconds; 0 after as long without a step.
        pages: one record for each cache group.
        longest_wait: seconds since the request came that waits for longest now.
        step_seconds: spent in steps.
        uptime: seconds.
    """

    waiting: int
    running: int
    finished: dict[str, int]
    steps: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    prompt_tokens_per_second: float
    new_tokens_per_second: float
    pages: tuple[GroupPages, ...]
    longest_wait: float
    step_seconds: float
    uptime: float

    @property
    def cache_use(self) -> float:
        """Share of the pages that is held, in the group where it is largest."""
        return max((g.held / g.total for g in self.pages if g.total), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self), "pages": [dataclasses.asdict(g) for g in self.pages]}


class Rate:
    """Tokens a second, from the totals before each step. Times are seconds on any one clock that does not go back."""

    def __init__(self) -> None:
        self._readings: deque[tuple[float, int, int]] = deque()
        self._begin, self._end = 0.0, float("-inf")  # of the last step
        self.step_seconds = 0.0

    def begin(self, now: float, prompt_tokens: int, new_tokens: int) -> None:
        """A step begins with these totals."""
        readings, self._begin = self._readings, now
        if now - self._end > SECONDS:
            readings.clear()  # idle time is no part of a rate
        if not readings or now - readings[-1][0] >= _APART:
            readings.append((now, prompt_tokens, new_tokens))
        while len(readings) > 1 and readings[1][0] <= now - SECONDS:
            readings.popleft()

    def end(self, now: float) -> None:
        self._end = now
        self.step_seconds += now - self._begin

    def per_second(self, now: float, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
        """Prompt tokens and new tokens a second, given the totals of now."""
        if not self._readings or now - self._end > SECONDS:
            return 0.0, 0.0
        since, prompt, new = self._readings[0]
        seconds = max(now - since, 1e-6)
        return (prompt_tokens - prompt) / seconds, (new_tokens - new) / seconds


def take_snapshot(scheduler: Scheduler, rate: Rate, now: float, started: float, longest_wait: float) -> Snapshot:
    """Read the counters. The caller sees to it that no step runs meanwhile."""
    counters, pages = scheduler.counters, scheduler.pages
    per_second = rate.per_second(now, counters.prompt_tokens, counters.new_tokens)
    groups = []
    for group, pool, cached in zip(pages.groups, pages.pools, pages.num_cached, strict=True):
        held = pool.num_pages - pool.num_free
        groups.append(GroupPages(group.name, pool.num_pages, held, cached, pool.num_free - cached))
    return Snapshot(
        waiting=len(scheduler.waiting),
        running=len(scheduler.running),
        finished={**dict.fromkeys(get_args(FinishReason), 0), **counters.finished},
        steps=counters.steps,
        preemptions=counters.preemptions,
        prompt_tokens=counters.prompt_tokens,
        cached_tokens=counters.cached_tokens,
        new_tokens=counters.new_tokens,
        prompt_tokens_per_second=per_second[0],
        new_tokens_per_second=per_second[1],
        pages=tuple(groups),
        longest_wait=longest_wait,
        step_seconds=rate.step_seconds,
        uptime=now - started,
    )
