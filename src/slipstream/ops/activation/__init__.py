"""Gated activation: activation(gate_up, kind, limit, dtype) -> (..., inner); gate_up (..., 2 * inner), gate first.

What comes out has the `dtype`; None is that of gate_up.

Kinds: silu, gelu, gelu_tanh: act(gate) * up. swiglu_clamped is gpt-oss's: gate and up clamped at `limit`,
gate * sigmoid(1.702 * gate) * (up + 1).
"""

from __future__ import annotations

from typing import Any

from slipstream.ops.choose import Case, Impl, needs_triton, only_invariant, stands_in


def _reference() -> Any:
    from slipstream.ops.activation.reference import activation

    return activation


def _native() -> Any:
    from slipstream.ops.activation.native import activation

    return activation


def _triton() -> Any:
    from slipstream.ops.activation.triton import activation

    return activation


def _reject_native(case: Case) -> str | None:
    if case.device != "cpu":
        return "is compiled for CPUs"
    if only_invariant(case):
        return only_invariant(case)
    from slipstream.ops.native import missing

    return missing("activation", strict=True)


def _reject_reference(case: Case) -> str | None:
    if case.batch_invariant and case.device != "cuda":
        return "the last bit of an exponential depends on the place of a number in the tensor"
    return None


IMPLS = (
    Impl("native_invariant", _native, _reject_native),
    Impl("triton", _triton, needs_triton),
    Impl("torch", _reference, stands_in),
    Impl("reference", _reference, _reject_reference),
)
