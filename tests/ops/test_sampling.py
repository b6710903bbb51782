"""Sampling against transformers' processors, against its own reference, and against the distribution it claims."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
import torch
from transformers.generation import logits_process as hf

from slipstream.errors import RequestError
from slipstream.ops.sampling import IMPLS, Row, reference
from slipstream.ops.sampling.needs import Asked, Needs, ask
from slipstream.request import SamplingParams

SAMPLERS = {impl.name: impl.load() for impl in IMPLS if impl.name != "triton"}
each_sampler = pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)


def row(prompt: Any = (1, 2), output: Any = (), seed: int = 0, stop: tuple[int, ...] = (), **params: Any) -> Row:
    return Row(SamplingParams(**params), prompt, output, seed, stop)


def random_logits(seed: int, rows: int, vocab: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def random_row(rng: random.Random, vocab: int) -> Row:
    """Any combination of parameters; each is at rest half of the time."""
    values: dict[str, Any] = {
        "temperature": rng.choice([0, 0.3, 0.7, 1.5, 20]),
        "top_k": rng.choice([1, 3, 17, vocab + 5]),
        "top_p": rng.choice([1e-9, 0.2, 0.8, 0.999]),
        "min_p": rng.choice([0.01, 0.3, 1]),
        "typical_p": rng.choice([1e-9, 0.2, 0.9]),
        "repetition_penalty": rng.choice([0.7, 1.3]),
        "presence_penalty": rng.choice([-1.5, 0.8]),
        "frequency_penalty": rng.choice([-0.4, 0.6]),
        "logit_bias": {rng.randrange(vocab): rng.choice([-math.inf, -5, 4]) for _ in range(3)},
        "min_new_tokens": rng.choice([2, 9]),
    }
    values = {name: value for name, value in values.items() if rng.random() < 0.5}
    if values.get("temperature") == 0:
        values.pop("typical_p", None)
    return Row(
        SamplingParams(**values),
        [rng.randrange(vocab) for _ in range(rng.randrange(1, 30))],
        [rng.randrange(vocab) for _ in range(rng.randrange(12))],
        rng.randrange(-(2**63), 2**64),
        tuple(rng.randrange(vocab) for _ in range(2)),
    )


def asked_for(rows: list[Row], vocab: int, rng: random.Random, device: str = "cpu") -> Asked:
    """The rows for `draw`. Of some of them the newest token is told as one that only the device knows."""
    unknown = [bool(r.output_token_ids) and rng.random() < 0.5 for r in rows]
    told = [
        dataclasses.replace(r, output_token_ids=r.output_token_ids[:-1]) if u else r
        for r, u in zip(rows, unknown, strict=True)
    ]
    order = rng.sample(range(len(rows)), len(rows))
    tokens = torch.tensor([rows[i].output_token_ids[-1] if unknown[i] else 0 for i in order], device=device)
    return ask(
        [Needs(r, vocab) for r in told],
        range(len(rows)),
        [r.position for r in rows],
        reference.streams([r.seed for r in rows], [r.position for r in rows]),
        [order.index(i) if u else -1 for i, u in enumerate(unknown)],
        tokens,
    )


def drawn(draw: Any, x: torch.Tensor, asked: Asked) -> list[int | None]:
    """What `draw` puts into its rows of answers; the others stay."""
    tokens, ok = torch.full((len(x) + 1,), -7, device=x.device), torch.zeros(len(x) + 1, dtype=torch.bool).to(x.device)
    before = x.clone()
    draw(x, asked, (tokens, ok))
    assert torch.equal(x.nan_to_num(7), before.nan_to_num(7)) and tokens[-1] == -7
    return [t if good else None for t, good in zip(tokens[:-1].tolist(), ok.tolist(), strict=False)]


def draw_case(seed: int, vocabs: tuple[int, ...] = (3, 40, 611, 5003)) -> tuple[torch.Tensor, list[Row]]:
    """Logits and rows of any parameters but typical_p. Many are equal, or some rows have no token."""
    rng = random.Random(seed)
    vocab = rng.choice(vocabs)
    x = random_logits(seed, rng.randrange(1, 8), vocab, rng.choice([0.1, 3, 12]))
    if seed % 3 == 0:
        x = x.round() if seed % 2 else x.bfloat16().float()
    if seed % 5 == 0:
        x[0, rng.randrange(vocab)] = rng.choice([math.nan, math.inf])
        x[-1, 1:] = -math.inf
    rows = [random_row(rng, vocab) for _ in x]
    return x, [dataclasses.replace(r, params=r.params.replace(typical_p=1)) for r in rows]


def kept_by_transformers(x: torch.Tensor, r: Row) -> torch.Tensor:
    """The logits (vocab,) that transformers would draw from, -inf where a token is dropped."""
    p = r.params
    ids = torch.tensor([[*r.prompt_token_ids, *r.output_token_ids]])
    steps: list[Any] = []
    if p.repetition_penalty != 1:
        steps.append(hf.RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    if p.min_new_tokens:
        steps.append(
            hf.MinNewTokensLengthLogitsProcessor(len(r.prompt_token_ids), p.min_new_tokens, list(r.stop_token_ids))
        )
    if not p.greedy:
        steps.append(hf.TemperatureLogitsWarper(p.temperature))
        steps += [hf.TopKLogitsWarper(p.top_k)] if p.top_k else []
        steps += [hf.TopPLogitsWarper(p.top_p)] if p.top_p < 1 else []
        steps += [hf.MinPLogitsWarper(p.min_p)] if p.min_p > 0 else []
        steps += [hf.TypicalLogitsWarper(p.typical_p)] if p.typical_p < 1 else []
    x = x[None].clone()
    for step in steps:
        x = step(ids, x)
    return x[0]


def kept_by_reference(x: torch.Tensor, r: Row, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The tokens the reference can draw: those that win when the noise favours them alone."""
    kept = set()
    for token in range(len(x)):
        noise = torch.ones(1, len(x))
        noise[0, token] = 1e-37
        monkeypatch.setattr(reference, "waits", lambda rows, ids, noise=noise: noise)
        kept |= {token} & set(reference.sample(x[None], [r]))
    return kept


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.6},
        {"top_k": 7},
        {"top_k": 500},
        {"top_p": 0.83},
        {"top_p": 1e-9},
        {"min_p": 0.07},
        {"typical_p": 0.6},
        {"typical_p": 1e-9},
        {"repetition_penalty": 1.7, "top_k": 11},
        {"repetition_penalty": 0.6, "top_p": 0.6},
        {"min_new_tokens": 5, "top_k": 13},
        {"temperature": 1.9, "top_k": 29, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.7},
    ],
    ids=str,
)
def test_the_tokens_kept_are_those_of_transformers(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(4):
        x = random_logits(seed, 1, 61)[0]
        r = row([5, 9, 9, 60], [7, 9, 33], 1, (4, int(x.argmax())), **params)
        expected = set(kept_by_transformers(x, r).isfinite().nonzero()[:, 0].tolist())
        assert kept_by_reference(x, r, monkeypatch) == expected


def test_of_equal_logits_top_p_keeps_the_lower_ids_and_top_k_all() -> None:
    x = torch.tensor([-1.0, 0.0]).repeat(500)
    mask = reference.top_p(x, 0.3, reference.weights(x).sum())
    kept = math.ceil(0.3 * 500 * (1 + math.exp(-1)))
    assert mask.nonzero()[:, 0].tolist() == list(range(1, 2 * kept, 2))
    assert reference.top_k(x, 3).tolist() == [False, True] * 500


@pytest.mark.parametrize(
    "params", [{"repetition_penalty": 1.7}, {"repetition_penalty": 0.6}, {"min_new_tokens": 4}], ids=str
)
def test_the_changed_logits_are_those_of_transformers(params: dict[str, Any]) -> None:
    x = random_logits(3, 1, 61)[0]
    r = row([5, 9, 9, 60], [7, 9, 33], 0, (4, 50), temperature=0, **params)
    torch.testing.assert_close(reference.change_logits(x.clone(), r), kept_by_transformers(x, r))
    assert not torch.equal(reference.change_logits(x.clone(), r), x)


def test_presence_and_frequency_count_the_answer_only() -> None:
    r = row([5, 9], [7, 9, 7, 7], presence_penalty=0.5, frequency_penalty=0.25, logit_bias={7: 2.0, 3: -math.inf})
    x = reference.change_logits(torch.zeros(11), r)
    expected = torch.zeros(11)
    expected[7] = 2.0 - 0.5 - 3 * 0.25
    expected[9] = -0.5 - 0.25
    expected[3] = -math.inf
    torch.testing.assert_close(x, expected)


def test_bias_comes_before_the_repetition_penalty() -> None:
    r = row([7], [], logit_bias={7: 3.0}, repetition_penalty=2.0)
    assert reference.change_logits(torch.full((11,), -1.0), r)[7] == 1.0  # (-1 + 3) / 2


def test_the_fast_sampler_gives_the_tokens_of_the_reference() -> None:
    rng = random.Random(0)
    for case in range(150):
        vocab = rng.choice([3, 40, 611, 5003])
        x = random_logits(case, rng.randrange(1, 8), vocab, rng.choice([0.1, 3, 12]))
        if case % 3 == 0:
            x = x.bfloat16().float()  # many ties
        rows = [random_row(rng, vocab) for _ in x]
        before = x.clone()
        expected = reference.sample(x, rows)
        assert SAMPLERS["torch"](x, rows) == expected, [r.params for r in rows]
        assert torch.equal(x, before)
        # Each row alone, and in another order beside others.
        assert [SAMPLERS["torch"](x[i : i + 1], [r])[0] for i, r in enumerate(rows)] == expected
        assert SAMPLERS["torch"](x.flip(0), rows[::-1]) == expected[::-1]


def test_draw_gives_the_tokens_of_the_sampler() -> None:
    for case in range(150):
        x, rows = draw_case(case)
        asked = asked_for(rows, x.shape[1], random.Random(case))
        assert drawn(reference.draw, x, asked) == reference.sample(x, rows), (case, [r.params for r in rows])


def test_what_is_needed_follows_the_answer() -> None:
    """Tokens are counted once, stop tokens are free from min_new_tokens on, also if they are biased or in the prompt."""
    vocab = 11
    r = row([5, 9, 9], [], 3, (4, 9, 99), temperature=0, repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1,
            logit_bias={4: 2.0, 2: 0.5}, min_new_tokens=3)  # fmt: skip
    needs, rng = Needs(r, vocab), random.Random(0)
    for position in range(9):
        x = random_logits(position, 1, vocab, 0.2)
        last = r.output_token_ids.pop() if position % 3 == 2 else None  # type: ignore[attr-defined]
        asked = ask(
            [needs], [0], [position], reference.streams([3], [position]), [-1 if last is None else 1],
            torch.tensor([0, last or 0]),
        )  # fmt: skip
        r.output_token_ids.extend([] if last is None else [last])  # type: ignore[attr-defined]
        changed = reference._changed(x[0].clone(), asked, 0, 1.3, 0.2, 0.1)
        assert torch.equal(changed, reference.change_logits(x[0].clone(), r)), position
        r.output_token_ids.append(rng.randrange(vocab))  # type: ignore[attr-defined]


def test_shared_draws_are_cut_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random_logits(1, 7, 101)
    rows = [row(seed=i, temperature=0.5 + i) for i in range(7)]
    monkeypatch.setattr("slipstream.ops.sampling.torch._CHUNK", 202)
    assert SAMPLERS["torch"](x, rows) == reference.sample(x, rows)


@each_sampler
@pytest.mark.parametrize(
    "params", [{}, {"top_k": 9, "logit_bias": {2: -math.inf}}, {"top_p": 0.95, "temperature": 1.4}], ids=str
)
@pytest.mark.parametrize("vary", ["seed", "position"])
def test_draws_follow_the_distribution(sample: Any, params: dict[str, Any], vary: str) -> None:
    """Chi-square over fixed seeds, so it cannot flicker; neighbouring seeds, then neighbouring positions."""
    draws, vocab = 20_000 if not params and sample is SAMPLERS["torch"] else 4_000, 13
    x = random_logits(5, 1, vocab, 1.0)
    p = SamplingParams(**params)
    token = [0]
    rows = [
        Row(p, (1,), token * (0 if vary == "seed" else i % 500), seed=i if vary == "seed" else i // 500)
        for i in range(draws)
    ]
    counts = torch.bincount(torch.tensor(sample(x.expand(draws, -1), rows)), minlength=vocab).double()
    masked = reference.change_logits(x[0].clone(), rows[0])
    expected = (
        kept_by_transformers(masked, dataclasses.replace(rows[0], output_token_ids=())).double().softmax(0) * draws
    )
    assert counts[expected == 0].sum() == 0
    live = expected > 0
    chi2 = ((counts[live] - expected[live]) ** 2 / expected[live]).sum().item()
    degrees = int(live.sum()) - 1
    assert chi2 < degrees + 4 * math.sqrt(2 * degrees)


def test_the_noise_is_exponential_to_its_tails() -> None:
    """Quantiles of 4 million waits against -log(1 - q); short ones decide whether unlikely tokens can win."""
    waits = reference.waits([row(seed=s) for s in range(40)], torch.arange(100_000)).flatten().double()
    ordered = waits.sort().values
    for q in (1e-5, 1e-3, 0.1, 0.5, 0.9, 0.999):
        expected = -math.log1p(-q)
        deviation = math.sqrt(q / (1 - q) / len(ordered))  # of the sample quantile
        assert abs(ordered[int(q * len(ordered))].item() - expected) < 5 * deviation
    assert ordered[0] > 0 and ordered[-1].isfinite()


def splitmix64(state: int, steps: int) -> int:
    """The `steps`-th number of the published generator, in plain integers."""
    z = (state + steps * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_the_noise_is_made_of_splitmix64() -> None:
    assert splitmix64(0, 1) == 0xE220A8397B1DCDAF  # its well-known first number
    for seed in (0, 1, 2**64 - 1):
        state = splitmix64(splitmix64(seed, 0), 6)
        uniform = [(splitmix64(state, t + 1) % 2**63 + 0.5) / 2**63 for t in range(5000)]
        expected = -torch.log1p(-torch.tensor(uniform, dtype=torch.float64)).float()
        got = reference.waits([row(seed=seed, output=[0] * 6)], torch.arange(5000))[0]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)  # float32 is coarse just below u = 1


def test_noise_of_neighbours_is_unrelated() -> None:
    """Next seed, next position, next token: no correlation of their noise."""
    ids = torch.arange(50_000)
    base = reference.waits([row(seed=3, output=[0] * 8)], ids)[0]
    others = {
        "seed": reference.waits([row(seed=4, output=[0] * 8)], ids)[0],
        "position": reference.waits([row(seed=3, output=[0] * 9)], ids)[0],
        "swapped": reference.waits([row(seed=8, output=[0] * 3)], ids)[0],
        "token": base.roll(1),
    }
    for name, other in others.items():
        assert abs(torch.corrcoef(torch.stack([base, other]))[0, 1]) < 5 / math.sqrt(len(ids)), name


def test_noise_of_some_tokens_is_theirs_among_all() -> None:
    r, ids = row(seed=2**64 - 1, output=[0] * 5), torch.tensor([3, 70, 5000, 4])
    assert torch.equal(reference.waits([r], ids), reference.waits([row(), r], torch.arange(6000))[1:, ids])


@each_sampler
def test_a_negative_seed_and_its_unsigned_twin_are_one(sample: Any) -> None:
    x = random_logits(0, 2, 997, 0.1)
    one, other = sample(x[:1].expand(2, -1), [row(seed=-1), row(seed=2**64 - 1)])
    assert one == other
    assert len({sample(x[:1], [row(seed=s)])[0] for s in range(9)}) > 5


@each_sampler
@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {}, {"top_k": 5}, {"temperature": 0, "presence_penalty": 1}], ids=str
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_none_and_harms_no_other(sample: Any, params: dict[str, Any], bad: float) -> None:
    x = random_logits(2, 3, 53)
    rows = [row(output=[4], seed=i, **params) for i in range(3)]
    healthy = sample(x, rows)
    x[1, :] = -math.inf
    x[1, 17] = bad
    assert sample(x, rows) == [healthy[0], None, healthy[2]]


@each_sampler
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_row_with_everything_forbidden_is_none(sample: Any, temperature: float) -> None:
    banned = dict.fromkeys(range(6), -math.inf)
    r = row(stop=(6,), logit_bias=banned, min_new_tokens=1, temperature=temperature)
    assert sample(torch.zeros(1, 7), [r]) == [None]
    assert sample(torch.zeros(1, 7), [dataclasses.replace(r, output_token_ids=[0])]) == [6]


@each_sampler
@pytest.mark.parametrize("temperature", [1e-6, 1e4])
@pytest.mark.parametrize("bias", [1e30, -1e30, 0])
def test_extreme_values_overflow_nothing(sample: Any, temperature: float, bias: float) -> None:
    x = random_logits(9, 1, 23)
    r = row([3], [3], temperature=temperature, logit_bias={3: bias}, repetition_penalty=1e4, frequency_penalty=-1e4)
    assert sample(x, [r]) != [None]
    tight = row(temperature=1e-6, logit_bias={3: 1e30})
    assert sample(x, [tight]) == [3]


@each_sampler
def test_stop_tokens_beyond_the_vocabulary_need_no_suppression(sample: Any) -> None:
    assert sample(torch.eye(5)[3:4], [row(stop=(99, 3), temperature=0, min_new_tokens=1)]) == [0]


@each_sampler
def test_a_bias_beyond_the_vocabulary_is_an_error(sample: Any) -> None:
    with pytest.raises(RequestError, match="token 5 is not in the vocabulary of 5") as e:
        sample(torch.zeros(1, 5), [row(logit_bias={5: 1.0})])
    assert e.value.field == "logit_bias"


@each_sampler
def test_no_rows(sample: Any) -> None:
    assert sample(torch.empty(0, 5), []) == []


@each_sampler
@pytest.mark.parametrize("shape", [(2, 5), (5,)])
def test_wrong_shapes_are_refused(sample: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected float32 logits of 1 rows"):
        sample(torch.zeros(shape), [row()])


def test_token_logprobs() -> None:
    x = random_logits(4, 3, 19)
    x[2] = x[2].bfloat16().float()
    x[2, 7] = x[2, 8]  # a tie: neither ranks above the other
    first, none, last = reference.token_logprobs(x, [5, 6, 7], [4, None, 0])
    exact = x.double().log_softmax(-1)
    assert none is None and first is not None and last is not None
    assert first.token_id == 5 and first.logprob == pytest.approx(exact[0, 5].item(), abs=1e-5)
    assert first.rank == 1 + int((x[0] > x[0, 5]).sum())
    order = exact[0].argsort(descending=True)[:4].tolist()
    assert [t for t, _ in first.top] == order
    assert [v for _, v in first.top] == pytest.approx(exact[0, order].tolist(), abs=1e-5)
    assert last.top == () and last.rank == 1 + int((x[2] > x[2, 7]).sum())


def test_more_alternatives_than_there_are_tokens_gives_them_all() -> None:
    (got,) = reference.token_logprobs(torch.eye(3)[:1], [0], [50])
    assert got is not None and len(got.top) == 3 and got.rank == 1 and got.top[0][0] == 0


def test_no_logprobs_wanted() -> None:
    assert reference.token_logprobs(torch.zeros(2, 3), [0, 1], [None, None]) == [None, None]
