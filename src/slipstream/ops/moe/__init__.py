"""Mixture of experts after the router: experts(x, ids, weights, gate_up, down, activation, *, kind, limit) -> like x.

x (tokens, hidden); ids, weights (tokens, top_k). gate_up(x, e) -> (tokens, 2 * intermediate), gate first, and
down(x, e) -> (tokens, hidden) are the linear layers of expert e, with their biases, in whatever format they are held;
activation(gate_up, kind, limit) is the op that was chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from slipstream.ops.choose import Case, Impl

if TYPE_CHECKING:
    from torch import Tensor

Expert = Callable[["Tensor", int], "Tensor"]
Activation = Callable[["Tensor", str, float], "Tensor"]


def _reference() -> Any:
    from slipstream.ops.moe.reference import experts

    return experts


def _loop() -> Any:
    from slipstream.ops.moe.loop import experts

    return experts


def _always(case: Case) -> str | None:
    return None


IMPLS = (Impl("loop", _loop, _always), Impl("reference", _reference, _always))
