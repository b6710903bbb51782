"""Many prompts through one engine: as many queued as it needs, each answered for itself, whatever happens to others."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from slipstream.errors import RequestError, SlipstreamError
from slipstream.request import Completion, Request, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from slipstream.engine.engine import Delta, Engine, Stream
    from slipstream.engine.snapshot import Snapshot

_AHEAD = 3  # answers in the engine, as a multiple of those that can run together
_HELD = 16  # the same for results that wait for one before them, or to be taken
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
                f"params: there are only {i}, and more prompts; give one for each or one", field="params"
            )
        yield prompt, own
    if next(rest, end) is not end:
        raise RequestError("params: there are more than prompts; give one for each or one", field="params")


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
        self._make, self._engine, self._asked = make, engine, asked
        self._ordered, self._on_result, self._report = ordered, on_result, report
        self._max_queued = _AHEAD * engine.plan.max_num_seqs
        self._max_held = _HELD * engine.plan.max_num_seqs
        self._exhausted = False
        self._taken = self._done = self._given = self._queued = 0
        self._live: dict[int, Stream] = {}
        self._ended: deque[int] = deque()
        self._results: dict[int, RequestOutput] = {}
        self._reported = 0.0

    def results(self) -> Generator[RequestOutput, None, None]:
        """Runs the engine. Left early, for whatever reason, it cancels what is queued."""
        try:
            while True:
                self._feed()
                self._collect()
                while (output := self._next_result()) is not None:
                    self._given += 1
                    yield output
                if self._exhausted and not self._live:
                    break
                if self._live and not self._ended:
                    self._step()
                self._tell(_APART)
            self._tell(0.0)
        finally:
            for stream in self._live.values():
                stream.cancel()

    def _feed(self) -> None:
        while not self._exhausted and self._queued < self._max_queued and self._taken - self._given < self._max_held:
            try:
                prompt, params = next(self._asked)
            except StopIteration:
                self._exhausted = True
                return
            self._taken += 1
            self._submit(self._taken - 1, prompt, params)

    def _submit(self, index: int, prompt: Any, params: SamplingParams | None) -> None:
        request = None
        try:
            request = self._make(prompt, params)
            stream = self._engine.submit(request, partial(_note_end, self._ended, index))
        except SlipstreamError as e:
            text = prompt if isinstance(prompt, str) else None
            refused = Completion(0, finish_reason="error", error=str(e))
            name, ids = (request.id, request.prompt_token_ids) if request is not None else (f"refused-{index}", ())
            self._finish(index, RequestOutput(name, text, ids, [refused]))
            return
        self._live[index] = stream
        self._queued += len(stream.answers)

    def _step(self) -> None:
        try:
            ran = self._engine.step()
        except Exception:  # the engine has ended those that were in the pass, and their results say why
            return
        if not ran and not self._ended:
            raise AssertionError("an unfinished answer is in no queue")

    def _collect(self) -> None:
        while self._ended:
            index = self._ended.popleft()
            stream = self._live.pop(index)
            self._queued -= len(stream.answers)
            self._finish(index, stream.output)

    def _finish(self, index: int, output: RequestOutput) -> None:
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


def _note_end(ended: deque[int], index: int, stream: Stream, delta: Delta) -> None:
    if delta.finish_reason is not None and stream.finished:
        ended.append(index)


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
