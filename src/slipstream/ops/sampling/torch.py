"""Sampling in batches: rows that need the same little work share it, and filters see only the tokens that matter.

Every shortcut here is exact: the tokens are those of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from slipstream.ops.sampling import Row, changes, filters
from slipstream.ops.sampling import reference as ref

# Noise is made for so many logits at once: enough to fill a GPU, and 32 MB for each 8-byte temporary.
_CHUNK = 2**22


def sample(logits: torch.Tensor, rows: Sequence[Row]) -> list[int | None]:  # (rows, vocab)
    """The next token of each row, None where the row's logits are not finite or nothing is left to choose from."""
    ref.check_rows(logits, rows)
    if not rows:
        return []
    peaks = logits.amax(-1)  # NaN where any logit is
    tokens: list[int | None] = [None] * len(rows)
    greedy: list[int] = []
    drawn: list[int] = []
    for i, (row, finite) in enumerate(zip(rows, peaks.isfinite().tolist(), strict=True)):
        if not finite:
            continue
        if _changes(row) or filters(row.params):
            tokens[i] = _sample_row(logits[i], row)
        else:
            (greedy if row.params.greedy else drawn).append(i)
    if greedy:
        _put(tokens, greedy, _take(logits, greedy).argmax(-1))
    ids = torch.arange(logits.shape[1] if drawn else 0, device=logits.device)
    step = max(1, _CHUNK // logits.shape[1])
    for part in (drawn[i : i + step] for i in range(0, len(drawn), step)):
        temperature = logits.new_tensor([[rows[i].params.temperature] for i in part])
        x = (_take(logits, part) - _take(peaks, part)[:, None]).div_(temperature).exp_()
        _put(tokens, part, x.div_(ref.waits([rows[i] for i in part], ids)).argmax(-1))
    return tokens


def _take(x: torch.Tensor, indices: list[int]) -> torch.Tensor:
    return x if len(indices) == len(x) else x[indices]


def _put(tokens: list[int | None], indices: list[int], values: torch.Tensor) -> None:
    for i, value in zip(indices, values.tolist(), strict=True):
        tokens[i] = value


def _changes(row: Row) -> bool:
    """Whether anything comes before temperature."""
    return changes(row.params) or bool(row.stop_token_ids and row.position < row.params.min_new_tokens)


def _sample_row(x: torch.Tensor, row: Row) -> int | None:  # (vocab,)
    """As the reference, but what a filter drops is left out instead of masked; x has a finite maximum."""
    p = row.params
    if _changes(row):
        x = ref.change_logits(x.clone(), row)
    peak = x.amax(0)
    if peak.item() == -math.inf:
        return None
    if p.greedy:
        return int(x.argmax())
    x = (x - peak).div_(x.new_tensor(p.temperature))
    ids = torch.arange(len(x), device=x.device)
    if p.top_k:
        x, ids = _keep(ref.top_k(x, p.top_k), x, ids)
    if p.top_p < 1:
        total = ref.weights(x).sum()
        # All tokens lighter than this weigh less than 1 - top_p together, so none of them can be kept: spare the sort.
        x, ids = _keep(x.exp() > (1 - p.top_p) * total / (2 * len(x)), x, ids)
        x, ids = _keep(ref.top_p(x, p.top_p, total), x, ids)
    if p.min_p > 0:
        x, ids = _keep(ref.min_p(x, p.min_p), x, ids)
    if p.typical_p < 1:
        x, ids = _keep(ref.typical_p(x, p.typical_p), x, ids)
    return int(ids[x.exp_().div_(ref.waits([row], ids)[0]).argmax()])


def _keep(mask: torch.Tensor, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    kept = mask.nonzero()[:, 0]
    return x[kept], ids[kept]
