"""RMSNorm: norm(x, weight, eps) -> like x. x (..., width), weight (width,)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from slipstream.ops.choose import Case, Impl, only_invariant


def _reference() -> Any:
    from slipstream.ops.norm.reference import norm

    return norm


def _torch() -> Any:
    from slipstream.ops.norm.torch import norm

    return norm


def _triton() -> Any:
    from slipstream.ops.norm.triton import norm

    return norm


def _reject_triton(case: Case) -> str | None:
    if case.device != "cuda":
        return "is for CUDA devices"
    if case.get("width", 0) > WIDEST:
        return f"takes rows of at most {WIDEST:,}, not of {case.get('width'):,}"
    return only_invariant(case) or (None if find_spec("triton") else "triton is not installed: pip install triton")


def _reject_torch(case: Case) -> str | None:
    return "how torch's operator sums is not documented, and may depend on the rows" if case.batch_invariant else None


def _reject_reference(case: Case) -> str | None:
    if case.batch_invariant and case.get("width", 0) >= 32768:
        return "torch sums a row of 32,768 and more in parts if it is alone"
    return None


WIDEST = 65536
IMPLS = (
    Impl("triton_invariant", _triton, _reject_triton),
    Impl("torch", _torch, _reject_torch),
    Impl("reference", _reference, _reject_reference),
)
