"""gpt-oss's response format, harmony: the prompt of a conversation, and parting reasoning, answer and tool calls.

A message is `<|start|>ROLE[ to=RECIPIENT]<|channel|>CHANNEL[ to=RECIPIENT][<|constrain|>TYPE]<|message|>TEXT` and ends
with `<|end|>`, `<|call|>` (a tool is to run) or `<|return|>` (the turn is over). The format is described at
https://cookbook.openai.com/articles/openai-harmony.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Literal

from slipstream.chat import check_messages
from slipstream.errors import RequestError

HARMONY_TOKENS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>")
REASONING_EFFORTS = ("low", "medium", "high")
_MAX_HEADER = 400  # characters; a header that goes on longer is text
_MAX_DEPTH = 16  # of a tool's schema
_IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."

Kind = Literal["reasoning", "answer", "tool_call"]


@dataclass(frozen=True, slots=True)
class HarmonyEvent:
    """More text of one message. `name` is the tool's; `index` counts the messages of this kind from 0."""

    kind: Kind
    text: str
    name: str | None = None
    index: int = 0


@dataclass(slots=True)
class ToolCall:
    """A tool the model wants to run, and its arguments as the model wrote them (JSON, if it kept to it)."""

    name: str
    arguments: str = ""


@dataclass(slots=True)
class HarmonyResult:
    """The whole answer so far, in its three parts."""

    reasoning: str = ""
    answer: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)


class HarmonyParser:
    """Parts the tokens that follow `<|start|>assistant` as they come.

    It takes whatever a model writes: a missing `<|end|>` ends with the next header, and what cannot be read as a
    message is part of the answer. The texts of the events of one kind, in order, are that part of `result`.
    """

    def __init__(self, special: Mapping[int, str]) -> None:
        """`special`: token id -> text, for the tokens in HARMONY_TOKENS."""
        self._special = {i: text for i, text in special.items() if text in HARMONY_TOKENS}
        self._header: list[str] | None = [""]  # texts of role, channel, type; None inside a message
        self._open = False  # the header began with a special token, so it cannot be plain text
        self._kind: Kind = "answer"
        self._counts: dict[Kind, int] = {"reasoning": 0, "answer": 0, "tool_call": 0}
        self._text: dict[Kind, list[str]] = {"reasoning": [], "answer": []}
        self._calls: list[tuple[str, list[str]]] = []
        self._separate = False  # the next text begins a second message of its kind

    def feed(self, token_id: int, text: str) -> list[HarmonyEvent]:
        """Take one token and the text it made certain; gives what became known of the messages."""
        mark = self._special.get(token_id)
        if mark is None:
            return self._on_text(text)
        if mark == "<|message|>":
            return self._begin() if self._header is not None else []
        if mark == "<|constrain|>":
            if self._header is not None:
                self._header.append(" ")
            return []
        if mark == "<|channel|>" and self._header is not None:
            self._header.append("")
            self._open = True
            return []
        events = self._flush()
        self._header = ["", ""] if mark == "<|channel|>" else [""]
        self._open = mark in ("<|start|>", "<|channel|>")
        return events

    def finish(self) -> list[HarmonyEvent]:
        """The end of the tokens: a header that never became a message is given as text."""
        return self._flush()

    @property
    def result(self) -> HarmonyResult:
        calls = [ToolCall(name, "".join(parts)) for name, parts in self._calls]
        return HarmonyResult("".join(self._text["reasoning"]), "".join(self._text["answer"]), calls)

    def _on_text(self, text: str) -> list[HarmonyEvent]:
        if self._header is None:
            return self._emit(text)
        self._header[-1] += text
        size = sum(map(len, self._header))
        if size > _MAX_HEADER or not (self._open or _may_be_role(self._header[0])):
            return self._flush(stay=True)
        return []

    def _begin(self) -> list[HarmonyEvent]:
        header = self._header or [""]
        self._header = None
        words = " ".join(header[1:]).split()
        recipient = re.search(r"(?:^|\s)to=(\S+)", " ".join(header))
        if recipient and recipient[1] not in ("assistant", "user", "all"):
            name = recipient[1].removeprefix("functions.")
            self._kind = "tool_call"
            self._calls.append((name, []))
            self._counts["tool_call"] += 1
            return [HarmonyEvent("tool_call", "", name, len(self._calls) - 1)]
        self._start("reasoning" if words[:1] == ["analysis"] else "answer")
        return []

    def _start(self, kind: Kind) -> None:
        self._kind = kind
        self._counts[kind] += 1
        self._separate = bool(self._text[kind])

    def _emit(self, text: str) -> list[HarmonyEvent]:
        if not text:
            return []
        index = self._counts[self._kind] - 1
        if self._kind == "tool_call":
            name, parts = self._calls[-1]
            parts.append(text)
            return [HarmonyEvent("tool_call", text, name, index)]
        if self._separate:
            self._separate = False
            text = "\n\n" + text
        self._text[self._kind].append(text)
        return [HarmonyEvent(self._kind, text, None, index)]

    def _flush(self, stay: bool = False) -> list[HarmonyEvent]:
        """Give a header that is none as answer text; with `stay`, what follows belongs to it."""
        header, self._header = self._header, None if stay else [""]
        text = " ".join(header or [])
        if self._open:  # what names the role or the channel is no text
            text = re.sub(r"^\s*(assistant\b\s*)?((analysis|commentary|final)\b\s*)?", "", text)
        self._open = False
        if not text.strip() and not stay:
            return []
        self._start("answer")
        return self._emit(text)


