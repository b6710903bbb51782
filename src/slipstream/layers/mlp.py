"""Gated feed-forward layers: dense, and as a mixture of experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slipstream.config import ModelConfig
from slipstream.layers.linear import Experts, Linear
from slipstream.layers.ops import Ops
from slipstream.parallel.collectives import Delta


class MLP(nn.Module):
    """down(act(gate x) * (up x)), gate and up in one product."""

    def __init__(self, ops: Ops, config: ModelConfig, *, bias: bool = False) -> None:
        super().__init__()
        self.activation, self.kind, self.ranks = ops.activation, config.hidden_act, ops.ranks
        self.gate_up = Linear(ops, config.hidden_size, 2 * config.intermediate_size, bias=bias)
        self.down = Linear(ops, config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Delta:  # (tokens, hidden)
        return self.ranks.reduce(self.down.left(self.activation(self.gate_up(x), self.kind)))


class MoE(nn.Module):
    """A router picks top_k experts for each token and weighs their answers.

    Args:
        softmax_first: probabilities over all experts, then the best (Mixtral, Qwen); else over the best only (gpt-oss).
        renormalize: with softmax_first, make the picked probabilities add up to one.
        bias: router and experts have biases.
        kind: the gated activation of the experts.

    Attributes:
        picked: where experts are spread over ranks: how many tokens went to each of them since the start, (experts) int64; on a GPU
            also rows that only fill a CUDA graph up, and trials of new ones. None before the first step, and where none is counted.
    """

    def __init__(
        self,
        ops: Ops,
        config: ModelConfig,
        *,
        kind: str,
        softmax_first: bool,
        renormalize: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.pick, self.experts, self.activation = ops.router, ops.experts, ops.activation
        self.kind, self.limit, self.ranks = kind, config.swiglu_limit, ops.ranks
        self.top_k, self.softmax_first, self.renormalize = config.num_experts_per_tok, softmax_first, renormalize
        self.num_experts = n = config.num_experts
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.router = Linear(ops, hidden, n, bias=bias)
        self.picked: Tensor | None = None
        self._numbers: Tensor | None = None
        own = n if ops.ranks.experts is None else len(ops.ranks.experts)
        self.gate_up = Experts(ops, own, hidden, 2 * inner, gated=True, bias=bias)
        self.down = Experts(ops, own, inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Delta:  # (tokens, hidden)
        ids, weights = self.route(x)
        own = ids if self.ranks.experts is None else self._number(ids, self.ranks.experts)
        out = self.experts.kernel.experts(
            x, own, weights, self.gate_up, self.down, self.activation, kind=self.kind, limit=self.limit
        )
        return self.ranks.reduce(out) if self.ranks.experts is None else self.ranks.combine(out, ids)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token and their shares, (tokens, top_k) each."""
        first, scale = self.softmax_first, self.renormalize
        return self.pick(x, self.router, self.top_k, softmax_first=first, renormalize=scale)

    def _number(self, ids: Tensor, own: range) -> Tensor:
        """The numbers that experts have on this rank, -1 for those of others. What was picked is counted: nothing waits for it."""
        if self.ranks.is_silent:  # there are no ids either, and what is in their place is no index
            return torch.zeros_like(ids)
        if self._numbers is None or self.picked is None:
            numbers = torch.full((self.num_experts,), -1, dtype=ids.dtype)
            numbers[own.start : own.stop] = torch.arange(len(own), dtype=ids.dtype)
            self._numbers = numbers.to(ids.device)
            self.picked = torch.zeros(self.num_experts, dtype=torch.int64, device=ids.device)
            self._one = torch.ones(1, dtype=torch.int64, device=ids.device)
        self.picked.index_add_(0, ids.view(-1), self._one.expand(ids.numel()))
        return self._numbers[ids]
