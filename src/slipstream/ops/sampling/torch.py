"""Sampling in batches: rows that need the same little work share it, and filters see few tokens.

Every shortcut here is exact: the tokens are those of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from slipstream.ops.sampling import Row
from slipstream.ops.sampling import reference as ref

# Noise is made for so many logits at once: enough to fill a GPU, and 32 MB for each 8-byte temporary.
_CHUNK = 2**22


def sample(logits: torch.Tensor, rows: Sequence[Row]) -> list[int | None]:  # (rows, vocab)
    """The next token of each row, None where the row's logits are not finite or nothing is left to choose from."""
    ref.check_rows(logits, rows)
    if not rows:
        return []
    peaks, tokens = logits.max(-1)  # a peak is NaN where any logit is
    changed = [i for i, row in enumerate(rows) if _changes(row)]
    drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
    plain = [i for i in drawn if i not in set(changed) and not _filters(rows[i])]
    step = max(1, _CHUNK // logits.shape[1])
    for start in range(0, len(plain), step):
        part = plain[start : start + step]
        temperature = torch.tensor([[rows[i].params.temperature] for i in part], device=logits.device)
        x = (logits[part] - peaks[part, None]).div_(temperature)
        tokens[part] = _draw(x, [rows[i] for i in part], torch.arange(logits.shape[1], device=logits.device))
    for i in sorted({*changed, *drawn} - {*plain}):
        x = logits[i]
        if rows[i] and i in changed:
            x = ref.change_logits(x.clone(), rows[i])
        ...
    finite = torch.isfinite(peaks)
    return [t if t >= 0 else None for t in torch.where(finite, tokens, -1).tolist()]
