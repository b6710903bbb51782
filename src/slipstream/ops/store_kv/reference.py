"""One row at a time."""

from __future__ import annotations

from torch import Tensor


def store_kv(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    for row, slot in enumerate(slots.tolist()):
        keys[slot] = k[row]
        values[slot] = v[row]