def _may_be_role(text: str) -> bool:
    """Whether text outside of a message can still become `assistant to=...` before its `<|channel|>`."""
    rest = text.lstrip()
    if "assistant".startswith(rest):
        return True
    rest = rest.removeprefix("assistant").lstrip()
    return "to=".startswith(rest) or (rest.startswith("to=") and len(rest.split()) == 1)


def render_harmony(
    messages: Sequence[Mapping[str, Any]],
    *,
    reasoning_effort: str = "medium",
    tools: Sequence[Mapping[str, Any]] | None = None,
    current_date: str | None = None,
    model_identity: str = _IDENTITY,
    add_generation_prompt: bool = True,
) -> str:
    """The prompt of a conversation, for a gpt-oss checkpoint that brings no chat template.

    Args:
        messages: as for `render_chat`; reasoning of an assistant stands in "thinking" or "reasoning_content".
        reasoning_effort: "low", "medium" or "high".
        tools: the functions the model may call, as OpenAI's API describes them.
        current_date: such as "2025-06-28"; None is today.

    Raises:
        RequestError: an unknown effort or role, wrong messages or tools, or a tool's result without its call.
    """
    check_effort(reasoning_effort)
    conversation = check_messages(messages)
    system = [
        f"{model_identity}\nKnowledge cutoff: 2024-06\nCurrent date: {current_date or date.today().isoformat()}",
        f"Reasoning: {reasoning_effort}",
        "# Valid channels: analysis, commentary, final. Channel must be included for every message.",
    ]
    if tools:
        system[-1] += "\nCalls to these tools must go to the commentary channel: 'functions'."
    first = next((i for i, m in enumerate(conversation) if m["role"] not in ("system", "developer")), len(conversation))
    developer = [f"# Instructions\n\n{m['content']}" for m in conversation[:first] if m["content"]]
    if tools:
        developer.append(f"# Tools\n\n## functions\n\n{_namespace(tools)}")
    out = [_message("system", "\n\n".join(system))]
    if developer:
        out.append(_message("developer", "\n\n".join(developer)))
    out += _turns(conversation, first)
    return "".join(out) + ("<|start|>assistant" if add_generation_prompt else "")


def check_effort(reasoning_effort: str) -> None:
    """Raises RequestError unless the effort is one that gpt-oss knows."""
    if reasoning_effort not in REASONING_EFFORTS:
        known = ", ".join(REASONING_EFFORTS)
        raise RequestError(
            f"reasoning_effort: must be one of {known}, got {reasoning_effort!r}", field="reasoning_effort"
        )


def _message(header: str, text: str, end: str = "<|end|>") -> str:
    return f"<|start|>{header}<|message|>{text}{end}"


