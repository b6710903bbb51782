"""The token of each row, greedy or drawn at a temperature, without a word to the host.

The first kernel gives each program a piece of a row, of which it finds the best logit and the winner of the race that
`reference.py` describes, run against the piece's own best logit. The second puts the winners of a row's pieces against its
best logit and takes the best of them. Both depend on nothing but their row.

Rows that need more are changed in a copy first (`_change`), where they have a bias, penalties or forbidden tokens. Those with
top_k, top_p or min_p go through both kernels as if greedy, and then have one program each (`_filter`) that finds what is kept,
without sorting, and lets that race. What it adds up it adds up in float64, as the reference does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.ops.sampling import Row
from slipstream.ops.sampling.needs import Asked, Needs, ask
from slipstream.ops.sampling.reference import check_rows, streams
from slipstream.ops.sampling.torch import sample as sample_torch

PIECE = 1024


def pick(
    logits: Tensor, temperature: Tensor, starts: Tensor, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    logits = (
        logits if logits.stride(1) == 1 else logits.contiguous()
    )  # temperature (rows,) float32, starts (rows,) int64
    out = _room(len(logits), logits.device) if out is None else out
    _pick(logits, temperature, starts, out)
    return out


def _room(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.empty(rows, dtype=torch.int64, device=device), torch.empty(rows, dtype=torch.bool, device=device)


def _pick(logits: Tensor, temperature: Tensor, starts: Tensor, out: tuple[Tensor, Tensor]) -> Tensor:
    """Also what `_race` found."""
    rows, vocab = logits.shape
    pieces = triton.cdiv(vocab, PIECE)
    found = torch.empty(3, rows, pieces, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, pieces, dtype=torch.int32, device=logits.device)
    if rows:
        with torch.cuda.device_of(logits):  # Triton launches on the current device
            _race[(rows, pieces)](
                logits, temperature, starts, found, ids, logits.stride(0), vocab, rows * pieces, PIECE, num_warps=4
            )
            size = triton.next_power_of_2(pieces)
            _finish[(rows,)](temperature, found, ids, *out, pieces, rows * pieces, size, num_warps=1)
    return found


def draw(logits: Tensor, asked: Asked, out: tuple[Tensor, Tensor]) -> None:
    count, vocab = len(asked.rows), logits.shape[1]
    whole = count == len(logits)  # in their own order then
    x = logits if whole else logits.index_select(0, asked.rows)
    x = x if x.stride(1) == 1 else x.contiguous()
    chosen = (out[0][:count], out[1][:count]) if whole else _room(count, logits.device)
    with torch.cuda.device_of(logits):
        if asked.changed:
            x = x.to(torch.float32, copy=True)
            _change[(count,)](
                x, asked.bounds, asked.newest, asked.numbers, asked.tokens, asked.marks, asked.bias, vocab, count, 1024,
                num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
        found = _pick(x, asked.plain, asked.starts, chosen)
        if asked.filtered:
            kept = torch.empty(2, count, vocab, dtype=torch.int32, device=x.device)
            _filter[(count,)](
                x, found, asked.starts, asked.top_k, asked.numbers, kept, *chosen, x.stride(0), vocab, found.shape[2], count,
                count * vocab, 2048, num_warps=16,
            )  # fmt: skip
    if not whole:
        for there, here in zip(out, chosen, strict=True):
            there.index_copy_(0, asked.rows, here)


def sample(logits: Tensor, rows: Sequence[Row]) -> list[int | None]:
    """All rows that `draw` can serve are one wait for the device; those with typical_p are left to torch."""
    check_rows(logits, rows)
    tokens: list[int | None] = [None] * len(rows)
    mine = [i for i, row in enumerate(rows) if row.params.typical_p == 1]
    others = [i for i, row in enumerate(rows) if row.params.typical_p < 1]
    if mine:
        out = _room(len(rows), logits.device)
        drawn, positions = [rows[i] for i in mine], [rows[i].position for i in mine]
        needs = [Needs(row, logits.shape[1]) for row in drawn]
        starts = streams([row.seed for row in drawn], positions)
        draw(logits, ask(needs, mine, positions, starts, [-1] * len(mine), out[0]), out)
        found, ok = (t.tolist() for t in out)
        for i in mine:
            tokens[i] = found[i] if ok[i] else None
    if others:
        for i, token in zip(others, sample_torch(logits[others], [rows[i] for i in others]), strict=True):
            tokens[i] = token
    return tokens


@triton.jit
def _race(  # type: ignore[no-untyped-def]
    logits, temperature, starts, found, ids, stride, vocab, size, PIECE: tl.constexpr
):
    """Of each piece: its best logit (NaN if there is a NaN), and the winner's logit, waiting time and number."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = piece * PIECE + tl.arange(0, PIECE)
    x = tl.load(logits + row * stride + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    heat = tl.load(temperature + row)
    best = tl.max(x)
    wait = tl.full((PIECE,), 1.0, tl.float32)
    score = x
    if heat > 0:
        wait = _wait(tl.load(starts + row), token)
        score = tl.div_rn(tl.exp(tl.div_rn(x - tl.where(best == float("-inf"), 0.0, best), heat)), wait)
        score = tl.where(token < vocab, score, -1.0)
    first = tl.min(tl.where(score == tl.max(score), token, 0x7FFFFFFF))
    at = row * tl.num_programs(1) + piece
    tl.store(found + at, tl.where(tl.sum((x != x).to(tl.int32)) > 0, float("nan"), best))
    tl.store(found + size + at, tl.sum(tl.where(token == first, x, 0.0)))
    tl.store(found + 2 * size + at, tl.sum(tl.where(token == first, wait, 0.0)))
    tl.store(ids + at, first)


@triton.jit
def _wait(start, token):  # type: ignore[no-untyped-def]
    """`reference.noise`. log1p by Kahan's correction of log, which is right to about two units of the last place."""
    z = start + (token + 1).to(tl.int64) * -7046029254386353131  # its constants as signed numbers
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = ((z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685) & 0x7FFFFFFFFFFFFFFF
    minus_u = tl.minimum(
        tl.maximum(z.to(tl.float32) * -1.0842021724855044e-19, -0.99999994039535522), -5.421010862427522e-20
    )
    y = 1 + minus_u
    return -tl.where(y == 1, minus_u, tl.div_rn(tl.log(y) * minus_u, tl.where(y == 1, 1.0, y - 1)))


@triton.jit
def _finish(temperature, found, ids, tokens, ok, pieces, size, PIECES: tl.constexpr):  # type: ignore[no-untyped-def]
    row, piece = tl.program_id(0).to(tl.int64), tl.arange(0, PIECES)
    at, real = row * pieces + piece, piece < pieces
    peak = tl.load(found + at, mask=real, other=float("-inf"))
    best = tl.max(peak)
    good = (tl.sum((peak != peak).to(tl.int32)) == 0) & (best > float("-inf")) & (best < float("inf"))
    heat = tl.load(temperature + row)
    score = tl.load(found + size + at, mask=real, other=float("-inf"))
    if heat > 0:
        wait = tl.load(found + 2 * size + at, mask=real, other=1.0)
        score = tl.where(real, tl.div_rn(tl.exp(tl.div_rn(score - best, heat)), wait), -1.0)
    first = tl.min(tl.where(real & (score == tl.max(score)), piece, PIECES))
    token = tl.load(ids + row * pieces + tl.minimum(first, pieces - 1))
    tl.store(tokens + row, tl.where(good, token, 0).to(tl.int64))
    tl.store(ok + row, good)


@triton.jit(do_not_specialize=["rows"])  # or it is compiled once more for one row, and for 16
def _change(  # type: ignore[no-untyped-def]
    x, bounds, newest, numbers, tokens, marks, biases, vocab, rows, BLOCK: tl.constexpr
):
    """Each token of a row's entries, and the newest one if it is none of these. As `reference.change_logits`."""
    row = tl.program_id(0).to(tl.int64)
    repetition = tl.load(numbers + 3 * rows + row).to(tl.float32)
    presence = tl.load(numbers + 4 * rows + row).to(tl.float32)
    frequency = tl.load(numbers + 5 * rows + row).to(tl.float32)
    new = tl.load(newest + row).to(tl.int32)
    start, end = tl.load(bounds + row), tl.load(bounds + row + 1)
    listed = 0
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        real = at < end
        token = tl.load(tokens + at, mask=real, other=-2)
        mark = tl.load(marks + at, mask=real, other=0)
        count = (mark & 0x1FFFFFFF) + (token == new).to(tl.int32)
        listed += tl.sum((token == new).to(tl.int32))
        there = x + row * vocab + token
        value = tl.load(there, mask=real, other=0.0) + tl.load(biases + at, mask=real, other=0.0)
        seen = (count > 0) | ((mark & 0x20000000) != 0)
        value = _penalised(value, count, seen, repetition, presence, frequency)
        # What is not finite stays: the row has no token.
        value = tl.where(((mark & 0x40000000) != 0) & (value < float("inf")), float("-inf"), value)
        tl.store(there, value, mask=real)
    if (new >= 0) & (listed == 0):
        there = x + row * vocab + new
        once = tl.full((), 1, tl.int32)
        tl.store(there, _penalised(tl.load(there), once, once > 0, repetition, presence, frequency))


@triton.jit
def _penalised(x, count, seen, repetition, presence, frequency):  # type: ignore[no-untyped-def]
    x = tl.where(seen, tl.where(x < 0, x * repetition, tl.div_rn(x, repetition)), x)
    return x - (tl.where(count > 0, presence, 0.0) + frequency * count.to(tl.float32))


@triton.jit(do_not_specialize=["rows", "size"])
def _filter(  # type: ignore[no-untyped-def]
    logits,
    found,
    starts,
    top_ks,
    numbers,
    kept,
    tokens,
    ok,
    stride,
    vocab,
    pieces,
    rows,
    size,
    BLOCK: tl.constexpr,
):
    """The token of a row with top_k, top_p or min_p. `found` has the best logit of each piece, `kept` is room to work in.

    The cost of a token is by how much its logit, after temperature, is below the best: its bits are in the order of the
    numbers. First, tokens that could be kept are listed by cost and id. Of these the cost of the last one kept is found.
    """
    row = tl.program_id(0).to(tl.int64)
    heat = tl.load(numbers + row).to(tl.float32)
    mass, share = tl.load(numbers + rows + row), tl.load(numbers + 2 * rows + row).to(tl.float32)
    top_k = tl.load(top_ks + row)
    filters = (top_k > 0) | (mass < 1) | (share > 0)
    if tl.load(ok + row).to(tl.int1) & (heat > 0) & filters:
        best = found + row * pieces
        costs = kept + row * vocab
        ids = costs + size
        at = tl.arange(0, BLOCK)
        peak = float("-inf")
        for first in range(0, pieces, BLOCK):
            peak = tl.maximum(peak, tl.max(tl.load(best + first + at, mask=first + at < pieces, other=float("-inf"))))

        # The k best pieces have k tokens at least as good as the last of their best ones.
        last = 0x7FFFFFFF
        if (top_k > 0) & (top_k <= pieces):
            for first in range(0, pieces, BLOCK):
                real = first + at < pieces
                x = tl.load(best + first + at, mask=real, other=float("-inf"))
                tl.store(costs + first + at, _cost(x, peak, heat), mask=real)
            tl.debug_barrier()
            last, _ = _search(costs, pieces, top_k.to(tl.float64), False, BLOCK)
            tl.debug_barrier()
        # Without top_k the total is at least 1, and all that are lighter than this weigh less than 1 - top_p of it together.
        light = tl.where((top_k == 0) & (mass < 1), (1 - mass) / (2.0 * vocab), -1.0).to(tl.float32)
        count, total = _list(logits + row * stride, costs, ids, vocab, peak, heat, last, light, BLOCK)
        tl.debug_barrier()

        last, before, limit = 0x7FFFFFFF, total * 0, total + float("inf")
        if top_k > 0:
            if top_k < count:
                last, _ = _search(costs, count, top_k.to(tl.float64), False, BLOCK)
            total = _weigh(costs, count, last, BLOCK)
        if mass < 1:
            limit = mass * total
            last, before = _search(costs, count, limit, True, BLOCK)
        token = _winner(costs, ids, count, last, before, limit, share, tl.load(starts + row), BLOCK)
        tl.store(tokens + row, token.to(tl.int64))


@triton.jit
def _cost(x, peak, heat):  # type: ignore[no-untyped-def]
    return tl.div_rn(peak - x, heat).to(tl.int32, bitcast=True)


@triton.jit
def _weight(cost):  # type: ignore[no-untyped-def]
    return tl.exp(-cost.to(tl.float32, bitcast=True))


@triton.jit
def _list(logits, costs, ids, vocab, peak, heat, last, light, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """List tokens that cost at most `last` and are heavier than `light`, by id: how many, and what all of the row weigh."""
    count, total = 0, tl.zeros((BLOCK,), tl.float64)
    for first in range(0, vocab, BLOCK):
        token = first + tl.arange(0, BLOCK)
        x = tl.load(logits + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        cost = _cost(x, peak, heat)
        weight = _weight(cost)
        total += weight.to(tl.float64)
        keep = ((cost <= last) & (weight > light) & (token < vocab)).to(tl.int32)
        found = tl.sum(keep)
        if found > 0:
            to = count + tl.cumsum(keep) - keep
            tl.store(costs + to, cost, mask=keep > 0)
            tl.store(ids + to, token, mask=keep > 0)
        count += found
    return count, tl.sum(total)


@triton.jit
def _search(costs, count, limit, WEIGH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The highest cost below which tokens are (or with WEIGH: weigh) less than `limit`, and how much that is.

    Three tries at a time give two of its bits.
    """
    low, step, below = 0, 1 << 29, limit * 0
    for _ in range(16):
        one = tl.zeros((BLOCK,), tl.float64)
        two, three = one, one
        for first in range(0, count, BLOCK):
            at = first + tl.arange(0, BLOCK)
            cost = tl.load(costs + at, mask=at < count, other=0x7FFFFFFF)
            size = _weight(cost).to(tl.float64) if WEIGH else tl.full((BLOCK,), 1.0, tl.float64)
            one += tl.where(cost < low + step, size, 0.0)
            two += tl.where(cost < low + 2 * step, size, 0.0)
            three += tl.where(cost < low + 3 * step, size, 0.0)
        a, b, c = tl.sum(one), tl.sum(two), tl.sum(three)
        below = tl.where(c < limit, c, tl.where(b < limit, b, tl.where(a < limit, a, below)))
        low += step * ((a < limit).to(tl.int32) + (b < limit).to(tl.int32) + (c < limit).to(tl.int32))
        step = tl.maximum(step >> 2, 1)  # 2^29, 2^27, ... 2, 1
    return low, below


@triton.jit
def _weigh(costs, count, last, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """What tokens weigh that cost at most `last`."""
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        cost = tl.load(costs + at, mask=at < count, other=0x7FFFFFFF)
        total += tl.where((at < count) & (cost <= last), _weight(cost), 0.0).to(tl.float64)
    return tl.sum(total)


@triton.jit
def _winner(costs, ids, count, last, before, limit, share, start, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The winner of the race among tokens that cost less than `last`; and of those that cost as much, the first ones: until
    with `before` they weigh `limit`. Each at least `share`."""
    best, winner = tl.full((BLOCK,), -1.0, tl.float32), tl.zeros((BLOCK,), tl.int32)
    ties = 0
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        cost = tl.load(costs + at, mask=at < count, other=0x7FFFFFFF)
        token = tl.load(ids + at, mask=at < count, other=0)
        weight = _weight(cost)
        tie = ((at < count) & (cost == last)).to(tl.int32)
        earlier = before + (ties + tl.cumsum(tie) - tie).to(tl.float64) * weight.to(tl.float64)
        ties += tl.sum(tie)
        keep = (at < count) & (weight >= share) & ((cost < last) | ((tie > 0) & (earlier < limit)))
        score = tl.where(keep, tl.div_rn(weight, _wait(start, token)), -1.0)
        winner = tl.where(score > best, token, winner)
        best = tl.maximum(best, score)
    return tl.min(tl.where(best == tl.max(best), winner, 0x7FFFFFFF))
