"""Mixture of experts after the router: experts(x, ids, weights, gate_up, down, ...) -> like x.

x (tokens, hidden); ids, weights (tokens, top_k); gate_up (experts, 2 * intermediate, hidden), gate rows first;
down (experts, hidden, intermediate); optional biases (experts, 2 * intermediate) and (experts, hidden).
"""

from __future__ import annotations

from typing import Any

from slipstream.ops.choose import Case, Impl


def _reference() -> Any:
    from slipstream.ops.moe.reference import experts

    return experts


def _torch() -> Any:
    from slipstream.ops.moe.torch import experts

    return experts


def _always(case: Case) -> str | None:
    return None


IMPLS = (Impl("torch", _torch, _always), Impl("reference", _reference, _always))
