"""RMSNorm from a repository of kernels, called as a function.

Two public layouts, read from github.com/huggingface/kernels-community:

- flash-attn-ops: `rms_norm_fn(x, weight, bias, residual=None, ..., eps=1e-6, ..., prenorm=False, ...)`, which with `prenorm` gives
  (norm, x + residual): one kernel for both.
- liger-kernels: `layers.LigerRMSNorm`, rmsnorm: `layers.RMSNorm`. A layer of such a repository has no state: its
  `forward(self, hidden_states)` reads `weight` and `variance_epsilon` of whatever module it is given
  (transformers/integrations/hub_kernels.py puts it on its own). So it is a function of these, and is called as one.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slipstream.ops.candidate import function
from slipstream.ops.choose import Case

if TYPE_CHECKING:
    from slipstream.ops.hub import Opened


def reject(case: Case) -> str | None:
    return None


def adapt(opened: Opened, case: Case) -> Any:
    layers = getattr(opened.module, "layers", None)
    layer = opened.layer
    if layer is None and not hasattr(opened.module, "rms_norm_fn"):
        layer = getattr(layers, "LigerRMSNorm", None) or getattr(layers, "RMSNorm", None)
    if layer is not None:
        return _layer(function(layer, "forward", "hidden_states"))
    return _fused(function(opened.module, "rms_norm_fn", "x", "weight", "bias", "residual", "eps", "prenorm"))


def _layer(forward: Any) -> Any:
    def add_norm(
        x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        x = x if delta is None else (x + delta).to(x.dtype)
        return x, forward(SimpleNamespace(weight=weight, variance_epsilon=eps), x.to(dtype or x.dtype).contiguous())

    return add_norm


def _fused(rms_norm_fn: Any) -> Any:
    def add_norm(
        x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        dtype = dtype or x.dtype
        if delta is None:
            return x, rms_norm_fn(x.to(dtype), weight, None, eps=eps)
        # The norm has the first one's dtype, and the sum that of the residual.
        out, total = rms_norm_fn(delta.to(dtype), weight, None, residual=x, eps=eps, prenorm=True)
        return total, out

    return add_norm
