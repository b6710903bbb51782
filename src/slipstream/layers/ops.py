"""The chosen callables that layers run on. The plan makes one `Ops` for a model; layers keep what they need of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from slipstream.ops.linear import LinearKernel


@dataclass(frozen=True, slots=True)
class Ops:
    """One callable an op. `linear(format, out_features, in_features, shared)` gives the kernel for one weight."""

    norm: Callable[..., torch.Tensor]
    rope: Callable[..., torch.Tensor]
    store_kv: Callable[..., None]
    attention: Callable[..., torch.Tensor]
    activation: Callable[..., torch.Tensor]
    experts: Callable[..., torch.Tensor]
    linear: Callable[[str, int, int, bool], LinearKernel]
    dtype: torch.dtype
    sample: Any = None
