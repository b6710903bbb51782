"""The decoder that every architecture here is: embedding, layers, final norm, head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from slipstream.batch import Batch
from slipstream.cache.storage import Storage
from slipstream.config import ModelConfig
from slipstream.layers.attention import Angles, Attention
from slipstream.layers.linear import Embedding, Linear
from slipstream.layers.norm import Norm
from slipstream.layers.ops import Ops
from slipstream.ops.rope.reference import angles, inverse_frequencies


class Layer(nn.Module):
    """x + attention(norm x), then x + mlp(norm x). Any of the four norms may be absent:
    before (most models), after (OLMo 2), or both (Gemma)."""

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

    def forward(self, x: Tensor, batch: Batch, cache: Storage, turns: Angles) -> Tensor:  # (tokens, hidden)
        h = x if self.before_attention is None else self.before_attention(x)
        h = self.attention(h, batch, cache, turns)
        x = x + (h if self.after_attention is None else self.after_attention(h))
        h = x if self.before_mlp is None else self.before_mlp(x)
        h = self.mlp(h)
        return x + (h if self.after_mlp is None else self.after_mlp(h))


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
        self.embed = Embedding(ops, config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(make_layer(i) for i in range(config.num_layers))
        self.norm = Norm(ops, config.hidden_size, config.rms_norm_eps, plus_one=plus_one)
        self.head = Linear(ops, config.hidden_size, config.vocab_size)
        self._frequencies = [inverse_frequencies(rope) for rope in config.ropes]

    def forward(self, batch: Batch, cache: Storage) -> Tensor:
        """Logits of `batch.logits_rows`, (rows, vocab) float32."""
        x = self.embed(batch.token_ids)
        if self.embed_scale is not None:
            x = x * torch.tensor(self.embed_scale, dtype=x.dtype)
        turns = self._angles(batch.positions)
        for layer in self.layers:
            x = layer(x, batch, cache, turns)
        x = self.norm(x[batch.logits_rows])
        logits = self.head(x).float()
        cap = self.config.final_logit_softcapping
        if cap is None or not len(logits):
            return logits
        return torch.cat([torch.tanh(rows / cap) * cap for rows in logits.split(1 if self.row_by_row else len(logits))])

    def _angles(self, positions: Tensor) -> Angles:
        device, found = positions.device, []
        parts = positions.split(1 if self.row_by_row else len(positions))
        for freq, factor in self._frequencies:
            cos, sin = zip(*(angles(p, freq.to(device), factor, self.dtype) for p in parts), strict=True)
            found.append((torch.cat(cos), torch.cat(sin)))
        return found
