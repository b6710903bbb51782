"""Sampling, one row at a time, in the order that `SamplingParams` documents.

Where probabilities are summed they are summed in float64, so that a set of kept tokens does not depend on the order
of the sum: other implementations may leave out tokens early and still keep exactly the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from slipstream.errors import RequestError
from slipstream.ops.sampling import Row
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
    x = (x - x.max()) / p.temperature  # the maximum is taken off first, so no temperature can overflow
    if p.top_k:
        x = x.masked_fill(~top_k(x, p.top_k), -math.inf)
    if p.top_p < 1:
        x = x.masked_fill(~top_p(x, p.top_p), -math.inf)
    if p.min_p > 0:
        x = x.masked_fill(~min_p(x, p.min_p), -math.inf)
    if p.typical_p < 1:
        x = x.masked_fill(~typical_p(x, p.typical_p), -math.inf)
    # The Gumbel-max trick: the argmax of log-probability plus Gumbel noise is a draw from the distribution.
    noise = gumbel(torch.tensor([stream(row.seed, row.position)]), torch.arange(len(x)))
    return int((x + noise.to(x.device)).argmax())


def change_logits(x: torch.Tensor, row: Row) -> torch.Tensor:  # (vocab,), changed in place
    """Bias, penalties, and no stop token too early: everything that comes before temperature."""
    p = row.params
    if p.logit_bias:
        x[_ids(list(p.logit_bias), x)] += torch.tensor(list(p.logit_bias.values()), dtype=x.dtype, device=x.device)
    if p.repetition_penalty != 1:
        seen = _ids([*row.prompt_token_ids, *row.output_token_ids], x)
        old = x[seen]
        x[seen] = torch.where(old < 0, old * p.repetition_penalty, old / p.repetition_penalty)
    if p.presence_penalty or p.frequency_penalty:
        counts = torch.bincount(_ids(row.output_token_ids, x), minlength=len(x))
        x -= p.presence_penalty * (counts > 0) + p.frequency_penalty * counts
    if row.position < p.min_new_tokens:
        x[_ids([t for t in row.stop_token_ids if t < len(x)], x)] = -math.inf
    return x


def _ids(tokens: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.int64, device=like.device)


# Each filter takes logits of shape (tokens,) that are already divided by the temperature and may hold -inf, and gives
# the mask of tokens to keep. Each keeps the most likely token (typical_p: the most typical one), so one is always left.


def top_k(x: torch.Tensor, k: int) -> torch.Tensor:
    """The k best, and whatever ties with the last of them."""
    return x >= x.topk(min(k, len(x))).values[-1]


def top_p(x: torch.Tensor, mass: float) -> torch.Tensor:
    """The best tokens, until what stands before a token already reaches `mass`. Equal logits: the lower id first."""
    order = x.argsort(descending=True, stable=True)
    p = probabilities(x)[order]
    before = p.cumsum(0) - p
    before[0] = 0  # else a tiny mass could lose to rounding
    return torch.zeros_like(x, dtype=torch.bool).index_fill_(0, order[before < mass], True)


def min_p(x: torch.Tensor, share: float) -> torch.Tensor:
    """All that are at least `share` times as likely as the best."""
    return (x - x.max()).exp() >= share


def typical_p(x: torch.Tensor, mass: float) -> torch.Tensor:
    """The tokens whose surprise is nearest to the entropy, until their mass reaches `mass`; ties with the last stay."""
    p = probabilities(x)
    surprise = -p.log()
    entropy = torch.where(p > 0, p * surprise, 0).sum()
    # Rounded, because ties must stay ties when the same sum is taken over fewer tokens.
    distance = torch.where(p > 0, (surprise - entropy).abs().float(), torch.inf)
    order = distance.argsort(stable=True)
    last = int((p[order].cumsum(0) < mass).sum())
    return (distance <= distance[order[min(last, len(x) - 1)]]) & (p > 0)


def probabilities(x: torch.Tensor) -> torch.Tensor:
    """Softmax in float64."""
    return x.double().softmax(0)


def stream(seed: int, position: int) -> int:
    """The state that the noise of one draw starts from, as a signed 64-bit integer."""
    state = _mix((_mix(seed & _MASK) + position * _GOLDEN) & _MASK)
    return _signed(state)


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MIX1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX2) & _MASK
    return z ^ (z >> 31)


def _signed(z: int) -> int:
    return z - 2**64 if z >= 2**63 else z


def gumbel(streams: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:  # (rows,) int64, (tokens,) -> (rows, tokens)
    """Standard Gumbel noise, float32: that of token t is made from the t-th number of the row's splitmix64 stream.

    A hash rather than a `torch.Generator`: 3x faster on a CPU, the same on every device, and the noise of some tokens
    alone is the same as theirs among all. int64 stands for uint64, so each right shift is masked to be logical.
    """
    z = streams[:, None] + (tokens + 1) * _signed(_GOLDEN)
    z ^= (z >> 30) & (2**34 - 1)
    z *= _signed(_MIX1)
    z ^= (z >> 27) & (2**37 - 1)
    z *= _signed(_MIX2)
    z ^= (z >> 31) & (2**33 - 1)
    # 32 random bits; small values stay exact, since they make the large noise that lets an unlikely token win.
    u = ((z >> 32) & (2**32 - 1)).float().mul_(2**-32).clamp_(2**-33, 1 - 2**-24)
    return u.neg_().log1p_().neg_().log_().neg_()


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
