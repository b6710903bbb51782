"""The token of each row, greedy or drawn at a temperature, without a word to the host.

The first kernel gives each program a piece of a row, of which it finds the best logit and the winner of the race that
`reference.py` describes, run against the piece's own best logit. The second puts the winners of a row's pieces against its
best logit and takes the best of them. Both depend on nothing but their row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.ops.sampling.reference import _GOLDEN, _MIX1, _MIX2, _signed

PIECE = 1024
GOLDEN, MIX1, MIX2 = (tl.constexpr(_signed(number)) for number in (_GOLDEN, _MIX1, _MIX2))


def pick(
    logits: Tensor, temperature: Tensor, starts: Tensor, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    rows, vocab = logits.shape  # temperature (rows,) float32, starts (rows,) int64
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    if out is None:
        out = (
            torch.empty(rows, dtype=torch.int64, device=logits.device),
            torch.empty(rows, dtype=torch.bool, device=logits.device),
        )
    tokens, ok = out
    pieces = triton.cdiv(vocab, PIECE)
    found = torch.empty(3, rows, pieces, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, pieces, dtype=torch.int32, device=logits.device)
    if rows:
        with torch.cuda.device_of(logits):  # Triton launches on the current device
            _race[(rows, pieces)](
                logits, temperature, starts, found, ids, logits.stride(0), vocab, rows * pieces, PIECE, num_warps=4
            )
            size = triton.next_power_of_2(pieces)
            _finish[(rows,)](temperature, found, ids, tokens, ok, pieces, rows * pieces, size, num_warps=1)
    return tokens, ok


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
    z = start + (token + 1).to(tl.int64) * GOLDEN
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * MIX1
    z = ((z ^ ((z >> 27) & 0x1FFFFFFFFF)) * MIX2) & 0x7FFFFFFFFFFFFFFF
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
