"""The sum over ranks by torch.distributed."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor


def reduce(x: Tensor, speak: Callable[..., None]) -> Tensor:
    """x may be overwritten."""
    x = x.contiguous()
    speak(dist.all_reduce, x)
    return x
