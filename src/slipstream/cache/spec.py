"""What each layer must remember, as groups of layers that need the same pages. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from slipstream.config import ModelConfig


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers that share page tables: the same window, kv_heads and head_dim."""

    window: int | None
    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int

    @property
    def name(self) -> str:
        return f"sliding_attention({self.window})" if self.window else "full_attention"

    def bytes_per_token(self, dtype_bytes: int) -> int:
        """Keys and values of one token in all layers of the group."""
        return 2 * self.num_kv_heads * self.head_dim * dtype_bytes * len(self.layers)

    def first_visible(self, position: int) -> int:
        """The earliest key that a query at `position` sees; a window counts the token itself."""
        return 0 if self.window is None else max(0, position - self.window + 1)

    def max_pages(self, length: int, chunk: int, page_size: int) -> int:
        """Most pages that a sequence growing to `length` tokens ever holds, computed `chunk` tokens at a time.

        A window of w and a chunk of c touch at most w - 1 + c consecutive keys, which lie in at most
        ceil((w - 1 + c - 1) / page_size) + 1 pages, wherever the first of them falls.
        """
        pages = -(-length // page_size)
        if self.window is None:
            return pages
        span = self.window - 1 + min(chunk, length)
        return min(pages, -(-(span - 1) // page_size) + 1)


def group_layers(config: ModelConfig, layers: Iterable[int] | None = None) -> tuple[CacheGroup, ...]:
    """Group a model's layers, full attention first."""
    found: dict[int | None, list[int]] = {}
    for i in range(config.num_layers) if layers is None else layers:
        found.setdefault(config.layers[i].window, []).append(i)
    order = sorted(found, key=lambda w: (w is not None, w or 0))
    return tuple(CacheGroup(w, tuple(found[w]), config.num_kv_heads, config.head_dim) for w in order)
