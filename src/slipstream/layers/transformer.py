"""The decoder that every architecture here is: embedding, layers, final norm, head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from slipstream.batch import Batch
from slipstream.cache.storage import Storage
from slipstream.config import ModelConfig
from slipstream.layers.attention import Attention
from slipstream.layers.linear import Embedding, Linear
from slipstream.layers.norm import Norm, add
from slipstream.layers.ops import Ops
from slipstream.ops.rope import Turns, inverse_frequencies
from slipstream.parallel.collectives import Delta, Together


class Layer(nn.Module):
    """x + attention(norm x), then x + mlp(norm x). Any of the four norms may be absent:
    before (most models), after (OLMo 2), or both (Gemma).

    An addition is left to the norm that comes next, which does both at once; the last one to the next layer. The MLP is given its
    norm to call: where it begins with a router, one kernel can do both."""

    def __init__(
        self,
        attention: Attention,
        mlp: nn.Module,
        *,
        before_attention: Norm | None = None,
        after_attention: Norm | None = None,
        before_mlp: Norm | None = None,
        after_mlp: Norm | None = None,
    ) -> None:
        super().__init__()
        self.attention, self.mlp = attention, mlp
        self.before_attention, self.after_attention = before_attention, after_attention
        self.before_mlp, self.after_mlp = before_mlp, after_mlp

    def enter(self, x: Tensor, delta: Delta | None) -> tuple[Tensor, Tensor]:
        """x + delta, and the norm of it."""
        return add(self.before_attention, x, delta, self.attention.ops.dtype)

    def forward(
        self, x: Tensor, h: Tensor, batch: Batch, cache: Storage, turns: Sequence[Turns], rows: Tensor | None = None
    ) -> tuple[Tensor, Delta]:  # what `enter` gave, each (tokens, hidden) -> x, and what is to be added to it
        """`rows`: those of which an answer is wanted, after the attention of the last layer; None is all of them."""
        delta: Delta = self.attention(h, batch, cache, turns, rows)
        x = x if rows is None else x[rows]
        if not len(x):
            return x, delta
        x, h = self.mlp(self.before_mlp, x, delta if self.after_attention is None else self.after_attention(delta))
        return x, h if self.after_mlp is None else self.after_mlp(h)


class Transformer(nn.Module):
    """A whole model, built without memory on the meta device and filled by `checkpoint.load`.

    Args:
        make_layer: builds layer i.
        embed_scale: the embedding is multiplied by it (Gemma).
        plus_one: the final norm stores weight - 1.
    """

    def __init__(
        self,
        ops: Ops,
        config: ModelConfig,
        make_layer: Callable[[int], Layer],
        *,
        embed_scale: float | None = None,
        plus_one: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.dtype, self.embed_scale, self.row_by_row = config, ops.dtype, embed_scale, ops.row_by_row
        self.ranks, self.wide_rows = ops.ranks, ops.wide_rows
        self.embed = Embedding(ops, config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(make_layer(i) for i in range(config.num_layers))
        self.norm = Norm(ops, config.hidden_size, config.rms_norm_eps, plus_one=plus_one)
        self.head = Linear(ops, config.hidden_size, config.vocab_size)
        self._frequencies = [inverse_frequencies(rope) for rope in config.ropes]

    def forward(self, batch: Batch, cache: Storage, out: Tensor | None = None) -> Tensor:
        """Logits of `batch.logits_rows`, (rows, vocab) float32 where the head can; in `out`, float32, if it is given."""
        x = self.embed(batch.token_ids)
        if self.embed_scale is not None:
            x = x * torch.tensor(self.embed_scale, dtype=x.dtype)
        if len(x) <= self.wide_rows:
            x = x.float()
        turns = self._turns(batch.positions)
        delta: Delta | None = None
        rows = None if len(batch.logits_rows) == len(x) else batch.logits_rows  # all of them are in order
        for layer in cast(Iterable[Layer], self.layers):
            x, h = layer.enter(x, delta)
            delta = None  # what experts left is several times as large: it is not kept through a layer
            x, delta = layer(x, h, batch, cache, turns, rows if layer is self.layers[-1] else None)
        x = self.norm.add(x, delta)[1]
        if isinstance(self.ranks, Together):
            logits = self.ranks.gather(self.head.wide(x), out)
        else:
            logits = self.head.wide(x, out)
        cap = self.config.final_logit_softcapping
        if cap is not None and len(logits):
            logits = torch.cat(
                [torch.tanh(rows / cap) * cap for rows in logits.float().split(1 if self.row_by_row else len(logits))]
            )
        return logits if out is None or logits.data_ptr() == out.data_ptr() else out.copy_(logits)

    def expert_load(self) -> dict[int, Tensor]:
        """For each layer that counts it: how many tokens went to each of all experts since the start, (experts) int64."""
        picked = {i: getattr(layer.mlp, "picked", None) for i, layer in enumerate(self.layers)}
        return {i: counts for i, counts in picked.items() if counts is not None}

    def _turns(self, positions: Tensor) -> list[Turns]:
        # Brought to the device once: later steps copy nothing.
        self._frequencies = [(freq.to(positions.device), factor) for freq, factor in self._frequencies]
        return [Turns(positions, freq, factor, self.dtype, self.row_by_row) for freq, factor in self._frequencies]
