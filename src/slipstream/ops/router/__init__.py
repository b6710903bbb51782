"""Which experts a token goes to: router(x, linear, top_k, softmax_first=, renormalize=) -> ids int32, weights float32.

x (tokens, hidden); linear gives logits (tokens, experts) of it, rounded to x's dtype; if it has a `dense` weight
(experts, hidden) and a `bias`, an implementation may do the product itself. ids, weights (tokens, top_k), the best expert first,
and of equal ones the lower number. softmax_first: probabilities over all experts, then the best (Mixtral, Qwen), which
`renormalize` makes add up to one; else the softmax of the best logits (gpt-oss).

For few tokens a kernel may do all of it at once, if the linear has `arrived`, (tokens) int32, for it to count in: zero before and
after, and its own, as two engines may run at the same time. The residual and the norm before it can then be part of it:

    add_norm_router(x, delta, weight, eps, linear, top_k, ...) -> total, normed, ids, weights

The programs of that kernel have to wait for each other before there can be a choice. For one token both take logits=Logits(...) and
leave the choice: they fill the logits, and whoever reads them has ids and weights to fill (ops/moe).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from slipstream.ops.choose import Case, Impl, needs_triton, only_invariant, stands_in

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE = 8  # tokens: each makes every program read what is added, and the weights once more
WIDEST = 8192  # hidden: a program holds rows of the weight in registers


@dataclass(frozen=True, slots=True)
class Logits:
    """What is to be chosen by, later: `values` (1, experts) float32, yet to be rounded as the norm is; and how, as above."""

    values: Tensor
    softmax_first: bool
    renormalize: bool


def fits(tokens: int, linear: Any) -> bool:
    """Whether one kernel does all of it."""
    arrived = getattr(linear, "arrived", None)
    return arrived is not None and tokens <= len(arrived)


def with_norm(norm: str, router: str) -> Any:
    """`add_norm_router` that does what these two implementations do, for what `fits`; None if there is none."""
    if (norm, router) != ("triton", "triton"):
        return None
    from slipstream.ops.router.triton import add_norm_router

    return add_norm_router


def _reference() -> Any:
    from slipstream.ops.router.reference import router

    return router


def _triton() -> Any:
    from slipstream.ops.router.triton import router

    return router


def _triton_invariant() -> Any:
    return partial(_triton(), few=None)


def _reject_triton(case: Case) -> str | None:
    if case.batch_invariant:
        return "cuBLAS multiplies where there are many tokens, and sums in another order"
    return _reject_triton_invariant(case)


def _reject_triton_invariant(case: Case) -> str | None:
    if case.get("experts", 0) > 1024:
        return f"has room for 1,024 experts, not {case.get('experts'):,}"
    return needs_triton(case)


def _always(case: Case) -> str | None:
    return None


IMPLS = (
    Impl("triton", _triton, _reject_triton),
    Impl("triton_invariant", _triton_invariant, _reject_triton_invariant, only_invariant),
    Impl("torch", _reference, stands_in),
    Impl("reference", _reference, _always),
)
