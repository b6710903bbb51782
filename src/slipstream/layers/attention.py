"""Attention: project, rotate, write keys and values into the cache, look at the cache, project back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from slipstream.batch import Batch
from slipstream.cache.storage import Storage
from slipstream.config import ModelConfig
from slipstream.layers.linear import Linear
from slipstream.layers.norm import Norm
from slipstream.layers.ops import Ops
from slipstream.ops.rope import Turns
from slipstream.parallel.collectives import Delta, Together, whole


class Attention(nn.Module):
    """Multi-head attention with grouped keys over the paged cache.

    Args:
        index: number of the layer: its window, rotation and place in the cache.
        qk_norm: RMSNorm on queries and keys, for each head ("head") or over all of them at once ("all").
        plus_one: those norms store weight - 1.
        qkv_bias, out_bias: biases of the projections.
        sinks: one learned score a head that takes weight and gives no value.
    """

    def __init__(
        self,
        ops: Ops,
        config: ModelConfig,
        index: int,
        *,
        qk_norm: Literal["head", "all"] | None = None,
        plus_one: bool = False,
        qkv_bias: bool = False,
        out_bias: bool = False,
        sinks: bool = False,
    ) -> None:
        super().__init__()
        self.ops, self.index = ops, index
        rope = config.layers[index].rope
        self.rope = None if rope is None else config.ropes.index(rope)
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.scale, self.softcap = config.attention_scale, config.attn_logit_softcapping
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = Linear(ops, config.hidden_size, width, bias=qkv_bias)
        self.out = Linear(ops, self.heads * self.head_dim, config.hidden_size, bias=out_bias)
        self.qk_norm = qk_norm
        if qk_norm:
            per_head = qk_norm == "head"
            q_width, k_width = (self.head_dim * (1 if per_head else n) for n in (self.heads, self.kv_heads))
            self.q_norm = Norm(ops, q_width, config.rms_norm_eps, plus_one=plus_one)
            self.k_norm = Norm(ops, k_width, config.rms_norm_eps, plus_one=plus_one)
        self.sinks: nn.Parameter | None = None
        if sinks:
            self.sinks = nn.Parameter(torch.empty(self.heads, dtype=torch.float32, device="meta"), requires_grad=False)

    def forward(
        self, x: Tensor, batch: Batch, cache: Storage, turns: Sequence[Turns], rows: Tensor | None = None
    ) -> Delta:  # (tokens, hidden) -> the same, or `rows` of it
        tokens = x.shape[0]
        qkv = self.qkv(x).view(tokens, self.heads + 2 * self.kv_heads, self.head_dim)
        norms = None
        if self.qk_norm == "all":
            qkv = self._norm_all(qkv)
        elif self.qk_norm == "head":
            norms = self.q_norm.weight, self.k_norm.weight, self.q_norm.eps
        turn = None if self.rope is None else turns[self.rope]
        group = batch.groups[cache.group_of(self.index)]
        keys, values = cache.layer(self.index)
        options = {"scale": self.scale, "softcap": self.softcap, "sinks": self.sinks}
        if self.ops.decode is not None and batch.decode_only:
            out = self.ops.decode(qkv, turn, norms, keys, values, batch, group, **options)
        else:
            q = self.ops.attention_input(qkv, turn, norms, keys, values, group.slots)
            out = self.ops.attention(q, keys, values, batch, group, **options)
        out = out.reshape(tokens, self.heads * self.head_dim)
        return self.ops.ranks.reduce(self.out.left(out if rows is None else out[rows]))

    def _norm_all(self, qkv: Tensor) -> Tensor:  # (tokens, heads + 2 * kv_heads, head_dim)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), 1)
        ranks = self.ops.ranks
        if isinstance(ranks, Together):  # the mean is over the heads of all ranks
            counted = k[:, torch.tensor(ranks.counted, device=k.device)]
            sums = whole(ranks.reduce(torch.stack([x.float().square().sum((1, 2)) for x in (q, counted)])))
            for x, norm, total, width in zip((q, k), (self.q_norm, self.k_norm), sums, ranks.widths, strict=True):
                root = torch.rsqrt(total / width + norm.eps)[:, None, None]
                x.copy_(x.float() * root * norm.weight.float().view(1, -1, self.head_dim))
            return qkv
        q, k = self.q_norm(q.flatten(1)).view(q.shape), self.k_norm(k.flatten(1)).view(k.shape)
        return torch.cat((q, k, v), 1)
