"""Timing a model: decoding, prompts, and many requests at a time. The same code times slipstream and its peers.

Before anything is timed the answers are checked: as many tokens as were asked for, every logit finite (the engine ends an
answer that has others), and the same tokens when asked again.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from slipstream.bench.machine import wait
from slipstream.errors import SlipstreamError
from slipstream.llm import LLM
from slipstream.request import SamplingParams

Prompts = list[list[int]]
Tell = Callable[[str], object]  # what is going on, in a few words


@dataclass(frozen=True, slots=True)
class Answers:
    """What came, and when.

    Attributes:
        seconds: from the first request to the end of the last answer.
        tokens: of each answer.
        moments: for each answer, when its tokens came, in seconds since the start; [] where that is not known.
    """

    seconds: float
    tokens: list[list[int]]
    moments: list[list[float]] = field(default_factory=list)


class Subject(Protocol):
    """A model that is measured. `vocab_size` bounds the ids of prompts; `repeats_itself` is whether it is held to that."""

    vocab_size: int
    repeats_itself: bool

    def run(self, prompts: Prompts, new_tokens: int) -> Answers:
        """Greedily continue all prompts by so many tokens, whatever they are."""


class Slipstream:
    """Our own engine, through the path that every request takes."""

    def __init__(self, llm: LLM) -> None:
        self.llm, self.vocab_size = llm, llm.model_config.vocab_size
        # What a prefix cache finds is not computed again, and so may be rounded in another way.
        self.repeats_itself = not llm.plan.asked.enable_prefix_caching

    def run(self, prompts: Prompts, new_tokens: int) -> Answers:
        params = SamplingParams(temperature=0, max_new_tokens=new_tokens, ignore_eos=True)
        device = self.llm.plan.device
        moments: list[list[float]] = [[] for _ in prompts]
        streams = []
        wait(device)
        start = time.perf_counter()
        try:
            for prompt, times in zip(prompts, moments, strict=True):

                def deliver(*_: object, times: list[float] = times) -> None:
                    times.append(time.perf_counter() - start)

                streams.append(self.llm.engine.submit(self.llm.make_request(prompt, params), deliver))
            outputs = [stream.result() for stream in streams]
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        wait(device)
        seconds = time.perf_counter() - start
        for (answer,) in (o.outputs for o in outputs):
            if answer.error:
                raise SlipstreamError(f"an answer ended early, so there is nothing to time: {answer.error}")
        return Answers(seconds, [o.outputs[0].token_ids for o in outputs], moments)


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts of random tokens, others each time."""

    subject: Subject
    input_len: int
    tell: Tell = lambda _: None
    source: random.Random = field(default_factory=lambda: random.Random(0))

    def prompts(self, count: int) -> Prompts:
        vocab = self.subject.vocab_size
        return [[self.source.randrange(vocab) for _ in range(self.input_len)] for _ in range(count)]

    def run(self, count: int, new_tokens: int) -> Answers:
        answers = self.subject.run(self.prompts(count), new_tokens)
        _complete(answers, count, new_tokens)
        return answers

    def check(self, count: int, new_tokens: int) -> None:
        """The same prompts twice."""
        prompts = self.prompts(count)
        first = self.subject.run(prompts, new_tokens)
        _complete(first, count, new_tokens)
        if self.subject.repeats_itself and self.subject.run(prompts, new_tokens).tokens != first.tokens:
            raise SlipstreamError(f"{count} prompts asked twice got other answers: what is not right is not timed")


def decode(work: Workload, batch: int, output_len: int, repeats: int) -> list[float]:
    """Tokens a second: batch * output_len / (time for output_len + 1 new tokens - median time for 1)."""
    work.tell(f"batch {batch}: checking")
    work.check(batch, min(output_len + 1, 32))
    work.tell(f"batch {batch}: warming up")
    work.run(batch, output_len + 1)
    long, short = [], []
    for i in range(repeats):
        work.tell(f"batch {batch}: run {i + 1} of {repeats}")
        long.append(work.run(batch, output_len + 1).seconds)
        short.append(work.run(batch, 1).seconds)
    prompts = statistics.median(short)
    if min(long) <= prompts:
        raise SlipstreamError(
            f"output_len: {output_len + 1} tokens took no longer than 1, so the clock is too coarse for this; take more"
        )
    return [batch * output_len / (seconds - prompts) for seconds in long]


def prefill(work: Workload, repeats: int) -> list[float]:
    """Seconds from one prompt to its first new token."""
    work.tell("checking and warming up")
    work.check(1, 1)
    seconds = []
    for i in range(repeats):
        work.tell(f"run {i + 1} of {repeats}")
        seconds.append(work.run(1, 1).seconds)
    return seconds


def serve(work: Workload, num_prompts: int, output_len: int, repeats: int) -> list[Answers]:
    """All prompts at once, after one run that does not count."""
    work.tell("checking")
    work.check(min(num_prompts, 8), min(output_len, 16))
    work.tell("warming up")
    work.run(num_prompts, output_len)
    runs = []
    for i in range(repeats):
        work.tell(f"run {i + 1} of {repeats}")
        runs.append(work.run(num_prompts, output_len))
    return runs


def latencies(runs: Sequence[Answers]) -> dict[str, float]:
    """Milliseconds to the first token, and between tokens, at the median and the 95th percentile of all answers."""
    moments = [times for run in runs for times in run.moments]
    first = [times[0] for times in moments]
    between = [later - earlier for times in moments for earlier, later in pairwise(times)]
    named = {"time_to_first_token": first, "inter_token": between}
    return {
        f"{name}_ms_{label}": 1000 * _quantile(values, part)
        for name, values in named.items()
        if values
        for label, part in (("p50", 0.5), ("p95", 0.95))
    }


def _quantile(values: Sequence[float], part: float) -> float:
    """The smallest value that so many of them do not exceed."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]


def _complete(answers: Answers, count: int, new_tokens: int) -> None:
    lengths = [len(tokens) for tokens in answers.tokens]
    if lengths != [new_tokens] * count:
        raise SlipstreamError(f"answers of {sorted(set(lengths))} tokens came where {new_tokens} were asked for")
