"""Sampling: one token for each row of logits, by each row's own parameters; and log-probabilities.

An implementation is `sample(logits, rows) -> list[int | None]`: `logits` is (rows, vocab) float32 and is not changed,
`rows` holds one `Row` each. None means "this row has no token to give": its logits hold NaN or +inf, or nothing is
left above -inf. The caller ends that request alone; the other rows are not touched by it.

What decoding needs is there without waiting for the device too. `PICK`: pick(logits, temperature, starts, out) -> tokens int64,
ok bool, for rows with nothing but a temperature (`is_plain`). `DRAW`: draw(logits, asked, out), for rows with filters, penalties,
bias or forbidden tokens (`on_device`); `needs.py` has what it is asked. `reference.py` says more.

The draw of a row depends on its logits, its seed and its position, never on what runs beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slipstream.ops.choose import Case, Impl, needs_triton, stands_in
from slipstream.request import SamplingParams

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class Row:
    """What the sampler must know of one sequence. `stop_token_ids` are forbidden below `params.min_new_tokens`."""

    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    seed: int
    stop_token_ids: tuple[int, ...] = ()

    @property
    def position(self) -> int:
        """How many tokens the answer has so far."""
        return len(self.output_token_ids)


Sample = Callable[["torch.Tensor", Sequence[Row]], "list[int | None]"]
Pick = Callable[..., "tuple[torch.Tensor, torch.Tensor]"]
Draw = Callable[..., None]


def changes(p: SamplingParams) -> bool:
    """Whether a bias or a penalty comes before temperature."""
    return bool(p.logit_bias or p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty)


def filters(p: SamplingParams) -> bool:
    """Whether some tokens are left out of the draw."""
    return not p.greedy and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0 or p.typical_p < 1)


def is_plain(p: SamplingParams) -> bool:
    """Whether a row needs nothing but its temperature, once it has min_new_tokens: no filter, no history, nothing told of it."""
    return not changes(p) and not filters(p) and p.logprobs is None


def on_device(params: SamplingParams) -> bool:
    """Whether `pick` or `draw` can give a row all it needs."""
    return params.typical_p == 1 and params.logprobs is None


def _load_triton() -> Sample:
    from slipstream.ops.sampling.triton import sample

    return sample


def _load_torch() -> Sample:
    from slipstream.ops.sampling.torch import sample

    return sample


def _load_reference() -> Sample:
    from slipstream.ops.sampling.reference import sample

    return sample


def _load_pick_triton() -> Pick:
    from slipstream.ops.sampling.triton import pick

    return pick


def _load_pick_reference() -> Pick:
    from slipstream.ops.sampling.reference import pick

    return pick


def _load_draw_triton() -> Draw:
    from slipstream.ops.sampling.triton import draw

    return draw


def _load_draw_reference() -> Draw:
    from slipstream.ops.sampling.reference import draw

    return draw


def _reject_torch(case: Case) -> str | None:
    if case.batch_invariant and case.device == "cpu":
        return "the last bit of an exponential of many rows depends on the place of a number"
    return None


def _runs_anywhere(case: Case) -> str | None:
    return None


IMPLS = (
    Impl("triton", _load_triton, needs_triton),
    Impl("torch", _load_torch, _reject_torch),
    Impl("reference", _load_reference, _runs_anywhere),
)
PICK = (
    Impl("triton", _load_pick_triton, needs_triton),
    Impl("torch", _load_pick_reference, stands_in),
    Impl("reference", _load_pick_reference, _runs_anywhere),
)
DRAW = (
    Impl("triton", _load_draw_triton, needs_triton),
    Impl("torch", _load_draw_reference, stands_in),
    Impl("reference", _load_draw_reference, _runs_anywhere),
)
