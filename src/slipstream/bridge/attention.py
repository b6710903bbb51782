"""Our attention behind transformers' AttentionInterface: its dense cache seen as pages of one token, without a copy on a GPU.

What transformers would make a mask of becomes a `Step` instead: which keys each query may see, once for all layers of a kind.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from slipstream.batch import Batch, Context, GroupBatch
from slipstream.bridge.layers import ends_here
from slipstream.cache.spec import CacheGroup
from slipstream.errors import ConfigError


@dataclass(eq=False)
class _Dense(GroupBatch):
    """A group of which each sequence's keys are neighbours: slots starts[i] to starts[i] + ends[i] - 1."""

    starts: Sequence[int] = ()

    @cached_property
    def contexts(self) -> tuple[Context, ...]:
        found = []
        for base, (start, end) in zip(self.starts, self.ranges, strict=True):
            first = self.group.first_visible(start)
            found.append(Context(first, end, slice(base + first, base + end)))
        return tuple(found)


@dataclass(eq=False)
class Step:
    """What attention must know of a forward pass, in the place of a mask.

    Attributes:
        count: queries of each sequence, with those of padding.
        start: place of the first one among the keys.
        pads: keys of padding before each sequence.
    """

    count: int
    start: int
    pads: tuple[int, ...]
    window: int | None
    device: torch.device
    _batches: dict[tuple[int, int], Batch] = field(default_factory=dict)

    @cached_property
    def rows(self) -> Tensor | None:
        """The queries that are of no padding, of all sequences one after the other; None: all are."""
        if max(self.pads) <= self.start:
            return None
        skipped = [max(0, pad - self.start) for pad in self.pads]
        return torch.cat(
            [torch.arange(i * self.count + s, (i + 1) * self.count, device=self.device) for i, s in enumerate(skipped)]
        )

    def batch(self, stride: int, kv_heads: int, head_dim: int) -> Batch:
        """For keys of which a sequence begins `stride` slots after the one before it."""
        found = self._batches.get((stride, head_dim))
        if found is None:
            found = self._batches[stride, head_dim] = self._build(stride, kv_heads, head_dim)
        return found

    def _build(self, stride: int, kv_heads: int, head_dim: int) -> Batch:
        end = self.start + self.count
        starts = [max(0, self.start - pad) for pad in self.pads]  # of queries, counted from the first key that is real
        counts = [end - pad - start for pad, start in zip(self.pads, starts, strict=True)]
        bases = [i * stride + pad for i, pad in enumerate(self.pads)]
        query_starts = [0]
        for count in counts:
            query_starts.append(query_starts[-1] + count)

        def numbers(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        pages = numbers(bases)[:, None] + torch.arange(end, dtype=torch.int32, device=self.device)
        lengths = numbers([end - pad for pad in self.pads])
        pages.masked_fill_(torch.arange(end, device=self.device) >= lengths[:, None], 0)
        empty = torch.empty(0, dtype=torch.int64, device=self.device)
        ranges = tuple((start, start + count) for start, count in zip(starts, counts, strict=True))
        spec = CacheGroup(self.window, (0,), kv_heads, head_dim)
        group = _Dense(spec, 1, (), ranges, pages, torch.zeros_like(lengths), empty, starts=tuple(bases))
        bounds = (numbers(query_starts), numbers(starts))
        return Batch(empty, empty, tuple(query_starts), tuple(starts), empty, bounds, (group,))


def step_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: Any = None,
    **more: Any,
) -> Step:
    """Stands where transformers makes masks (ALL_MASK_ATTENTION_FUNCTIONS)."""
    start = int(q_offset) - kv_offset
    if not _is_plain(mask_function, local_size) or start < 0 or start + q_length > kv_length:
        raise ConfigError(
            "kernelize: this call wants a mask other than causal ones with padding before them, such as for packed sequences; "
            "take attention out with kernels={'attention': ...} left to transformers, or report.undo()"
        )
    pads = [0] * batch_size
    if attention_mask is not None:
        seen = attention_mask[:, kv_offset : kv_offset + start + q_length].bool().cpu()
        pads = (seen.long().cumsum(1) == 0).sum(1).clamp(max=start + q_length - 1).tolist()
        width = torch.arange(seen.shape[1])
        last = torch.where(seen, width, -1).amax(1)
        if ((last - torch.tensor(pads) + 1).clamp(min=0) != seen.sum(1)).any():
            raise ConfigError("kernelize: there is padding inside of a sequence; pad prompts on the left to generate")
    return Step(q_length, start, tuple(pads), local_size, torch.device(device if device is not None else "cpu"))


