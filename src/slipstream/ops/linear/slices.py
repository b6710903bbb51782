"""Multiply by a weight of which only a slice at a time is turned into numbers, so that these stay in the processor's cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def in_slices(x: Tensor, rows: int, numbers: Callable[[slice], Tensor], most: int) -> Tensor:
    """x (tokens, in) times a weight (rows, in) -> (tokens, rows).

    Args:
        numbers: these rows of the weight, in the dtype of x.
        most: numbers in a slice.
    """
    out = torch.empty(x.shape[0], rows, dtype=x.dtype)
    step = max(1, most // x.shape[1])
    for at in range(0, rows, step):
        part = slice(at, at + step)
        out[:, part] = F.linear(x, numbers(part))
    return out
