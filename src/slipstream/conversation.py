"""A conversation in, its answers out: the prompt that a model expects, and reasoning, answer and tool calls parted.

Two kinds of model are known: those whose chat template says all there is, and gpt-oss, which writes harmony.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol

from jinja2 import TemplateError, nodes

from slipstream.chat import render_chat
from slipstream.errors import CheckpointError, RequestError
from slipstream.harmony import HARMONY_TOKENS, HarmonyEvent, HarmonyParser, Kind, ToolCall, check_effort, render_harmony
from slipstream.request import RequestOutput, SamplingParams
from slipstream.sandbox import Budget, Sandbox
from slipstream.tokenizer import StopStrings, Tokenizer

if TYPE_CHECKING:
    from slipstream.engine.engine import Delta, Stream

Messages = Sequence[Mapping[str, Any]]
_NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class ChatDelta:
    """More text of answer `index`: of its reasoning, of the answer proper, or of the arguments for the tool `name`.

    `call` counts the tool calls of an answer from 0.
    """

    kind: Kind
    text: str
    index: int = 0
    name: str | None = None
    call: int = 0


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """One answer in its parts. `reasoning` is None where the model gave none."""

    content: str
    reasoning: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)

    @property
    def message(self) -> dict[str, Any]:
        """The answer as the conversation's next message."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": _as_object(call.arguments)}}
                for call in self.tool_calls
            ]
            if self.reasoning and not self.content:  # a turn that goes on after its tools goes on with its thoughts
                message["thinking"] = self.reasoning
        return message


@dataclass(slots=True)
class ChatOutput(RequestOutput):
    """What a chat gives: a RequestOutput whose `outputs` hold the text as written, and `answers` the same in parts."""

    answers: list[ChatAnswer] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The first answer, without reasoning and tool calls."""
        return self.answers[0].content

    @property
    def message(self) -> dict[str, Any]:
        """The first answer as the conversation's next message: role and content, and tool_calls if there are any."""
        return self.answers[0].message

    @property
    def reasoning(self) -> str | None:
        return self.answers[0].reasoning

    @property
    def tool_calls(self) -> list[ToolCall]:
        return self.answers[0].tool_calls


class Parser(Protocol):
    """Parts one answer as it is written. `stopped` is the stop string that ended it."""

    @property
    def stopped(self) -> str | None: ...
    def feed(self, delta: Delta) -> list[HarmonyEvent]: ...
    @property
    def answer(self) -> ChatAnswer: ...


class _Plain:
    """All is answer."""

    stopped: str | None = None

    def __init__(self) -> None:
        self._texts: list[str] = []

    def feed(self, delta: Delta) -> list[HarmonyEvent]:
        self._texts.append(delta.text)
        return [HarmonyEvent("answer", delta.text)] if delta.text else []

    @property
    def answer(self) -> ChatAnswer:
        return ChatAnswer("".join(self._texts))


