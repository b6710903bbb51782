"""What `draw` must know of rows that need more than a temperature: kept on the host for each sequence, sent for each step.

Bias, penalties and forbidden tokens change few logits of a row. Which, and by what, is a list of entries, one a token:
how often the answer has it, whether the prompt has it, whether it is forbidden, its bias. The list goes to the device with
each step, so nothing there has to be kept up to date. The newest token may be known on the device alone: `draw` counts it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from slipstream.batch import to_device
from slipstream.ops.sampling import Row

IN_PROMPT, FORBIDDEN = 1 << 29, 1 << 30  # bits beside the count

NO_ENTRIES = np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32)


class Needs:
    """Of one sequence, as its answer grows."""

    def __init__(self, row: Row, vocab: int) -> None:
        p = row.params
        self.row, self.top_k, self.filtered = row, p.top_k, not p.greedy and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0)
        self.numbers = (
            p.temperature, p.top_p, p.min_p, p.repetition_penalty, p.presence_penalty, p.frequency_penalty,
        )  # fmt: skip
        self.counts_tokens = bool(p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty)
        self._tokens, self._marks, self._bias = array("i"), array("i"), array("f")
        self._where: dict[int, int] = {}
        self._counted, self._forbids = 0, True
        for token, bias in p.logit_bias.items():
            self._bias[self._entry(token)] = bias
        for token in row.prompt_token_ids if p.repetition_penalty != 1 else ():
            self._marks[self._entry(token)] |= IN_PROMPT
        for token in row.stop_token_ids if p.min_new_tokens else ():
            if token < vocab:
                self._marks[self._entry(token)] |= FORBIDDEN

    def _entry(self, token: int) -> int:
        at = self._where.setdefault(token, len(self._tokens))
        if at == len(self._tokens):
            self._tokens.append(token)
            self._marks.append(0)
            self._bias.append(0.0)
        return at

    def entries(self, position: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, counts with the bits beside them, biases; as they are when the answer has `position` tokens."""
        row = self.row
        if not (self.counts_tokens or self._tokens):
            return NO_ENTRIES
        if self.counts_tokens:
            for token in row.output_token_ids[self._counted :]:
                self._marks[self._entry(token)] += 1
            self._counted = len(row.output_token_ids)
        if self._forbids and position >= row.params.min_new_tokens:
            self._forbids = False
            for token in row.stop_token_ids:
                if token in self._where:
                    self._marks[self._where[token]] &= ~FORBIDDEN
        return np.array(self._tokens, np.int32), np.array(self._marks, np.int32), np.array(self._bias, np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """Rows of one step that need more than a temperature.

    Attributes:
        filtered: whether any row has a filter.
        changed: whether any logit may be changed.
        rows: (n,) int64, which of the logits they are.
        starts: (n,) int64, each row's `stream(seed, position)`.
        top_k: (n,) int64.
        newest: (n,) int64, a token of the answer that its entries do not count, or -1.
        bounds: (n + 1,) int64, where each row's entries begin and end.
        numbers: (6, n) float64: temperature, top_p, min_p, and repetition, presence and frequency penalty.
        plain: (n,) float32, the temperature of rows without a filter, and 0 for the others.
        tokens: (entries,) int32, and so on: see `Needs.entries`.
    """

    filtered: bool
    changed: bool
    rows: Tensor
    starts: Tensor
    top_k: Tensor
    newest: Tensor
    bounds: Tensor
    numbers: Tensor
    plain: Tensor
    tokens: Tensor
    marks: Tensor
    bias: Tensor


def ask(
    needs: Sequence[Needs],
    rows: Sequence[int],
    positions: Sequence[int],
    starts: np.ndarray,
    sources: Sequence[int],
    tokens: Tensor,
) -> Asked:
    """Send what these sequences need of a step. Nobody waits for it.

    Args:
        positions: tokens that each answer has, with one that only the device may know.
        sources: which of `tokens` that one is, or -1.
    """
    entries = [n.entries(position) for n, position in zip(needs, positions, strict=True)]
    sources = [source if n.counts_tokens else -1 for n, source in zip(needs, sources, strict=True)]
    filtered, unknown = any(n.filtered for n in needs), max(sources) >= 0
    arrays = [
        np.array(rows),
        starts,
        np.array([n.top_k for n in needs]),
        np.array(sources),
        np.cumsum([0, *(len(e[0]) for e in entries)]),
        np.array([n.numbers for n in needs]).T,
        np.array([0 if n.filtered else n.numbers[0] for n in needs], np.float32),
        *(np.concatenate(parts) for parts in zip(*entries, strict=True)),
    ]
    there = to_device(arrays, tokens.device)
    if unknown:
        there[3] = tokens[there[3].clamp(min=0)].where(there[3] >= 0, -1)
    return Asked(filtered, unknown or len(arrays[-1]) > 0, *there)
