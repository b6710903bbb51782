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


def _always(case: Case) -> str | None:
    return None


IMPLS = (Impl("torch", _torch, _always), Impl("reference", _reference, _always))
