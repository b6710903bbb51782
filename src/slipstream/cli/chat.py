"""`slipstream chat`: a conversation. Ctrl-C stops an answer, Ctrl-D the program."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from slipstream.cli.options import AsJson, EngineOptions, Model, ReasoningEffort, SamplingOptions, System, flat
from slipstream.cli.show import note, print_json
from slipstream.cli.stream import note_late, print_stream
from slipstream.errors import RequestError, SlipstreamError

if TYPE_CHECKING:
    from slipstream.conversation import ChatDelta, ChatStream
    from slipstream.llm import LLM
    from slipstream.request import SamplingParams

_HELP = """\
/clear   forget the conversation
/exit    leave; so does Ctrl-D
/help    these lines
Ctrl-C   stop the answer; what is there of it stays in the conversation"""


@flat
def chat(
    model: Model,
    sampling: SamplingOptions,
    engine: EngineOptions,
    system: System = None,
    reasoning_effort: ReasoningEffort = None,
    as_json: AsJson = False,
) -> None:
    """Talk with a model.

    Ctrl-C stops an answer, Ctrl-D or /exit leaves, /clear forgets the conversation, /help says so. In a pipe, each line
    is a turn. What gpt-oss thinks is shown on a terminal, before the answer. With --json, each answer is one line of
    JSON, with the reasoning.
    """
    changes = {"max_new_tokens": None} | sampling.changes()

    from slipstream.cli.load import load_llm

    llm = load_llm(model, engine)
    conversation = Conversation(llm, llm.default_params.replace(**changes), system, reasoning_effort, as_json)
    interactive = sys.stdin.isatty()
    if interactive:
        note("Ctrl-C stops an answer, Ctrl-D leaves, /help lists what else there is.")
    for line in _lines(interactive, to_stdout=sys.stdout.isatty() and not as_json):
        try:
            if not conversation.command(line):
                conversation.turn(line)
        except SlipstreamError as e:
            if not interactive:
                raise
            note(f"error: {e}")
        except KeyboardInterrupt:  # the second one, which does not wait for a token: this turn is not kept
            if not interactive:
                raise
            note("\nStopped.")


class Conversation:
    """The messages so far, and how the next one is answered."""

    def __init__(
        self, llm: LLM, params: SamplingParams, system: str | None, reasoning_effort: str | None, as_json: bool
    ) -> None:
        self._llm, self._params, self._effort, self._as_json = llm, params, reasoning_effort, as_json
        self._start = [{"role": "system", "content": system}] if system is not None else []
        self.messages: list[dict[str, Any]] = list(self._start)

    def command(self, line: str) -> bool:
        """Do what a line that begins with a slash says; whether it was such a line."""
        word = line.strip()
        if not word.startswith("/") or " " in word or word.count("/") > 1:
            return not word  # an empty line is nothing to answer
        if word == "/clear":
            self.messages = list(self._start)
            note("The conversation is forgotten.")
        elif word == "/help":
            note(_HELP)
        else:
            raise RequestError(f"{word}: there is no such command; there are /clear, /exit and /help")
        return True

    def turn(self, text: str) -> None:
        """Answer. A message that cannot be answered is not kept."""
        messages = [*self.messages, {"role": "user", "content": text}]
        stream = self._llm.submit_chat(messages, self._params, reasoning_effort=self._effort)
        with _stop_at_interrupt() as stopped:
            deltas = _until(stream, stopped)
            if self._as_json:
                for _ in deltas:
                    pass
            else:
                print_stream(deltas)
        output = stream.output
        completion = output.outputs[0]
        if completion.finish_reason != "error":
            self.messages = [*messages, output.message]
        if self._as_json:
            from slipstream.cli.load import usage

            answer = output.answers[0]
            print_json(
                {
                    **output.message,
                    "reasoning": answer.reasoning,
                    "finish_reason": completion.finish_reason,
                    "stop_reason": completion.stop_reason,
                    "usage": usage(self._llm, output),
                }
            )
        note_late(output, self._params.deadline)
        if completion.finish_reason == "error":
            raise SlipstreamError(f"the answer broke off: {completion.error}")


def _until(stream: ChatStream, stopped: Callable[[], bool]) -> Iterator[ChatDelta]:
    """The stream, ended after the token during which Ctrl-C came."""
    try:
        for delta in stream:
            yield delta
            if stopped():
                break
    finally:
        stream.cancel()


@contextlib.contextmanager
def _stop_at_interrupt() -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C is noted, to keep the answer up to its last token; the second cuts it off at once."""
    noted = threading.Event()

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()

    if threading.current_thread() is not threading.main_thread():
        yield noted.is_set
        return
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield noted.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _lines(interactive: bool, *, to_stdout: bool) -> Iterator[str]:
    """What the user says, line by line, until the end of input or /exit."""
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  it gives input() editing and history
    while True:
        try:
            if not interactive:
                line = _read_line()
            elif to_stdout:
                line = input("> ")
            else:  # standard output is for the answers alone
                sys.stderr.write("> ")
                sys.stderr.flush()
                line = input()
        except EOFError:
            if interactive:
                note("")
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            note("\n(Ctrl-D or /exit leaves)")
            continue
        except UnicodeDecodeError:
            note("error: the line is not UTF-8")
            continue
        if line.strip() == "/exit":
            return
        yield line


def _read_line() -> str:
    raw = sys.stdin.buffer.readline()
    if not raw:
        raise EOFError
    try:
        return raw.decode().rstrip("\r\n")
    except UnicodeDecodeError as e:
        raise RequestError("standard input is not UTF-8; convert it first, such as with iconv") from e
