"""Gated feed-forward layers: dense, and as a mixture of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slipstream.config import ModelConfig
from slipstream.layers.linear import Experts, Linear
from slipstream.layers.norm import Norm, add
from slipstream.layers.ops import Ops
from slipstream.ops.formats import Weight
from slipstream.ops.router import AT_ONCE, WIDEST, Logits, fits
from slipstream.parallel.collectives import Delta, Parts


class MLP(nn.Module):
    """down(act(gate h) * (up h)) of h = norm(x + delta), gate and up in one product."""

    def __init__(self, ops: Ops, config: ModelConfig, *, bias: bool = False) -> None:
        super().__init__()
        self.activation, self.kind, self.ranks, self.dtype = ops.activation, config.hidden_act, ops.ranks, ops.dtype
        self.wide_rows = ops.wide_rows
        self.gate_up = Linear(ops, config.hidden_size, 2 * config.intermediate_size, bias=bias)
        self.down = Linear(ops, config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, norm: Norm | None, x: Tensor, delta: Delta) -> tuple[Tensor, Delta]:  # (tokens, hidden)
        """x + delta, and the answer to it."""
        x, h = add(norm, x, delta, self.dtype)
        h = self.gate_up.wide(h) if len(h) <= self.wide_rows else self.gate_up(h)
        return x, self.ranks.reduce(self.down.left(self.activation(h, self.kind, dtype=self.dtype)))


class Router(Linear):
    """Its logits say which experts a token goes to. `arrived` is for a kernel to count in; see ops/router."""

    arrived: Tensor | None = None

    def accept(self, *weights: Weight, shared: bool = False) -> None:
        super().accept(*weights, shared=shared)
        if self.dense is not None and self.dense.shape[1] <= WIDEST:
            self.arrived = torch.zeros(AT_ONCE, dtype=torch.int32, device=self.dense.device)


class MoE(nn.Module):
    """A router picks top_k experts for each token of norm(x + delta) and weighs their answers.

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
        self.pick, self.after_norm = ops.router, ops.add_norm_router
        self.experts, self.activation = ops.experts, ops.activation
        self.kind, self.limit, self.ranks, self.dtype = kind, config.swiglu_limit, ops.ranks, ops.dtype
        self.top_k, self.softmax_first, self.renormalize = config.num_experts_per_tok, softmax_first, renormalize
        self.num_experts = n = config.num_experts
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.router = Router(ops, hidden, n, bias=bias)
        self.picked: Tensor | None = None
        self._numbers: Tensor | None = None
        own = n if ops.ranks.experts is None else len(ops.ranks.experts)
        self.gate_up = Experts(ops, own, hidden, 2 * inner, gated=True, bias=bias)
        self.down = Experts(ops, own, inner, hidden, bias=bias)

    def forward(self, norm: Norm | None, x: Tensor, delta: Delta) -> tuple[Tensor, Delta]:  # (tokens, hidden)
        """x + delta, and the answer to it."""
        left = self._left(x)
        x, h, ids, weights = self.route(norm, x, delta, **left)
        own = ids if self.ranks.experts is None else self._number(ids, self.ranks.experts)
        out = self.experts.kernel.experts(
            h, own, weights, self.gate_up, self.down, self.activation, kind=self.kind, limit=self.limit, **left
        )
        return x, self.ranks.reduce(out) if self.ranks.experts is None else self.ranks.combine(out, ids)

    def route(
        self, norm: Norm | None, x: Tensor, delta: Delta, **left: Logits
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x + delta, the norm of it, the experts of each token and their shares, (tokens, top_k) each, maybe yet to be `left`."""
        how: dict[str, Any] = {"softmax_first": self.softmax_first, "renormalize": self.renormalize, **left}
        # A sum over ranks is one kernel with its norm already.
        both = None if isinstance(delta, Parts) else self.after_norm
        if norm is not None and both is not None and fits(len(x), self.router):
            return both(x, delta, norm.weight, norm.eps, self.router, self.top_k, **how)
        x, h = add(norm, x, delta, self.dtype)
        return x, h, *self.pick(h, self.router, self.top_k, **how)

    @property
    def may_leave(self) -> bool:
        """Whether router and experts are such that the choice may be left: only a router that has `after_norm` can leave it."""
        return self.after_norm is not None and self.top_k <= self.experts.kernel.chooses and self.ranks.experts is None

    def _left(self, x: Tensor) -> dict[str, Logits]:
        """Where the choice is left to the experts' kernel. (Where experts are spread over ranks, it is needed before.)"""
        if len(x) != 1 or not self.may_leave or not fits(1, self.router):
            return {}
        values = torch.empty(1, self.num_experts, dtype=torch.float32, device=x.device)
        return {"logits": Logits(values, self.softmax_first, self.renormalize)}

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
