"""What a caller asks for and what comes back; and the `Step`, the plain-integer plan of one forward pass.

No torch here: the scheduler and every front import this module.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from slipstream.errors import RequestError

FinishReason = Literal["stop", "length", "abort", "error"]

# Names that users of other runtimes type for the fields below.
_ALIASES = {
    "max_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "eos_token_id": "stop_token_ids",
    "stop_strings": "stop",
    "num_return_sequences": "n",
    "top_logprobs": "logprobs",
    "echo": "prompt_logprobs",
    "do_sample": "temperature",
    "max_time": "deadline",
    "timeout": "deadline",
}


def _fail(name: str, message: str) -> RequestError:
    return RequestError(f"{name}: {message}", field=name)


def _show(value: object) -> str:
    """Short enough for a message, whatever was given. Python refuses to print integers of thousands of digits."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return f"a {type(value).__name__} too large to show"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request is to be answered.

    The order in which logits are changed is: logit_bias, repetition / presence / frequency penalty,
    min_new_tokens, temperature, top_k, top_p, min_p, typical_p; then one draw (or the argmax at temperature 0).
    Log-probabilities are of the model's own distribution, before any of these.

    Attributes:
        n: independent answers to one prompt; answer i uses seed + i.
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches top_p (Holtzman et al. 2020).
        min_p: keep tokens at least min_p times as likely as the best (Nguyen et al. 2024).
        typical_p: locally typical sampling with this mass (Meister et al. 2023).
        repetition_penalty: divide the logits of tokens seen in prompt or answer, multiply negative ones
            (Keskar et al. 2019).
        presence_penalty: subtracted once from the logit of each token already in the answer.
        frequency_penalty: subtracted once for each time a token stands in the answer.
        logit_bias: token id -> value added to its logit; -inf forbids the token.
        seed: makes a sampled answer repeatable, whatever runs beside it.
        min_new_tokens: no end-of-sequence or stop token before so many tokens.
        max_new_tokens: None is "until the model stops or max_model_len is reached".
        stop: strings that end the answer; they are cut off unless include_stop_str_in_output.
        stop_token_ids: token ids that end the answer, beside the model's own.
        ignore_eos: go on after the model's own end-of-sequence tokens.
        logprobs: None, or how many alternatives to report beside each chosen token (0: only the chosen one).
        prompt_logprobs: the same for the tokens of the prompt.
        skip_special_tokens: leave special tokens out of the text.
        deadline: seconds from its arrival; an answer that is not done by then ends in `abort` with stop_reason "deadline"
            and keeps the text it has.
        priority: lower goes first; among equals first come, first served. Who runs is not thrown out for it, and
            every now and then who came first is let in all the same, so nobody waits for ever.
        cache_salt: what is in the cache is shared only between requests of the same salt.

    Raises:
        RequestError: a value is out of range, or two contradict each other; `.field` names the parameter.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    min_new_tokens: int = 0
    max_new_tokens: int | None = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    deadline: float | None = None
    priority: int = 0
    cache_salt: str = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> SamplingParams:
        """Turn an unknown name into an error that names it, before the dataclass would raise a TypeError."""
        if args:
            raise RequestError("SamplingParams takes its values by name only, such as SamplingParams(temperature=0)")
        names = {f.name for f in dataclasses.fields(cls)}
        for name in (k for k in kwargs if k not in names):
            near = _ALIASES.get(name) or next(iter(difflib.get_close_matches(name, names, 1)), None)
            hint = f"; did you mean {near}?" if near else f"; known are {', '.join(sorted(names))}"
            raise _fail(name, f"unknown sampling parameter{hint}")
        return object.__new__(cls)

    def __post_init__(self) -> None:
        put = object.__setattr__
        if isinstance(self.stop, str):
            put(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if value is None:
                value = ()
            if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
                raise _fail(name, f"must be a list, got {_show(value)}")
            put(self, name, tuple(value))
        for s in self.stop:
            if not isinstance(s, str) or not s:
                raise _fail("stop", f"must hold non-empty strings, got {_show(s)}")
        for t in self.stop_token_ids:
            if not _is_int(t) or not 0 <= t < 2**63:
                raise _fail("stop_token_ids", f"must hold token ids, got {_show(t)}")

        self._int("n", 1, 1024)
        self._number("temperature", 0.0, 1e4)
        if 0 < self.temperature < 1e-6:
            raise _fail("temperature", f"{self.temperature:g} is too near to greedy to be told from it; use 0")
        self._int("top_k", 0, 2**31)
        self._number("top_p", 0.0, 1.0, open_low=True)
        self._number("min_p", 0.0, 1.0)
        self._number("typical_p", 0.0, 1.0, open_low=True)
        self._number("repetition_penalty", 1e-4, 1e4)
        self._number("presence_penalty", -1e4, 1e4)
        self._number("frequency_penalty", -1e4, 1e4)
        self._int("min_new_tokens", 0, 2**31)
        if self.seed is not None:
            self._int("seed", -(2**63), 2**64 - 1)
        if self.max_new_tokens is not None:
            self._int("max_new_tokens", 1, 2**31)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._int(name, 0, 100)
        if self.deadline is not None:
            self._number("deadline", 0.0, 1e9, open_low=True)
        self._int("priority", -(2**31), 2**31)
        if not isinstance(self.cache_salt, str):
            raise _fail("cache_salt", f"must be a text, got {_show(self.cache_salt)}")
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise _fail(name, f"must be true or false, got {_show(getattr(self, name))}")
        self._bias()

        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise _fail("min_new_tokens", f"{self.min_new_tokens} is more than max_new_tokens={self.max_new_tokens}")
        if self.temperature == 0:
            if self.n > 1:
                raise _fail("n", f"{self.n} answers at temperature=0 would all be the same; set temperature above 0")
            if self.typical_p < 1:
                raise _fail("typical_p", "may drop the most likely token, so it contradicts temperature=0 (greedy)")
        if self.include_stop_str_in_output and not self.stop:
            raise _fail("include_stop_str_in_output", "has no effect without stop strings; set stop or leave it out")

    def _bias(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise _fail("logit_bias", f"must map token ids to numbers, got {_show(self.logit_bias)}")
        bias: dict[int, float] = {}
        for token, value in self.logit_bias.items():
            if isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 20:
                token = int(token)  # JSON objects have string keys
            if not _is_int(token) or not 0 <= token < 2**63:
                raise _fail("logit_bias", f"keys must be token ids, got {_show(token)}")
            if token in bias:
                raise _fail("logit_bias", f"names token {token} twice")
            if not _is_number(value) or not (-1e30 <= value <= 1e30 or value == -math.inf):
                what = "a number from -1e30 to 1e30, or -inf to forbid it"
                raise _fail("logit_bias", f"value of token {token} must be {what}, got {_show(value)}")
            bias[token] = float(value)
        object.__setattr__(self, "logit_bias", bias)

    def _int(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if not _is_int(value) or not low <= value <= high:
            raise _fail(name, f"must be a whole number from {low} to {high}, got {_show(value)}")

    def _number(self, name: str, low: float, high: float, *, open_low: bool = False) -> None:
        value = getattr(self, name)
        if not _is_number(value) or not (low < value if open_low else low <= value) or not value <= high:
            edge = f"above {low:g}" if open_low else f"from {low:g}"
            raise _fail(name, f"must be a number {edge} to {high:g}, got {_show(value)}")
        object.__setattr__(self, name, float(value))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with these fields changed, checked again."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return SamplingParams(**{**values, **changes})


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, already tokenized, with how to answer it."""

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    prompt: str | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural log-probability, its rank (1 is the most likely), and the top alternatives (id, logprob)."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Completion:
    """One answer. `finish_reason` is None while it is being written; `stop_reason` is the stop string or token id."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprob] | None = None
    error: str | None = None


@dataclass(slots=True)
class RequestOutput:
    """All answers to one request; `prompt_logprobs[0]` is None, as nothing predicts the first token."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: list[Completion]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    metrics: Metrics | None = None

    @property
    def text(self) -> str:
        """The text of the first answer."""
        return self.outputs[0].text


@dataclass(slots=True)
class Metrics:
    """Seconds on `time.perf_counter`'s clock, zero where it has not happened yet; and tokens found in the cache."""

    arrived: float = 0.0
    started: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0
    cached_tokens: int = 0  # of the prompt, by the first answer that looked


@dataclass(frozen=True, slots=True)
class PageTable:
    """The pages of one sequence in one cache group: `pages[i]` holds logical page `first + i`."""

    first: int
    pages: tuple[int, ...]


UNKNOWN = -1  # a token that the step before samples, which may still be running


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence's part of a step: compute `token_ids` at positions start.. and, if `sample`, one token more.

    The last of them may be UNKNOWN.
    """

    sequence: int
    start: int
    token_ids: tuple[int, ...]
    tables: tuple[PageTable, ...]  # one for each cache group
    sample: bool

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Start:
    """Tells the runner of a sequence it has not seen: what its sampler must know."""

    sequence: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    stop_token_ids: tuple[int, ...]  # suppressed until min_new_tokens


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass in plain integers: the same on every rank."""

    number: int
    started: tuple[Start, ...]
    finished: tuple[int, ...]  # sequences the runner may forget
    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(c.token_ids) for c in self.chunks)


def as_token_ids(value: Sequence[int], vocab_size: int, *, name: str = "prompt") -> tuple[int, ...]:
    """Check a prompt given as token ids.

    Raises:
        RequestError: empty, not whole numbers, or outside the vocabulary.
    """
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
        raise _fail(name, f"must be a list of token ids, got {_show(value)}")
    ids = tuple(value)
    if not ids:
        raise _fail(name, "is empty; a model needs at least one token to go on from")
    if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= vocab_size:  # 10 times as fast as one by one
        for t in ids:
            if not _is_int(t) or not 0 <= t < vocab_size:
                raise _fail(name, f"token {_show(t)} is not in the vocabulary of {vocab_size}")
    return ids