class _Harmony:
    """gpt-oss: the parser, and the stop strings of the answer proper."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        special = {i: tokenizer.id_to_token(i) or "" for i in tokenizer.special_ids}
        self._special = special
        self._marks = {i: text for i, text in special.items() if text in HARMONY_TOKENS}
        self._parser = HarmonyParser(self._marks)
        self._stops = StopStrings(params.stop, params.include_stop_str_in_output)
        self._texts: list[str] = []
        self.stopped: str | None = None

    def feed(self, delta: Delta) -> list[HarmonyEvent]:
        if self.stopped is not None:
            return []
        token = _NO_TOKEN if delta.token_id is None else delta.token_id
        # A special token's text may come with the end of a character that never became whole.
        before = delta.text.removesuffix(self._special.get(token, ""))
        events = self._parser.feed(_NO_TOKEN, before) if before else []
        if token in self._marks:
            events += self._parser.feed(token, self._marks[token])
        if delta.finish_reason is not None:
            events += self._parser.finish()
        events = [e for event in events for e in self._until_stop(event)]
        if delta.finish_reason is not None and self.stopped is None and (held := self._stops.flush()):
            events.append(self._answer(held))
        return events

    def _until_stop(self, event: HarmonyEvent) -> list[HarmonyEvent]:
        if event.kind != "answer":
            return [event]
        if self.stopped is not None:
            return []
        text, self.stopped = self._stops.feed(event.text)
        return [self._answer(text)] if text else []

    def _answer(self, text: str) -> HarmonyEvent:
        self._texts.append(text)
        return HarmonyEvent("answer", text)

    @property
    def answer(self) -> ChatAnswer:
        result = self._parser.result
        return ChatAnswer("".join(self._texts), result.reasoning or None, result.tool_calls)


@dataclass(eq=False)
class ChatStream:
    """The answers of a chat as they are written: iterate for `ChatDelta`s; `output` is what there is so far."""

    stream: Stream
    parsers: list[Parser]

    def __iter__(self) -> Iterator[ChatDelta]:
        for delta in self.stream:
            yield from self.feed(delta)

    def feed(self, delta: Delta) -> list[ChatDelta]:
        """What one delta of the stream adds. An answer in which a stop string stands is ended."""
        parser = self.parsers[delta.index]
        events = parser.feed(delta)
        if parser.stopped is not None:
            completion = self.stream.output.outputs[delta.index]
            self.stream.engine.end(self.stream.answers[delta.index], "stop")
            completion.stop_reason = parser.stopped
        return [ChatDelta(e.kind, e.text, delta.index, e.name, e.index if e.kind == "tool_call" else 0) for e in events]

    @property
    def output(self) -> ChatOutput:
        values = {f.name: getattr(self.stream.output, f.name) for f in fields(RequestOutput)}
        return ChatOutput(**values, answers=[p.answer for p in self.parsers])

    def result(self) -> ChatOutput:
        """Run to the end."""
        for _ in self:
            pass
        return self.output

    def cancel(self) -> None:
        """End what is unfinished with `abort`; the answer so far stays."""
        self.stream.cancel()
        for _ in self:
            pass


def open_parsers(tokenizer: Tokenizer, params: SamplingParams, *, harmony: bool) -> list[Parser]:
    """One parser for each answer."""
    return [_Harmony(tokenizer, params) if harmony else _Plain() for _ in range(params.n)]


def engine_params(tokenizer: Tokenizer, params: SamplingParams, *, harmony: bool) -> SamplingParams:
    """The parameters as the engine is to see them."""
    if not harmony:
        return params
    # A turn ends with <|return|>, or with <|call|> when a tool is to run, whatever generation_config.json says. Stop
    # strings are looked for in the answer alone, so by the parser.
    ends = [t for t in map(tokenizer.token_to_id, ("<|return|>", "<|call|>")) if t is not None]
    stop_token_ids = params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *ends)
    return params.replace(
        stop=(), include_stop_str_in_output=False, stop_token_ids=stop_token_ids, skip_special_tokens=False
    )


def render_prompt(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    harmony: bool,
    reasoning_effort: str | None,
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
) -> str:
    """The text of the prompt. What the model's format has no place for is an error, never dropped.

    Raises:
        RequestError: the messages are not valid, there is no template, or it does not know one of the options.
        CheckpointError: the template is broken.
    """
    asked = {**variables, "tools": tools, "reasoning_effort": reasoning_effort}
    asked = {name: value for name, value in asked.items() if value is not None}
    if harmony and reasoning_effort is not None:
        check_effort(reasoning_effort)
    if template := tokenizer.chat_template:
        if asked:
            _check_known(asked, _names(template), "this model's chat template has no use for it")
        for name in asked.keys() & {"template", "messages", "special_tokens", "max_chars", "max_seconds"}:
            raise RequestError(f"{name}: is not a variable that a caller may set", field=name)
        return render_chat(
            template,
            messages,
            special_tokens=tokenizer.special_tokens,
            add_generation_prompt=add_generation_prompt,
            **asked,
        )
    if not harmony:
        raise RequestError("this model has no chat template, so it cannot chat; it can continue a text with generate")
    known = frozenset({"tools", "reasoning_effort", "current_date", "model_identity"})
    _check_known(asked, known, "harmony has no place for it")
    return render_harmony(messages, add_generation_prompt=add_generation_prompt, **asked)


def _check_known(asked: Mapping[str, Any], known: frozenset[str], why: str) -> None:
    for name in asked:
        if name not in known:
            raise RequestError(f"{name}: {why}, so it would change nothing; leave it out", field=name)


@functools.lru_cache(maxsize=16)
def _names(template: str) -> frozenset[str]:
    """The variables that a template reads."""
    try:
        tree = Sandbox(Budget(1 << 20, 2.0)).parse(template)
    except (TemplateError, RecursionError) as e:
        raise CheckpointError(f"the chat template cannot be compiled: {e}") from e
    return frozenset(node.name for node in tree.find_all(nodes.Name) if node.ctx == "load")


def _as_object(arguments: str) -> Any:
    """Templates write arguments as JSON, so they are to have them as objects; what is no JSON stays text."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments
