"""Many prompts through one engine: results in order or as they finish, and a bar that says how far it is."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from slipstream.errors import RequestError
from slipstream.pump import Pump, Ride
from slipstream.request import Completion, Request, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from slipstream.engine.engine import Engine
    from slipstream.engine.snapshot import Snapshot

_HELD = 16  # results that wait for one before them, or to be taken, as a multiple of what can run together
_APART = 0.1  # seconds between two reports of progress
_MOMENT = 0.5  # seconds; what is done sooner shows no bar

Make = Callable[[Any, SamplingParams | None], Request]
Pair = tuple[Any, SamplingParams | None]


def pairs(prompts: Iterable[Any], params: SamplingParams | Iterable[SamplingParams | None] | None) -> Iterator[Pair]:
    """Each prompt with its parameters.

    Raises:
        RequestError: while iterating, when there are not as many of the one as of the other.
    """
    if params is None or isinstance(params, SamplingParams):
        yield from ((prompt, params) for prompt in prompts)
        return
    end = object()
    rest = iter(params)
    for i, prompt in enumerate(prompts):
        own: Any = next(rest, end)
        if own is end:
            raise RequestError(
                f"params: there are {i}, but more prompts than that; give one for each, or one for all", field="params"
            )
        yield prompt, own
    if next(rest, end) is not end:
        raise RequestError(
            "params: there are more of them than prompts; give one for each, or one for all", field="params"
        )


class BatchRun:
    """One batch under way.

    Args:
        make: checks and tokenizes a prompt.
        asked: prompts and parameters; taken as there is room.
        ordered: results come in the order of the prompts, else as they finish.
        on_result: sees each result as it finishes.
        report: called now and then with a snapshot and how many are done.
    """

    def __init__(
        self,
        make: Make,
        engine: Engine,
        asked: Iterator[Pair],
        *,
        ordered: bool,
        on_result: Callable[[RequestOutput], object] | None,
        report: Callable[[Snapshot, int], object] | None,
    ) -> None:
        self._engine, self._asked = engine, asked
        self._ordered, self._on_result, self._report = ordered, on_result, report
        self._pump: Pump[tuple[int, Pair]] = Pump(engine, lambda item: (make(*item[1]), None))
        self._max_held = _HELD * engine.plan.max_num_seqs
        self._done = self._given = 0
        self._results: dict[int, RequestOutput] = {}
        self._reported = 0.0

    def results(self) -> Generator[RequestOutput, None, None]:
        """Runs the engine. Left early, for whatever reason, it cancels what is queued."""
        with contextlib.closing(self._pump.run(enumerate(self._asked), self._has_room)) as passes:
            for ended in passes:
                for ride in ended:
                    self._finish(ride)
                while (output := self._next_result()) is not None:
                    self._given += 1
                    yield output
                self._tell(_APART)
        self._tell(0.0)

    def _has_room(self) -> bool:
        return self._pump.taken - self._given < self._max_held

    def _finish(self, ride: Ride[tuple[int, Pair]]) -> None:
        index, (prompt, _) = ride.item
        output = _refusal(index, prompt, ride) if ride.refused is not None else ride.output
        self._done += 1
        if self._on_result is not None:
            try:
                self._on_result(output)
            except Exception as e:  # a caller's code: it may raise anything, and the others are to go on
                for completion in output.outputs:
                    completion.finish_reason, completion.error = "error", f"on_result: {type(e).__name__}: {e}"
        self._results[index] = output

    def _next_result(self) -> RequestOutput | None:
        key = self._given if self._ordered else next(iter(self._results), None)
        return None if key is None else self._results.pop(key, None)

    def _tell(self, apart: float) -> None:
        now = time.monotonic()
        if self._report is not None and now - self._reported >= apart:
            self._reported = now
            self._report(self._engine.snapshot(), self._done)


def _refusal(index: int, prompt: Any, ride: Ride[Any]) -> RequestOutput:
    refused = Completion(0, finish_reason="error", error=str(ride.refused))
    text = prompt if isinstance(prompt, str) else None
    request = ride.request or Request(f"refused-{index}", (), SamplingParams())
    return RequestOutput(request.id, text, request.prompt_token_ids, [refused])


class Bar:
    """Requests done, tokens a second and cache use, on standard error. Nothing where that is no terminal."""

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._since = time.monotonic()
        self._drawn: Progress | None = None
        self._task: TaskID | None = None

    def __call__(self, snapshot: Snapshot, done: int) -> None:
        if self._drawn is None and sys.stderr.isatty() and time.monotonic() - self._since >= _MOMENT:
            self._draw()
        if self._drawn is not None and self._task is not None:
            of = "" if self._total is None else f"/{self._total}"
            speed = f"{snapshot.new_tokens_per_second:.0f} tok/s"
            label = f"{done}{of} requests, {speed}, cache {snapshot.cache_use:.0%}"
            self._drawn.update(self._task, completed=done, description=label, refresh=True)

    def _draw(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._drawn = Progress(
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),  # a file is to get what is printed meanwhile
            redirect_stderr=False,
        )
        self._task = self._drawn.add_task("", total=self._total)
        self._drawn.start()

    def close(self) -> None:
        if self._drawn is not None:
            self._drawn.stop()
            self._drawn = None
