"""Requests from an iterator through an engine: a bounded number queued, each given back when it has ended, whatever others do."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from slipstream.errors import RequestError, SlipstreamError
from slipstream.request import Request, RequestOutput

if TYPE_CHECKING:
    from slipstream.conversation import ChatStream, Parser
    from slipstream.engine.engine import Delta, Engine, Stream

T = TypeVar("T")
_CHOICE = 2  # answers in the engine where there are priorities, as a multiple of those that can run together


@dataclass(slots=True, eq=False)
class Ride(Generic[T]):
    """One request on its way.

    Attributes:
        item: what it was made of.
        request: None where none could be made.
        refused: why it never started.
        broken: a pass that raised ended one of its answers.
    """

    item: T
    request: Request | None = None
    stream: Stream | None = None
    chat: ChatStream | None = None
    refused: SlipstreamError | None = None
    broken: bool = False
    unfinished: int = 0

    @property
    def output(self) -> RequestOutput:
        answered = self.chat or self.stream
        assert answered is not None, "it was refused"
        return answered.output


class Pump(Generic[T]):
    """Feeds one engine.

    Args:
        make: the request of an item and, for a conversation, what parts its answers. What it raises refuses the item.
        patience: of passes that raise in a row, the one that is raised to the caller. None: none is.

    Attributes:
        live: what is queued or runs, by its stream.
        taken: items so far.
    """

    def __init__(
        self, engine: Engine, make: Callable[[T], tuple[Request, list[Parser] | None]], patience: int | None = None
    ) -> None:
        self._engine, self._make, self._patience = engine, make, patience
        # What ends is followed before the next step, so nobody has to wait in the queue, where deadlines run; but for
        # priorities there has to be a choice.
        self._most = engine.plan.max_num_seqs * (_CHOICE if engine.scheduler.policy == "priority" else 1)
        self._mail: deque[tuple[Stream, Delta]] = deque()
        self._failures = 0
        self.live: dict[Stream, Ride[T]] = {}
        self.taken = 0

    def run(self, items: Iterator[T], room: Callable[[], bool] = lambda: True) -> Generator[list[Ride[T]], None, None]:
        """Runs the engine; gives, after each step, what has ended. Left early, for whatever reason, it cancels what is queued.

        An item is taken when it can run, and where the caller has room.
        """
        try:
            more = True
            while more or self.live:
                ended: list[Ride[T]] = []
                more = self._feed(items, room, ended)
                if self.live and not self._mail:
                    self._step()
                self._collect(ended)
                yield ended
        finally:
            for stream in self.live:
                stream.cancel()
            self.live.clear()
            self._mail.clear()

    def _feed(self, items: Iterator[T], room: Callable[[], bool], ended: list[Ride[T]]) -> bool:
        """Queue what there is room for; a flood of bad items is refused a few at a time. False: there are no more items."""
        while len(ended) < self._most and sum(r.unfinished for r in self.live.values()) < self._most and room():
            item = next(items, None)
            if item is None:
                return False
            self.taken += 1
            request = None
            try:
                request, parsers = self._make(item)
                stream = self._engine.submit(request, lambda *arrived: self._mail.append(arrived))
            except SlipstreamError as e:
                ended.append(Ride(item, request, refused=e))
                continue
            self.live[stream] = Ride(item, request, stream, unfinished=len(stream.answers))
            if parsers is not None:
                from slipstream.conversation import ChatStream  # here, as it loads jinja2

                self.live[stream].chat = ChatStream(stream, parsers)
        return True

    def _step(self) -> None:
        try:
            ran = self._engine.step()
        except RequestError:  # there was no pass: a callback inside a step may not run another
            raise
        except Exception:  # the engine has ended those that were in the pass, and their results say why
            self._failures += 1
            if self._failures == self._patience:
                raise
            return
        self._failures = 0
        if not ran and not self._mail:
            raise AssertionError("an unfinished answer is in no queue")

    def _collect(self, ended: list[Ride[T]]) -> None:
        while self._mail:
            stream, delta = self._mail.popleft()
            ride = self.live[stream]
            if ride.chat is not None:
                ride.chat.feed(delta)  # may end the answer, which then is in the mail too
            if delta.finish_reason is None:
                continue
            ride.broken |= delta.finish_reason == "error" and self._failures > 0
            ride.unfinished -= 1
            if not ride.unfinished:
                ended.append(self.live.pop(stream))
