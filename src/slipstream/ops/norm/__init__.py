"""RMSNorm: norm(x, weight, eps) -> like x. x (..., width), weight (width,)."""

from __future__ import annotations

from typing import Any

from slipstream.ops.choose import Case, Impl


def _reference() -> Any:
    from slipstream.ops.norm.reference import norm

    return norm


def _torch() -> Any:
    from slipstream.ops.norm.torch import norm

    return norm


def _always(case: Case) -> str | None:
    return None


IMPLS = (Impl("torch", _torch, _always), Impl("reference", _reference, _always))
