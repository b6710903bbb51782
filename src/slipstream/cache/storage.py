"""The tensors of the KV cache: for each group, keys and values of its layers in pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slipstream.cache.spec import CacheGroup


class Storage:
    """Keys and values, (layers of the group, num_pages, page_size, kv_heads, head_dim) each.

    The memory is reserved here in one piece and never grows; on a CPU the system hands it out as pages are written.
    """

    def __init__(
        self,
        groups: Sequence[CacheGroup],
        num_pages: Sequence[int],
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._where: dict[int, tuple[int, int]] = {}
        for i, (group, count) in enumerate(zip(groups, num_pages, strict=True)):
            shape = (len(group.layers), count, page_size, group.num_kv_heads, group.head_dim)
            self.keys.append(torch.empty(shape, dtype=dtype, device=device))
            self.values.append(torch.empty(shape, dtype=dtype, device=device))
            self._where.update({layer: (i, j) for j, layer in enumerate(group.layers)})

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def group_of(self, layer: int) -> int:
        return self._where[layer][0]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each (num_slots, kv_heads, head_dim); slot = page * page_size + offset."""
        group, index = self._where[layer]
        return self.keys[group][index].flatten(0, 1), self.values[group][index].flatten(0, 1)
