"""The chosen callables that layers run on. The plan makes one `Ops` for a model; layers keep what they need of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from slipstream.ops.linear import LinearKernel
from slipstream.ops.moe import ExpertsKernel
from slipstream.ops.used import Used
from slipstream.parallel.collectives import Alone, Together

WIDE_ROWS = 512


class ExpertsChoice:
    """The kernel of the experts. It is chosen by the formats of their weights, which are known after the model is built."""

    kernel: ExpertsKernel


@dataclass(frozen=True, slots=True)
class Ops:
    """One callable an op. `linear(format, out_features, in_features, shared)` gives the kernel for one weight.

    Attributes:
        decode: attention_input and attention in one, for steps in which every sequence has one query, where there is such a kernel.
        row_by_row: cos, sin and tanh are taken of each row alone. On a CPU, torch computes the last numbers of a tensor and of
            a thread's share by other code than the rest, whose last bit may differ.
        add_norm_router: for what ops/router: fits, in place of add_norm and router; None if no kernel does what both do.
        adds: add_norm takes sums that a product or the experts left to it (ops/moe: Pairs).
        wide_rows: a step of at most so many tokens carries x from layer to layer in float32, and so what is added to it, and gate and
            up, where a kernel gives that. Of all roundings to bfloat16 these are the ones that logits feel most, and in a step of few
            tokens these numbers are nothing beside the weights. (In a prompt of thousands they are not: then x has `dtype`.)
    """

    add_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    attention_input: Callable[..., torch.Tensor]
    attention: Callable[..., torch.Tensor]
    activation: Callable[..., torch.Tensor]
    router: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    experts: ExpertsChoice
    linear: Callable[[str, int, int, bool], LinearKernel]
    dtype: torch.dtype
    decode: Callable[..., torch.Tensor] | None = None
    ranks: Alone | Together = field(default_factory=Alone)
    sample: Any = None
    pick: Any = None
    draw: Any = None
    row_by_row: bool = False
    add_norm_router: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] | None = None
    adds: bool = False
    wide_rows: int = WIDE_ROWS
    used: Used | None = None  # counts what runs, if that was asked for
