"""Turns a conversation into the text of a prompt, with the chat template that a checkpoint brings."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import CodeType
from typing import Any

import jinja2

from slipstream.errors import CheckpointError, RequestError
from slipstream.sandbox import Budget, Refused, Sandbox, Stopped

MAX_TEMPLATE_CHARS = 64 << 10


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> CodeType:
    return Sandbox(Budget(1 << 20, 2.0)).compile(template)


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    special_tokens: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    max_chars: int = 1 << 20,
    max_seconds: float = 2.0,
    **variables: Any,
) -> str:
    """The prompt for a conversation, as the checkpoint's template writes it.

    Args:
        template: jinja2 source, as transformers understands it.
        messages: dicts with "role" and "content" (text, or a list of text parts); other keys reach the template.
        special_tokens: text of bos_token, eos_token and so on, as variables of the template.
        tools: JSON schemas of the functions the model may call.
        add_generation_prompt: end with the words that begin the model's turn.
        max_chars, max_seconds: the rendering is stopped beyond these.
        variables: whatever else the template knows (`enable_thinking`, `reasoning_effort`, `documents`).

    Raises:
        RequestError: wrong messages, messages that the template refuses, or a limit reached.
        CheckpointError: the template itself is broken.
    """
    if tools is not None and not (isinstance(tools, Sequence) and all(isinstance(t, Mapping) for t in tools)):
        raise RequestError("tools must be a list of function descriptions (objects)", field="tools")
    budget = Budget(max_chars, max_seconds)
    conversation = check_messages(messages)
    given = {"documents": None, **special_tokens, **variables}
    given |= {"messages": conversation, "tools": tools, "add_generation_prompt": add_generation_prompt}
    if len(template) > MAX_TEMPLATE_CHARS:
        raise CheckpointError(f"the chat template has {len(template)} characters, more than {MAX_TEMPLATE_CHARS}")
    try:
        code = _compile(template)
    except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError, ValueError, OverflowError, Stopped) as e:
        raise CheckpointError(f"the chat template cannot be compiled: {e}") from e
    environment = Sandbox(budget)
    try:
        for name, value in given.items():
            if budget.weigh(value) > budget.max_text:
                raise RequestError(f"{name} is too long for a prompt of {max_chars} characters", field=name)
        compiled = jinja2.Template.from_code(environment, code, environment.make_globals(None))
        pieces: list[str] = []
        left = max_chars
        for piece in compiled.root_render_func(compiled.new_context(given)):
            left -= len(piece)
            if left < 0:
                raise Stopped(f"it wrote more than {max_chars} characters")
            pieces.append(piece)
        return "".join(pieces)
    except Refused as e:
        raise RequestError(f"the chat template does not accept these messages: {e}", field="messages") from e
    except (Stopped, RecursionError, MemoryError) as e:
        raise RequestError(
            f"the chat template was stopped: {e}; shorten the conversation, or do not use this template"
        ) from e
    except jinja2.TemplateError as e:
        raise CheckpointError(f"the chat template is broken, or cannot take such messages: {e}") from e
    except (
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        AssertionError,
        NameError,
        RuntimeError,
    ) as e:
        if isinstance(e, RequestError):
            raise
        raise RequestError(
            f"the chat template cannot render these messages: {type(e).__name__}: {e}", field="messages"
        ) from e


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as dicts, text parts joined to one text.

    Raises:
        RequestError: not a list of messages with a role and a content; the message's number is in the error.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise RequestError(f"messages must be a list, got {type(messages).__name__}", field="messages")
    if not messages:
        raise RequestError("messages is empty; a conversation needs at least one message", field="messages")
    return [_check_message(i, message) for i, message in enumerate(messages)]


def _check_message(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    def wrong(why: str) -> RequestError:
        return RequestError(f"messages[{index}] {why}", field="messages")

    if not isinstance(message, Mapping):
        raise wrong(f'must be an object such as {{"role": "user", "content": "Hello"}}, got {type(message).__name__}')
    if not isinstance(role := message.get("role"), str) or not role:
        raise wrong(f"needs a role such as user, assistant or system, got {role!r}")
    message = {name: value for name, value in message.items() if value is not None}  # a null is as good as left out
    content = message.get("content", "" if message.get("tool_calls") else None)
    if content is None:
        raise wrong("has no content")
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        texts = []
        for part in content:
            if (
                not isinstance(part, Mapping)
                or part.get("type", "text") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise wrong('has a content part that is not {"type": "text", "text": "..."}; only text is understood')
            texts.append(part["text"])
        return {**message, "content": "".join(texts)}
    if not isinstance(content, str):
        raise wrong(f"has a content of type {type(content).__name__}; it must be text")
    return {**message, "content": content}
