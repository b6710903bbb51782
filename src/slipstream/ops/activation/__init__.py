"""Gated activation: activation(gate_up, kind, limit) -> (..., inner); gate_up (..., 2 * inner), gate first.

Kinds: silu, gelu, gelu_tanh: act(gate) * up. swiglu_clamped is gpt-oss's: gate and up clamped at `limit`,
gate * sigmoid(1.702 * gate) * (up + 1).
"""

from __future__ import annotations

from typing import Any

from slipstream.ops.choose import Case, Impl


def _reference() -> Any:
    from slipstream.ops.activation.reference import activation

    return activation


def _always(case: Case) -> str | None:
    return None


IMPLS = (Impl("torch", _reference, _always),)
