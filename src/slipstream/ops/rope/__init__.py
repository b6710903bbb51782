"""Rotary position embedding: rope(x, cos, sin) -> like x. x (tokens, heads, head_dim), cos and sin (tokens, 1, dim).

`angles` makes cos and sin once a step; the halves of sin carry the signs, so that a rotation is two products.
"""

from __future__ import annotations

from typing import Any

from slipstream.ops.choose import Case, Impl


def _reference() -> Any:
    from slipstream.ops.rope.reference import rope

    return rope


def _torch() -> Any:
    from slipstream.ops.rope.torch import rope

    return rope


def _reject_torch(case: Case) -> str | None:
    if case.batch_invariant and case.device == "cpu":
        return "whether addcmul rounds between its product and its sum depends on the place of a number"
    return None


def _always(case: Case) -> str | None:
    return None


IMPLS = (Impl("torch", _torch, _reject_torch), Impl("reference", _reference, _always))
