"""The same model for asyncio: one thread runs the engine, any number of tasks wait for their own answers.

The event loop never waits for the engine's lock. What tasks want of the engine goes through an inbox that the thread empties
between two steps; what the engine writes comes back through `loop.call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from slipstream.errors import RequestError
from slipstream.llm import LLM, Prompt
from slipstream.request import Request, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from slipstream.conversation import ChatDelta, ChatOutput, ChatStream, Messages, Parser
    from slipstream.engine.engine import Delta, Stream
    from slipstream.engine.snapshot import Snapshot

D = TypeVar("D")  # what iterating gives
R = TypeVar("R", bound=RequestOutput)
T = TypeVar("T")
_CLOSED = "this AsyncLLM is closed; make a new one, which may take the same LLM"


class AsyncLLM:
    """A model ready to answer many tasks at once.

    Use it in `async with`, or close it. Tasks of several event loops may share one.

    Args:
        model: what `LLM` takes, or an `LLM`, which others may go on using. Loading blocks; in a loop that has other work
            use `await asyncio.to_thread(AsyncLLM, ...)`.
        options: as for `LLM`.

    >>> async with AsyncLLM("smollm2-135m-instruct") as llm:
    ...     async for delta in llm.stream("The tide"):
    ...         print(delta.text, end="")
    """

    def __init__(self, model: str | os.PathLike[str] | LLM, **options: Any) -> None:
        if isinstance(model, LLM) and options:
            raise RequestError(f"{next(iter(options))}: this LLM is loaded already; give options where it is made")
        self.llm = model if isinstance(model, LLM) else LLM(model, **options)
        self._wake = threading.Condition()
        self._inbox: list[Callable[[], object]] = []
        self._closed = False
        self._live: set[AsyncStream[Any, Any]] = set()  # the thread's own
        self._thread = threading.Thread(target=self._run, name="slipstream-engine", daemon=True)
        self._thread.start()
        atexit.register(self._stop)  # a thread of torch's that is cut off in a step may end the process badly

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncStream[Delta, RequestOutput]:
        """The answers to one prompt as they are written: `async for` gives `Delta`s. See AsyncStream.

        Nothing is queued before the first step of the loop, which also raises what `LLM.submit` would.
        """
        return AsyncStream(self, lambda: (self.llm.make_request(prompt, params), None))

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> RequestOutput:
        """Continue one prompt. Cancelling the task cancels the request.

        A request that fails while it runs ends in `error`, with the message in `output.outputs[0].error`.

        Raises:
            RequestError, CapacityError: it cannot be served.
        """
        return await self.stream(prompt, params).result()

    def stream_chat(
        self, messages: Messages, params: SamplingParams | None = None, **options: Any
    ) -> AsyncStream[ChatDelta, ChatOutput]:
        """The answer to a conversation as it is written: `async for` gives `ChatDelta`s. `options` are those of
        LLM.submit_chat."""
        return AsyncStream(self, lambda: self.llm.make_chat_request(messages, params, **options))

    async def chat(self, messages: Messages, params: SamplingParams | None = None, **options: Any) -> ChatOutput:
        """Answer a conversation. `options` are those of LLM.submit_chat."""
        return await self.stream_chat(messages, params, **options).result()

    def cancel(self, stream: AsyncStream[Any, Any]) -> None:
        """End what is unfinished of a request with `abort`, from any task or thread; the answer so far stays."""
        stream.cancel()

    async def snapshot(self) -> Snapshot:
        """What the engine is doing: its queue, pages, counts and speed."""
        loop = asyncio.get_running_loop()
        found: asyncio.Future[Snapshot] = loop.create_future()

        def answer(snapshot: Snapshot) -> None:
            if not found.done():
                found.set_result(snapshot)

        if not self._post(lambda: _call(loop, answer, self.llm.snapshot())):
            return self.llm.snapshot()
        return await found

    async def close(self) -> None:
        """End what is under way with `abort` and stop the thread. The LLM itself stays usable."""
        await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()
        atexit.unregister(self._stop)

    def _post(self, work: Callable[[], object]) -> bool:
        """Have the thread do something between two steps. False: it has been told to stop, and will not."""
        with self._wake:
            if not self._closed:
                self._inbox.append(work)
                self._wake.notify()
            return not self._closed

    def _run(self) -> None:
        """The thread: steps while there is something to do, sleeps otherwise."""
        busy = False
        while True:
            with self._wake:
                while not (busy or self._inbox or self._closed):
                    self._wake.wait()
                inbox, self._inbox = self._inbox, []
                closed = self._closed
            for work in inbox:
                work()
            if closed:
                for stream in [*self._live]:
                    stream._end()
                return
            try:
                busy = self.llm.engine.step()
            except Exception:  # the engine has ended those that were in the pass, and their results say why
                busy = True


class AsyncStream(Generic[D, R]):
    """The answers to one request as they are written: iterate once with `async for`, or await `result()`.

    Leaving the loop early, or cancelling the task that is in it, cancels the request.
    """

    def __init__(self, owner: AsyncLLM, make: Callable[[], tuple[Request, list[Parser] | None]]) -> None:
        self._owner, self._make = owner, make
        self._begun = self._cancelled = False
        # From here on the engine's side: only touched where its lock is held, or in its thread.
        self._stream: Stream | None = None
        self._chat: ChatStream | None = None
        self._unread: deque[Delta] = deque()
        self._reading = False

    @property
    def output(self) -> R:
        """What there is so far.

        Raises:
            RequestError: nothing has been queued yet.
        """
        if self._stream is None:
            raise RequestError("this request has not begun; iterate it first, or await result()")
        return cast(R, self._stream.output if self._chat is None else self._chat.output)

    async def result(self) -> R:
        """Run to the end."""
        async for _ in self:
            pass
        return self.output

    def cancel(self) -> None:
        """End what is unfinished with `abort`; who iterates sees the end. May be called from any task or thread."""
        self._cancelled = True
        self._owner._post(self._end)

    async def __aiter__(self) -> AsyncIterator[D]:
        if self._begun:
            raise RequestError("this request has been iterated already; its answer is in `output`")
        self._begun = True
        request, parsers = await asyncio.to_thread(self._make)  # tokenizing a long prompt takes a while
        loop = asyncio.get_running_loop()
        mail: asyncio.Queue[tuple[list[D], bool] | Exception] = asyncio.Queue()

        def send(item: tuple[list[D], bool] | Exception) -> None:
            if not _call(loop, mail.put_nowait, item):
                self._owner._post(self._end)  # nobody waits for it any more

        if not self._owner._post(lambda: self._submit(request, parsers, send)):
            raise RequestError(_CLOSED)
        left = request.params.n
        try:
            while left:
                item = await mail.get()
                if isinstance(item, Exception):
                    raise item
                deltas, ended = item
                left -= ended
                for delta in deltas:
                    yield delta
        finally:
            self.cancel()

    def _submit(self, request: Request, parsers: list[Parser] | None, send: Callable[[Any], None]) -> None:
        def deliver(stream: Stream, delta: Delta) -> None:
            self._stream = stream
            self._unread.append(delta)
            if self._reading:
                return  # reading ended the answer, and this is its end: it has to come after what is being read
            self._reading = True
            try:
                while self._unread:
                    delta = self._unread.popleft()
                    send((self._read(stream, parsers, delta), delta.finish_reason is not None))
            except Exception as e:  # raised again where it is awaited; the engine is to go on
                send(e)
                self._owner._post(self._end)
            finally:
                self._reading = False

        try:
            stream = self._owner.llm.engine.submit(request, deliver)
        except Exception as e:  # raised again where it is awaited
            send(e)
            return
        self._stream = stream
        self._owner._live.add(self)
        if self._cancelled:
            self._end()

    def _read(self, stream: Stream, parsers: list[Parser] | None, delta: Delta) -> list[Any]:
        if parsers is None:
            return [delta]
        from slipstream.conversation import ChatStream

        if self._chat is None:
            self._chat = ChatStream(stream, parsers)
        return self._chat.feed(delta)

    def _end(self) -> None:
        if self._stream is not None:
            self._stream.cancel()
            self._owner._live.discard(self)


def _call(loop: asyncio.AbstractEventLoop, do: Callable[[T], object], value: T) -> bool:
    """Have a loop call something. False: it is closed."""
    try:
        loop.call_soon_threadsafe(do, value)
    except RuntimeError:
        return False
    return True
