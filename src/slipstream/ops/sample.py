"""One call of an op on made inputs: what an implementation is held against its reference with, and timed on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slipstream.errors import KernelError

# How far a number may be from the reference's, as `error` measures it.
TOLERANCE = {"float32": 1e-3, "bfloat16": 4e-2, "float16": 1e-2}
L2_BYTES = 512 << 20  # more than any card's; zeroing it takes longer than launching a few kernels
Run = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Sample:
    """`bind(implementation)` gives what runs it once.

    Attributes:
        inputs: what a call must leave as it is.
        nbytes: what at least has to be read and written.
    """

    bind: Callable[[Any], Run]
    inputs: tuple[Tensor, ...]
    nbytes: int


def draw(seed: int, *shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """Normal numbers, the same each time."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


@torch.inference_mode()
def error(fn: Any, reference: Any, sample: Sample) -> float:
    """The largest difference to the reference, each as a part of |number| + the root mean square of all numbers: so what rounding
    does to a large number counts as little as what it does to a small one.

    Raises:
        KernelError: it raised, gives another shape or dtype, or wrote into its inputs.
    """
    before = [t.clone() for t in sample.inputs]
    try:
        got = _tensors(sample.bind(fn)())
        if got and got[0].is_cuda:
            torch.cuda.synchronize(got[0].device)
    except Exception as e:  # it is code from elsewhere, which may raise anything
        raise KernelError(f"cannot be called: {type(e).__name__}: {e}") from e
    if any(not torch.equal(a, b) for a, b in zip(before, sample.inputs, strict=True)):
        raise KernelError("writes into its inputs")
    want = _tensors(sample.bind(reference)())
    if [(t.shape, t.dtype) for t in got] != [(t.shape, t.dtype) for t in want]:
        raise KernelError(f"gives {_spell(got)} where the reference gives {_spell(want)}")
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        wide = b.float()
        parts = (a.float() - wide).abs() / (wide.abs() + wide.square().mean().sqrt()).clamp(min=1e-20)
        worst = max(worst, parts.nan_to_num(nan=float("inf")).max().item())
    return worst


@torch.inference_mode()
def seconds(run: Run, device: torch.device, repeats: int = 20) -> float:
    """The median of one call, after a few that do not count. On a GPU by its own clock, with an L2 cache of other data."""
    for _ in range(3):
        run()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    other = torch.empty(L2_BYTES, dtype=torch.uint8, device=device)
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    with torch.cuda.device(device):
        for begin, end in pairs:
            other.zero_()  # takes longer than a launch, so that only the kernel's own time is between the events
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1000


def _tensors(out: Any) -> tuple[Tensor, ...]:
    out = out if isinstance(out, tuple) else (out,)
    if not all(isinstance(t, Tensor) for t in out):
        raise TypeError(f"it gave {', '.join(type(t).__name__ for t in out)}, not tensors")
    return out


def _spell(tensors: Sequence[Tensor]) -> str:
    return " and ".join(f"{tuple(t.shape)} {str(t.dtype)[6:]}" for t in tensors)