def _turns(conversation: list[dict[str, Any]], first: int) -> list[str]:
    out = []
    names: dict[Any, str] = {}  # of the tools called, by the call's id; under None the last one
    answered = max(
        (i for i, m in enumerate(conversation) if m["role"] == "assistant" and not m.get("tool_calls")), default=-1
    )
    for i, message in enumerate(conversation[first:], first):
        role, content = message["role"], message["content"]
        if role == "user":
            out.append(_message("user", content))
        elif role in ("system", "developer"):
            out.append(_message("developer", f"# Instructions\n\n{content}"))
        elif role == "tool":
            name = names.get(message.get("tool_call_id")) or message.get("name") or names.get(None)
            if not name:
                raise RequestError(
                    f"messages[{i}] is the result of a tool that was not called before it", field="messages"
                )
            out.append(_message(f"functions.{name} to=assistant<|channel|>commentary", content))
        elif role == "assistant" and message.get("tool_calls"):
            thinking = message.get("thinking") or message.get("reasoning_content")
            if thinking and i > answered:  # the reasoning of a turn that is over is dropped, as in training
                out.append(_message("assistant<|channel|>analysis", thinking))
            if content:
                out.append(_message("assistant<|channel|>commentary", content))
            for name, arguments, call_id in _calls(i, message["tool_calls"]):
                names[call_id] = names[None] = name
                header = f"assistant<|channel|>commentary to=functions.{name} <|constrain|>json"
                out.append(_message(header, arguments, "<|call|>"))
        elif role == "assistant":
            out.append(_message("assistant<|channel|>final", content))
        else:
            raise RequestError(
                f"messages[{i}] has the role {role!r}; known are system, developer, user, assistant and tool",
                field="messages",
            )
    return out


def _calls(index: int, calls: Any) -> list[tuple[str, str, Any]]:
    found = []
    for call in calls if isinstance(calls, Sequence) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name := function.get("name"), str):
            raise RequestError(f"messages[{index}] has a tool call without the name of a function", field="messages")
        arguments = function.get("arguments") or {}
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        found.append((name, text, call.get("id")))
    return found


def _namespace(tools: Sequence[Mapping[str, Any]]) -> str:
    """The tools as TypeScript declarations, which is how the model was shown them."""
    lines = ["namespace functions {", ""]
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name := function.get("name"), str):
            raise RequestError(f"tools[{i}] needs a function with a name", field="tools")
        lines += _comment(function.get("description"))
        schema = function.get("parameters")
        given = isinstance(schema, Mapping) and schema.get("properties")
        lines += [f"type {name} = (_: {_type(schema)}) => any;" if given else f"type {name} = () => any;", ""]
    return "\n".join([*lines, "} // namespace functions"])


def _comment(text: Any) -> list[str]:
    return [f"// {line}" for line in str(text).splitlines()] if text else []


def _type(schema: Any, depth: int = 0) -> str:
    """A JSON schema as a TypeScript type; what has no such type is `any`."""
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return "any"
    kind = schema.get("type")
    options = schema.get("oneOf") or schema.get("anyOf")
    if isinstance(options, list):
        text = " | ".join(_type(option, depth + 1) for option in options)
    elif isinstance(kind, list):
        text = " | ".join(_type({**schema, "type": k}, depth + 1) for k in kind)
    elif isinstance(schema.get("enum"), list):
        text = " | ".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
    elif kind == "array":
        item = _type(schema["items"], depth + 1) if "items" in schema else "any"
        text = f"({item})[]" if " | " in item else f"{item}[]"
    elif kind == "object" and isinstance(schema.get("properties"), Mapping):
        text = _object(schema, depth)
    else:
        text = _PLAIN.get(kind, "any") if isinstance(kind, str) else "any"
    return f"{text} | null" if schema.get("nullable") is True else text


_PLAIN = {k: k for k in ("string", "number", "boolean", "null", "object")} | {"integer": "number"}


def _object(schema: Mapping[str, Any], depth: int) -> str:
    required = schema.get("required")
    required = required if isinstance(required, list) else []
    lines = ["{"]
    for name, value in schema["properties"].items():
        default = ""
        if isinstance(value, Mapping):
            lines += _comment(value.get("description"))
            if "default" in value:
                plain = value["default"] if "enum" in value else json.dumps(value["default"], ensure_ascii=False)
                default = f" // default: {plain}"
        lines.append(f"{name}{'' if name in required else '?'}: {_type(value, depth + 1)},{default}")
    return "\n".join([*lines, "}"])
