"""What is timed is what is said, and nothing is timed that is not right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch

from slipstream.bench.machine import measure_machine
from slipstream.bench.measure import Answers, Prompts, Workload, decode, latencies, prefill, serve
from slipstream.errors import SlipstreamError

VOCAB = 50


@dataclass
class Clockwork:
    """A model that takes 1 s for a prompt and 0.1 s for each further token of a batch, and answers with what it is asked."""

    vocab_size: int = VOCAB
    repeats_itself: bool = True
    spoil: Callable[[Answers], Answers] = lambda answers: answers
    seen: list[tuple[int, int, int]] = field(default_factory=list)
    prompts: list[Prompts] = field(default_factory=list)

    def run(self, prompts: Prompts, new_tokens: int) -> Answers:
        self.seen.append((len(prompts), len(prompts[0]), new_tokens))
        self.prompts.append(prompts)
        moments = [[1 + 0.1 * i for i in range(new_tokens)] for _ in prompts]
        seconds = 1 + 0.1 * (new_tokens - 1)
        return self.spoil(Answers(seconds, [p[:1] * new_tokens for p in prompts], moments))


def workload(subject: Clockwork, input_len: int = 7) -> Workload:
    return Workload(subject, input_len)


def test_decoding_is_the_time_after_the_first_token() -> None:
    subject = Clockwork()
    rates = decode(workload(subject), 3, 20, 2)
    assert rates == pytest.approx([30.0, 30.0])  # 3 * 20 tokens in 2 seconds
    checked, warm = [(3, 7, 21)] * 2, [(3, 7, 21)]
    assert subject.seen == checked + warm + [(3, 7, 21), (3, 7, 1)] * 2


def test_prompts_are_random_and_never_the_same_again() -> None:
    subject = Clockwork()
    decode(workload(subject), 2, 5, 2)
    first, again, *rest = subject.prompts
    assert first == again  # the check asks twice
    asked = [tuple(p) for prompts in [first, *rest] for p in prompts]
    assert len(set(asked)) == len(asked) and all(0 <= t < VOCAB for p in asked for t in p)
    other = Clockwork()
    decode(workload(other), 2, 5, 2)
    assert other.prompts == subject.prompts  # but the same in every process


def test_a_prompt_is_timed_to_its_first_token() -> None:
    subject = Clockwork()
    assert prefill(workload(subject, 9), 3) == [1.0] * 3
    assert set(subject.seen) == {(1, 9, 1)}


def test_serving_is_timed_from_the_first_request_to_the_last_token() -> None:
    subject = Clockwork()
    (run,) = serve(workload(subject), 12, 30, 1)
    assert run.seconds == pytest.approx(1 + 0.1 * 29)
    assert subject.seen == [(8, 7, 16)] * 2 + [(12, 7, 30)] * 2
    found = latencies([run])
    assert found == {name: pytest.approx(value) for name, value in (
        ("time_to_first_token_ms_p50", 1000), ("time_to_first_token_ms_p95", 1000), ("inter_token_ms_p50", 100),
        ("inter_token_ms_p95", 100),
    )}  # fmt: skip


def test_percentiles() -> None:
    run = Answers(9.0, [], [[0.001 * n, 0.001 * n + 0.002] for n in range(1, 101)])
    found = latencies([run])
    assert (found["time_to_first_token_ms_p50"], found["time_to_first_token_ms_p95"]) == pytest.approx((50, 95))
    assert latencies([Answers(1.0, [[1]])]) == {}  # a peer that does not say


@pytest.mark.parametrize("timed", [lambda w: decode(w, 2, 5, 1), lambda w: serve(w, 2, 5, 1), lambda w: prefill(w, 1)])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda a: replace(a, tokens=[t[:-1] for t in a.tokens]), "tokens came where"),
        (lambda a: replace(a, tokens=a.tokens[:-1]), "tokens came where"),
    ],
)
def test_answers_of_a_wrong_length_are_not_timed(
    timed: Callable[[Workload], object], spoil: Callable[[Answers], Answers], said: str
) -> None:
    with pytest.raises(SlipstreamError, match=said):
        timed(workload(Clockwork(spoil=spoil)))


def test_answers_that_change_are_not_timed() -> None:
    calls = iter(range(100))

    def spoil(answers: Answers) -> Answers:
        tokens = [[next(calls), *t[1:]] for t in answers.tokens]
        return replace(answers, tokens=tokens)

    with pytest.raises(SlipstreamError, match="asked twice got other answers"):
        decode(workload(Clockwork(spoil=spoil)), 2, 5, 1)
    assert decode(workload(Clockwork(spoil=spoil, repeats_itself=False)), 2, 5, 1)


def test_a_clock_that_cannot_tell() -> None:
    with pytest.raises(SlipstreamError, match="output_len: 6 tokens took no longer than 1"):
        decode(workload(Clockwork(spoil=lambda a: replace(a, seconds=1.0))), 2, 5, 1)


def test_the_machine_is_measured() -> None:
    found = measure_machine("this", torch.device("cpu"), torch.float32)
    assert found.name == "this" and found.dtype == "float32"
    assert 1e8 < found.bandwidth < 1e13 and 1e8 < found.flops < 1e15
