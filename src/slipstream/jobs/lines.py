"""The file of requests: its lines, and what each asks for. OpenAI's batch format, or plain objects with a prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from slipstream.errors import RequestError

MAX_LINE = 16 << 20  # bytes; bounds what one line can take of the memory
Kind = Literal["chat", "completions", "plain"]

_URLS: dict[str, Kind] = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
_CHAT_OPTIONS = ("tools", "reasoning_effort")
# Fields of OpenAI's that are taken where they say what is done anyway. Any other value is an error.
_AS_IT_IS: dict[str, tuple[Any, ...]] = {
    "stream": (False,), "echo": (False,), "best_of": (1,), "store": (False,), "response_format": ({"type": "text"},),
    "tool_choice": ("auto",), "parallel_tool_calls": (True,), "service_tier": ("auto", "default"),
}  # fmt: skip


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Input:
    """A file of requests that has been looked through once.

    Attributes:
        lines: how many there are, blank ones left out.
        model: the first model that a line names. All lines are to name this one, or none.
        kind: of the first line that can be read. What cannot be read is answered in its format.
        any_model: `model` was chosen to answer all, whatever they name.
    """

    path: Path
    sha256: str
    lines: int
    model: str | None
    kind: Kind
    any_model: bool = False


@dataclass(slots=True)
class Line:
    """One line as it was read. `error` says why it cannot be understood; `number` counts all lines of the file from 1."""

    number: int
    kind: Kind
    id: str | int | None = None
    value: dict[str, Any] = field(default_factory=dict)
    error: RequestError | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """What a line asks for. One of `prompt` and `messages` is there; `options` are those of `LLM.submit_chat`."""

    prompt: Any
    messages: Any
    changes: dict[str, Any]
    options: dict[str, Any]


def wrong(name: str, message: str) -> RequestError:
    return RequestError(f"{name}: {message}", field=name)


def read_input(path: str | Path) -> Input:
    """Look through the whole file: its hash, how many lines it has, and that no two have the same id.

    Takes about 100 bytes of memory a line for as long as it runs.

    Raises:
        RequestError: it cannot be read or has no lines, or two lines have the same id.
    """
    path = Path(path).absolute()
    digest = hashlib.sha256()
    seen: set[bytes] = set()
    count, model = 0, None
    kind: Kind | None = None
    try:
        if path.exists() and not path.is_file():
            raise RequestError(f"in: {path} is not a file; a job reads its input twice, so it takes no pipe or folder")
        for number, raw in raw_lines(path, digest):
            count += 1
            line = parse_line(number, raw)
            if kind is None and line.value:
                kind = line.kind
            if model is None and line.kind != "plain":
                model = named_model(line)
            if line.id is None:
                continue
            key = _key(line.id)
            if key in seen:
                raise RequestError(
                    f"in: lines {_first(path, key)} and {number} of {path} both have the id {line.id!r}; "
                    "give each line an id of its own"
                )
            seen.add(key)
    except OSError as e:
        raise RequestError(f"in: {path} cannot be read: {e.strerror or e}; check the path") from e
    if not count:
        raise RequestError(f"in: {path} has no lines; write one request a line, such as " + '{"prompt": "The tide"}')
    return Input(path, digest.hexdigest(), count, model, kind or "plain")


def raw_lines(path: Path, digest: _Digest) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line that is not blank, at most MAX_LINE + 1 of them. `digest` gets every byte."""
    with path.open("rb") as file:
        number = 0
        while piece := file.readline(MAX_LINE + 1):
            number += 1
            digest.update(piece)
            rest = piece
            while len(rest) > MAX_LINE and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE + 1)
                digest.update(rest)
            if piece.strip():
                yield number, piece


def parse_line(number: int, raw: bytes, kind: Kind = "plain") -> Line:
    """What can be known of a line without a model; of `kind` if it says nothing. Never raises for what stands in it."""
    line = Line(number, kind)
    try:
        line.value = _load(raw)
        openai = not line.value.keys().isdisjoint(("body", "url", "method"))
        line.kind = _openai_kind(line.value) if openai else "plain"
        line.id = _id(line.value, openai=openai)
    except RequestError as e:
        line.error = e
    return line


def named_model(line: Line) -> str | None:
    """The model that a line of OpenAI's format names."""
    body = line.value.get("body")
    model = body.get("model") if isinstance(body, Mapping) else None
    return model if isinstance(model, str) else None


def _load(raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_LINE:
        raise RequestError(f"the line is longer than {MAX_LINE >> 20} MiB")
    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_no_twins)
        if b"\\u" in raw:  # only so can half a character have come in
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        raise RequestError("the line holds half of a surrogate pair; it is not valid Unicode") from e
    except UnicodeDecodeError as e:
        raise RequestError(f"the line is not UTF-8 at byte {e.start}") from e
    except (ValueError, RecursionError) as e:
        if isinstance(e, RequestError):
            raise
        raise RequestError(f"the line is not JSON: {e}") from e
    if not isinstance(value, dict):
        raise RequestError(f"the line must be a JSON object, got {type(value).__name__}")
    return value


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        name = next(n for i, (n, _) in enumerate(pairs) if n in dict(pairs[:i]))
        raise wrong(name, "stands twice in one object; leave one out")
    return value


