"""Sampling, one row at a time, in the order that `SamplingParams` documents.

Where probabilities are summed they are summed in float64, so that a set of kept tokens does not depend on the order
of the sum: other implementations may leave out tokens early and still keep exactly the same ones.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from slipstream.errors import RequestError
from slipstream.ops.sampling import Row
from slipstream.ops.sampling.needs import FORBIDDEN, IN_PROMPT, Asked
from slipstream.request import TokenLogprob

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # the constants of splitmix64 (Steele, Lea, Flood 2014)
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def sample(logits: torch.Tensor, rows: Sequence[Row]) -> list[int | None]:  # (rows, vocab)
    """The next token of each row, None where the row's logits are not finite or nothing is left to choose from."""
    check_rows(logits, rows)
    return [_sample_row(x, row) for x, row in zip(logits, rows, strict=True)]


def _sample_row(x: torch.Tensor, row: Row) -> int | None:  # (vocab,)
    p = row.params
    if not math.isfinite(x.max().item()):  # max() is NaN where any logit is
        return None
    x = change_logits(x.clone(), row)
    if x.max().item() == -math.inf:
        return None
    if p.greedy:
        return int(x.argmax())
    x = filtered(cooled(x, p.temperature), p.top_k, p.top_p, p.min_p)
    if p.typical_p < 1:
        x = x.masked_fill(~typical_p(x, p.typical_p), -math.inf)
    return race(x, waits([row], torch.arange(len(x), device=x.device))[0])


def cooled(x: torch.Tensor, temperature: float) -> torch.Tensor:
    """The maximum is taken off first: no temperature overflows."""
    return (x - x.max()) / x.new_tensor(temperature)


def race(x: torch.Tensor, wait: torch.Tensor) -> int:
    """Of waiting times with rates w, the first to end is token t with probability w[t] / w.sum()."""
    return int((x.exp() / wait).argmax())


def change_logits(x: torch.Tensor, row: Row) -> torch.Tensor:  # (vocab,), changed in place
    """Bias, penalties, and no stop token too early: everything that comes before temperature."""
    p = row.params
    if p.logit_bias:
        x[_ids(p.logit_bias, x)] += torch.tensor(list(p.logit_bias.values()), dtype=x.dtype, device=x.device)
    if p.repetition_penalty != 1:
        seen = _ids([*row.prompt_token_ids, *row.output_token_ids], x)
        old = x[seen]
        x[seen] = torch.where(old < 0, old * p.repetition_penalty, old / p.repetition_penalty)
    if p.presence_penalty or p.frequency_penalty:
        counts = torch.bincount(_ids(row.output_token_ids, x), minlength=len(x))
        x -= p.presence_penalty * (counts > 0) + p.frequency_penalty * counts
    if row.position < p.min_new_tokens:
        x[_ids((t for t in row.stop_token_ids if t < len(x)), x)] = -math.inf
    return x


def _ids(tokens: Iterable[int], like: torch.Tensor) -> torch.Tensor:
    # Through an array's memory: torch.tensor(list) takes 7 times as long, and a history may be thousands of tokens.
    ids = array("q", tokens)
    return torch.frombuffer(ids, dtype=torch.int64).to(like.device) if ids else like.new_empty(0, dtype=torch.int64)


# Each filter takes logits of shape (tokens,) after temperature, the largest of them 0 and any of them maybe -inf, and
# gives the mask of the tokens to keep. The best one is always kept (by typical_p: the most typical one).


def filtered(x: torch.Tensor, k: int, mass: float, share: float) -> torch.Tensor:
    """Logits with -inf for what top_k, top_p and min_p drop, one after the other."""
    if k:
        x = x.masked_fill(~top_k(x, k), -math.inf)
    if mass < 1:
        x = x.masked_fill(~top_p(x, mass, weights(x).sum()), -math.inf)
    if share > 0:
        x = x.masked_fill(~min_p(x, share), -math.inf)
    return x


def top_k(x: torch.Tensor, k: int) -> torch.Tensor:
    """The k best, and whatever ties with the last of them."""
    return x >= x.topk(min(k, len(x))).values[-1]