def _is_plain(mask_function: Any, local_size: int | None) -> bool:
    """Whether it is transformers' causal mask, or that and a sliding window, and nothing more."""
    from transformers import masking_utils

    causal = masking_utils.causal_mask_function
    if mask_function is None or mask_function is causal:
        return local_size is None
    parts = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    window = masking_utils.sliding_window_overlay(1).__qualname__
    return local_size is not None and len(parts) == 2 and parts[0].__qualname__ == window and parts[1] is causal


def forward(attention: Any, *, copies: bool) -> Callable[..., tuple[Tensor, None]]:
    """The function that modules of attention call.

    Args:
        copies: the implementation wants (slots, kv_heads, head_dim) in a row; else it takes strides.
    """

    def attention_forward(
        module: Any,
        query: Tensor,  # (batch, heads, queries, head_dim)
        key: Tensor,  # (batch, kv_heads, keys, head_dim)
        value: Tensor,
        attention_mask: Any,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Any = None,
        output_attentions: bool = False,
        is_causal: bool | None = None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        if not isinstance(attention_mask, Step):
            raise ConfigError(
                "kernelize: a mask of four dimensions cannot be followed; give one of two, or report.undo()"
            )
        if dropout or position_bias is not None or output_attentions or is_causal is False:
            raise ConfigError(
                "kernelize: dropout, biases of positions, attention weights and attention in both directions are transformers' own; "
                "use report.undo() for them"
            )
        (sequences, heads, count, head_dim), kv_heads = query.shape, key.shape[1]
        keys, values, stride = _slots(key, value, copies)
        batch = attention_mask.batch(stride, kv_heads, head_dim)
        q = query.transpose(1, 2).reshape(sequences * count, heads, head_dim)
        rows = attention_mask.rows
        out = attention(
            q if rows is None else q[rows], keys, values, batch, batch.groups[0],
            scale=head_dim**-0.5 if scaling is None else scaling, softcap=softcap, sinks=s_aux,
        )  # fmt: skip
        out = out.detach()
        if rows is not None:
            out = torch.zeros_like(q).index_copy_(0, rows, out)
        inputs = (query, key, value) if s_aux is None else (query, key, value, s_aux)
        return ends_here(out.view(sequences, count, heads, head_dim), *inputs), None

    return attention_forward


def _slots(key: Tensor, value: Tensor, copies: bool) -> tuple[Tensor, Tensor, int]:
    """Keys and values as (slots, kv_heads, head_dim), and the slots from one sequence to the next.

    A slot is a step of one token in memory. From one sequence to the next it is a whole number of them, so all are seen as one row
    of slots, of which only those are named that are there.
    """
    sequences, kv_heads, length, head_dim = key.shape
    first, head, token, one = key.stride()
    if copies or key.stride() != value.stride() or one != 1 or token == 0 or first % token:
        keys, values = (t.transpose(1, 2).reshape(sequences * length, kv_heads, head_dim) for t in (key, value))
        return keys, values, length
    stride = first // token
    shape = ((sequences - 1) * stride + length, kv_heads, head_dim)
    keys, values = (t.as_strided(shape, (token, head, 1)) for t in (key, value))
    return keys, values, stride