def _openai_kind(value: Mapping[str, Any]) -> Kind:
    url, body = value.get("url"), value.get("body")
    if url is None:
        return "chat" if isinstance(body, Mapping) and "messages" in body else "completions"
    return _URLS.get(url, "completions") if isinstance(url, str) else "completions"


def _id(value: Mapping[str, Any], *, openai: bool) -> str | int | None:
    given = [name for name in ("custom_id", "id") if value.get(name) is not None]
    if len(given) > 1:
        raise wrong("id", "there is a custom_id too; give one of the two")
    if not given:
        if openai:
            raise wrong("custom_id", "is missing; each line of a batch needs one of its own")
        return None
    found: object = value[given[0]]
    if isinstance(found, str) or (type(found) is int and not openai):
        return found
    raise wrong(given[0], f"must be a string, got {type(found).__name__}")


def _key(name: str | int) -> bytes:
    return hashlib.blake2b(json.dumps(name).encode(), digest_size=16).digest()


def _first(path: Path, key: bytes) -> int:
    """The number of the first line with this id."""
    lines = (parse_line(number, raw) for number, raw in raw_lines(path, hashlib.sha256()))
    return next(line.number for line in lines if line.id is not None and _key(line.id) == key)


def read_task(line: Line, model: str | None) -> Task:
    """What the line asks for.

    Args:
        model: the one that lines may name; None lets them name any.

    Raises:
        RequestError: it cannot be understood, or asks for something that is not there; `.field` names it.
    """
    if line.error is not None:
        raise line.error
    if line.kind == "plain":
        return _plain_task({n: v for n, v in line.value.items() if n not in ("id", "custom_id")})
    value = line.value
    for name in value.keys() - {"custom_id", "method", "url", "body"}:
        raise wrong(name, "is not a field of a batch line; known are custom_id, method, url, body")
    if value.get("method", "POST") != "POST":
        raise wrong("method", f"must be POST, got {value['method']!r}")
    if (url := value.get("url")) is not None and (not isinstance(url, str) or url not in _URLS):
        raise wrong("url", f"must be one of {', '.join(_URLS)}, got {url!r}")
    if not isinstance(value.get("body"), dict):
        raise wrong("body", "must be an object with what is asked for")
    return _openai_task({n: v for n, v in value["body"].items() if v is not None}, line.kind, model)


def _plain_task(value: dict[str, Any]) -> Task:
    if ("prompt" in value) == ("messages" in value):
        raise wrong("prompt", "a line needs a prompt or messages, one of the two")
    options = {name: value.pop(name) for name in _CHAT_OPTIONS if name in value and "messages" in value}
    return Task(value.pop("prompt", None), value.pop("messages", None), _sampling(value), options)


def _openai_task(body: dict[str, Any], kind: Kind, model: str | None) -> Task:
    named = body.pop("model", model)
    if model is not None and named != model:
        hint = "one job runs one model, and --model lets one answer all"
        raise wrong("model", f"must be {model!r}, which an earlier line names, got {named!r}; {hint}")
    what = "messages" if kind == "chat" else "prompt"
    if what not in body:
        raise wrong(what, "is missing")
    asked = body.pop(what)
    if kind == "completions" and isinstance(asked, list) and not all(type(t) is int for t in asked):
        raise wrong("prompt", "must be one text or one list of token ids; write a line for each prompt")
    for name, allowed in _AS_IT_IS.items():
        if name in body and (value := body.pop(name)) not in allowed:
            raise wrong(name, f"is not supported here other than as {allowed[0]!r}, got {value!r}")
    options = {name: body.pop(name) for name in _CHAT_OPTIONS if kind == "chat" and name in body}
    for name in ("max_tokens", "max_completion_tokens"):
        if name in body:
            if body.get("max_new_tokens", body[name]) != body[name]:
                raise wrong(name, "contradicts another limit of the same line; give one of them")
            body["max_new_tokens"] = body.pop(name)
    if kind == "chat":
        _chat_logprobs(body)
    return Task(asked if kind != "chat" else None, asked if kind == "chat" else None, _sampling(body), options)


def _chat_logprobs(body: dict[str, Any]) -> None:
    """In a chat `logprobs` is true or false, and `top_logprobs` says how many."""
    wanted, top = body.pop("logprobs", False), body.pop("top_logprobs", None)
    if not isinstance(wanted, bool):
        raise wrong("logprobs", f"must be true or false in a chat, got {wanted!r}; top_logprobs says how many")
    if top is not None and not wanted:
        raise wrong("top_logprobs", "has no effect without logprobs; set logprobs to true or leave it out")
    if wanted:
        body["logprobs"] = 0 if top is None else top


def _sampling(value: dict[str, Any]) -> dict[str, Any]:
    """Fields of SamplingParams, which refuses what it does not know."""
    if value.get("temperature") == 0:
        value.setdefault("typical_p", 1.0)  # greedy was asked for, so the model's own typical_p gives way
    return value