def top_p(x: torch.Tensor, mass: float, total: torch.Tensor) -> torch.Tensor:
    """The best tokens, until those before a token reach `mass` of the `total` weight; of equal ones the lower id."""
    order = x.argsort(descending=True, stable=True)
    w = weights(x)[order]
    before = w.cumsum(0) - w
    return torch.zeros_like(x, dtype=torch.bool).index_fill_(0, order[before < mass * total], True)


def min_p(x: torch.Tensor, share: float) -> torch.Tensor:
    """All that are at least `share` times as likely as the best."""
    return x.exp() >= share


def typical_p(x: torch.Tensor, mass: float) -> torch.Tensor:
    """The tokens whose surprise is nearest to the entropy, until their mass reaches `mass`; ties with the last stay."""
    p = weights(x) / weights(x).sum()
    surprise = -p.log()
    entropy = torch.where(p > 0, p * surprise, 0).sum()
    distance = torch.where(p > 0, (surprise - entropy).abs(), torch.inf)
    order = distance.argsort(stable=True)
    last = (p[order].cumsum(0) < mass).sum().clamp_(max=len(x) - 1)
    return (distance <= distance[order[last]]) & (p > 0)


def weights(x: torch.Tensor) -> torch.Tensor:
    """Probabilities before they are normalised, in float64."""
    return x.exp().double()


def stream(seed: int, position: int) -> int:
    """The state that the noise of one draw starts from, as a signed 64-bit integer."""
    return _signed(_mix((_mix(seed & _MASK) + position * _GOLDEN) & _MASK))


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MIX1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX2) & _MASK
    return z ^ (z >> 31)


def _signed(z: int) -> int:
    return z - 2**64 if z >= 2**63 else z


def waits(rows: Sequence[Row], tokens: torch.Tensor) -> torch.Tensor:  # (tokens,) int64 -> (rows, tokens)
    """The noise of each row's next token; see `noise`."""
    return noise(torch.tensor([stream(row.seed, row.position) for row in rows], device=tokens.device), tokens)


