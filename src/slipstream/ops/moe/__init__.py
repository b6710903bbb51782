"""Mixture of experts after the router: experts(x, ids, weights, gate_up, down, activation, *, kind, limit) -> like x.

x (tokens, hidden); ids, weights (tokens, top_k); an id below zero is of an expert that is not here: it costs nothing and counts
as zero. `gate_up` and `down` are stacks of layers: gate_up(x, e) ->
(tokens, 2 * intermediate), gate first, and down(x, e) -> (tokens, hidden) are those of expert e, with their biases, in
whatever format they are held; activation(gate_up, kind, limit) is the op that was chosen.

An implementation whose kernel takes whole stacks has `prepare(weight, dtype, gated=) -> tensors`, which lays a stack
(experts, out, in) out once, and finds them as `gate_up.stack`; where `prepare` is None each expert is a linear layer by itself.
One that `leaves` takes leave=True, and may then give `Pairs`, whose sum is left to the norm that comes next.
One that `chooses` takes, for a token alone, logits=Logits that a router left, and fills ids and weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slipstream.ops.choose import Case, Impl, needs_triton

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Expert = Callable[["Tensor", int], "Tensor"]
Prepare = Callable[..., "tuple[Tensor, ...]"]
Activation = Callable[["Tensor", str, float], "Tensor"]
FEW = 8  # pairs of a token and an expert up to which our kernel has a tile for each of them, and sorts nothing


def _as_packed(format: str, shape: tuple[int, ...], dtype: torch.dtype) -> int | None:
    return None


@dataclass(frozen=True, slots=True)
class Pairs:
    """What each expert gave that was picked for a token, not yet added: the norm that comes next does that, as one kernel.

    A token's row is the sum of its pairs, each by its weight, in order; in float32, rounded to `dtype`.

    Attributes:
        sums: (parts, places, hidden); a pair's parts are added first.
        ids: (tokens, top_k); a pair whose id is below zero counts as zero.
        weights: (tokens, top_k) float32.
        places: where each pair stands in `sums`, (tokens * top_k) int32; None if they stand there in order.
    """

    sums: Tensor
    ids: Tensor
    weights: Tensor
    places: Tensor | None
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.ids), self.sums.shape[2]

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def sum(self) -> Tensor:  # (tokens, hidden)
        from slipstream.ops.moe.triton import add

        return add(self)


@dataclass(frozen=True, slots=True)
class ExpertsKernel:
    """What an implementation consists of. `held_bytes` of a stack are None where they are those of the format."""

    experts: Callable[..., Any]  # -> Tensor, or Pairs if they are left
    prepare: Prepare | None = None
    held_bytes: Callable[[str, tuple[int, ...], torch.dtype], int | None] = _as_packed
    tunable: bool = False  # `experts` takes `tuned`, what was measured for weights of this shape on this card
    leaves: bool = False  # `experts` takes `leave`
    chooses: int = 0  # `experts` takes `logits` of a token that is to have at most so many
    waits: bool = False  # it brings numbers to the host, so that no CUDA graph can hold it


def _reference() -> ExpertsKernel:
    from slipstream.ops.moe.reference import experts

    return ExpertsKernel(experts)


def _loop() -> ExpertsKernel:
    from slipstream.ops.moe.loop import experts

    return ExpertsKernel(experts)


def _triton() -> ExpertsKernel:
    from slipstream.ops.moe.layout import held_bytes, prepare
    from slipstream.ops.moe.triton import stacks

    return ExpertsKernel(stacks, prepare, held_bytes, tunable=True, leaves=True, chooses=FEW)


def _reject_triton(case: Case) -> str | None:
    if (why := needs_triton(case)) is not None:
        return why
    if case.batch_invariant:
        return "its tiles depend on the number of tokens"
    if case.dtype not in ("bfloat16", "float32"):
        return f"takes bfloat16 and float32 activations, not {case.dtype}"
    formats, sizes, kinds = (case.get(name, ()) for name in ("formats", "sizes", "kinds"))
    if other := [f for f in formats if f not in ("dense", "mxfp4")]:
        return f"takes mxfp4 and floats, not {other[0]}"
    if other := [k for k in kinds if k not in ("silu", "swiglu_clamped")]:
        return f"computes silu and swiglu_clamped, not {other[0]}"
    if any(rows % 16 or width % 32 for rows, width in sizes):
        return "needs out_features in multiples of 16 and in_features in multiples of 32"
    return None


def _always(case: Case) -> str | None:
    return None


IMPLS = (Impl("triton", _triton, _reject_triton), Impl("loop", _loop, _always), Impl("reference", _reference, _always))
