"""The residual and its RMSNorm: add_norm(x, delta, weight, eps, dtype) -> (x + delta, norm of that sum).

x, delta (..., width); weight (width,). The sum is rounded to x's dtype before it is normalised. Without a delta, x itself is.
The norm is given in `dtype`, or in x's: x and delta may be float32 where the layers that take the norm compute in bfloat16.
For those in `ADDS` delta may be what experts left to add (ops/moe: Pairs), which they add up and round first.
"""

from __future__ import annotations

from typing import Any

from slipstream.ops.choose import Case, Impl, needs_triton


def _reference() -> Any:
    from slipstream.ops.norm.reference import add_norm

    return add_norm


def _torch() -> Any:
    from slipstream.ops.norm.torch import add_norm

    return add_norm


def _triton() -> Any:
    from slipstream.ops.norm.triton import add_norm

    return add_norm


def _reject_triton(case: Case) -> str | None:
    if case.get("width", 0) > WIDEST:
        return f"takes rows of at most {WIDEST:,}, not of {case.get('width'):,}"
    return needs_triton(case)


def _reject_torch(case: Case) -> str | None:
    return "how torch's operator sums is not documented, and may depend on the rows" if case.batch_invariant else None


def _reject_reference(case: Case) -> str | None:
    if case.batch_invariant and case.get("width", 0) >= 32768:
        return "torch sums a row of 32,768 and more in parts if it is alone"
    return None


WIDEST = 65536
ADDS = ("triton",)
IMPLS = (
    Impl("triton", _triton, _reject_triton),
    Impl("torch", _torch, _reject_torch),
    Impl("reference", _reference, _reject_reference),
)