def noise(starts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:  # (rows,), (tokens,) int64 -> (rows, tokens)
    """Exponential noise, float32: that of token t is made from the t-th number of the row's splitmix64 stream.

    A hash rather than a `torch.Generator`: 3x faster on a CPU, the same on every device up to the rounding of log1p,
    and the noise of some tokens alone is the same as theirs among all. int64 stands for uint64, so each right shift
    is masked to be logical.
    """
    z = starts[:, None] + (tokens + 1) * _signed(_GOLDEN)
    z ^= (z >> 30) & (2**34 - 1)
    z *= _signed(_MIX1)
    z ^= (z >> 27) & (2**37 - 1)
    z *= _signed(_MIX2)  # splitmix64's last xor is left out: it changes only low bits
    z &= 2**63 - 1
    # -u is in (-1, 0). Small u stay exact: they make the short waits that let an unlikely token win.
    minus_u = z.float().mul_(-(2.0**-63)).clamp_(2.0**-24 - 1, -(2.0**-64))
    return minus_u.log1p_().neg_()


def pick(
    logits: torch.Tensor,  # (rows, vocab)
    temperature: torch.Tensor,  # (rows,) float32
    starts: torch.Tensor,  # (rows,) int64: each row's `stream(seed, position)`
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sample` for rows with nothing but a temperature, which waits for no device: tokens int64, and whether there is one.

    A row that has no token gives 0. `out`: where to write both.
    """
    x = logits.float()
    peak = x.amax(-1)  # NaN where any logit is
    race = ((x - peak[:, None]) / temperature[:, None]).exp() / noise(starts, torch.arange(x.shape[1], device=x.device))
    tokens = torch.where(temperature == 0, x.argmax(-1), race.argmax(-1))
    found = tokens.where(peak.isfinite(), 0), peak.isfinite()
    if out is None:
        return found
    for there, here in zip(out, found, strict=True):
        there.copy_(here)
    return out


def draw(logits: torch.Tensor, asked: Asked, out: tuple[torch.Tensor, torch.Tensor]) -> None:
    """`sample` for the rows that are asked for, which may need anything but typical_p, into the same rows of `out`.

    Gives what `pick` gives. Other implementations wait for no device.
    """
    ids = torch.arange(logits.shape[1], device=logits.device)
    waits = noise(asked.starts, ids)
    for i, (row, k, numbers) in enumerate(
        zip(asked.rows.tolist(), asked.top_k.tolist(), asked.numbers.T.tolist(), strict=True)
    ):
        temperature, mass, share, *penalties = numbers
        x, token = logits[row].float(), None
        if math.isfinite(x.max().item()):
            x = _changed(x, asked, i, *penalties)
            if temperature == 0:
                token = int(x.argmax())
            else:
                token = race(filtered(cooled(x, temperature), k, mass, share), waits[i])
            token = None if x.max().item() == -math.inf else token
        out[0][row], out[1][row] = token or 0, token is not None


def _changed(x: torch.Tensor, asked: Asked, i: int, *penalties: float) -> torch.Tensor:
    """`change_logits` by the entries of row i."""
    repetition, presence, frequency = penalties
    start, end = asked.bounds[i : i + 2].tolist()
    tokens, marks = asked.tokens[start:end].long(), asked.marks[start:end]
    counts = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    counts[tokens] = (marks & (IN_PROMPT - 1)).long()
    newest = int(asked.newest[i])
    if newest >= 0:
        counts[newest] += 1
    x = x.index_add(0, tokens, asked.bias[start:end])
    seen = counts > 0
    seen[tokens] |= (marks & IN_PROMPT) > 0
    x = torch.where(seen, torch.where(x < 0, x * repetition, x / repetition), x)
    x -= presence * (counts > 0) + frequency * counts
    x[tokens[(marks & FORBIDDEN) > 0]] = -math.inf
    return x


def streams(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """`stream` of many, int64."""
    with np.errstate(over="ignore"):
        base = np.array([seed & _MASK for seed in seeds], np.uint64)
        z = _mix_all(base) + np.array(positions, np.uint64) * np.uint64(_GOLDEN)
        return _mix_all(z).view(np.int64)


def _mix_all(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX2)
    return z ^ (z >> np.uint64(31))


def check_rows(logits: torch.Tensor, rows: Sequence[Row]) -> None:
    """Raise where the shapes or the token ids of a logit_bias do not fit: no row is sampled then.

    Raises:
        RequestError: logit_bias names a token outside the vocabulary.
    """
    if logits.ndim != 2 or logits.shape[0] != len(rows) or logits.dtype != torch.float32:
        raise ValueError(f"expected float32 logits of {len(rows)} rows, got {logits.dtype} {tuple(logits.shape)}")
    vocab = logits.shape[1]
    for row in rows:
        if row.params.logit_bias and (worst := max(row.params.logit_bias)) >= vocab:
            message = f"logit_bias: token {worst} is not in the vocabulary of {vocab}; leave it out"
            raise RequestError(message, field="logit_bias")


def token_logprobs(
    logits: torch.Tensor,  # (rows, vocab)
    tokens: Sequence[int],
    top: Sequence[int | None],
) -> list[TokenLogprob | None]:
    """The log-probability of `tokens[i]` under row i, with `top[i]` alternatives; None where `top[i]` is None.

    Of the model's own distribution: give the logits as they came, before `sample` or anything else.
    A top larger than the vocabulary gives the whole vocabulary.
    """
    wanted = [i for i, k in enumerate(top) if k is not None]
    out: list[TokenLogprob | None] = [None] * len(top)
    if not wanted:
        return out
    picked = logits[wanted].float()
    logprobs = picked.log_softmax(-1)
    ids = torch.tensor([tokens[i] for i in wanted], device=logits.device)[:, None]
    chosen = logprobs.gather(1, ids)[:, 0].tolist()
    # Ranks from the logits: two of them may differ and still round to one log-probability.
    ranks = ((picked > picked.gather(1, ids)).sum(-1) + 1).tolist()
    values, alternatives = logprobs.topk(min(max(k for k in top if k is not None), logits.shape[1]))
    for i, logprob, rank, v, a in zip(wanted, chosen, ranks, values.tolist(), alternatives.tolist(), strict=True):
        out[i] = TokenLogprob(tokens[i], logprob, rank, tuple(zip(a, v, strict=True))[: top[i]])
    return out
