"""How fast this device copies its memory and multiplies matrices: what figures are held against."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from slipstream.plan import dtype_name

_TIMES, _INNER = 5, 8


@dataclass(frozen=True, slots=True)
class Machine:
    """The best of several runs.

    Attributes:
        bandwidth: bytes a second, read and written, of a large copy from the device's memory to itself.
        flops: operations a second of a square product of matrices of `size` in `dtype`.
    """

    name: str
    bandwidth: float
    flops: float
    dtype: str
    size: int


def measure_machine(name: str, device: torch.device, dtype: torch.dtype) -> Machine:
    """Takes 2.4 GiB on a GPU, or what is left, and half a GiB on a CPU, for about a second."""
    gpu = device.type == "cuda"
    half = (1 << 30) if gpu else (1 << 28)
    if gpu:
        torch.cuda.empty_cache()
        half = min(half, torch.cuda.mem_get_info(device)[0] // 4)
    size = 8192 if gpu else 2048
    copy = _copy(device, half)
    product = _product(device, dtype, size)
    return Machine(name, 2 * half / copy, 2 * size**3 / product, dtype_name(dtype), size)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@torch.inference_mode()
def _best(device: torch.device, run: Callable[[], object]) -> float:
    """Seconds of one run."""
    inner = _INNER if device.type == "cuda" else 1
    best = float("inf")
    for _ in range(_TIMES + 1):  # the first wakes it up
        wait(device)
        start = time.perf_counter()
        for _ in range(inner):
            run()
        wait(device)
        best = min(best, (time.perf_counter() - start) / inner)
    return best


def _copy(device: torch.device, size: int) -> float:
    here, there = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return _best(device, lambda: there.copy_(here))


def _product(device: torch.device, dtype: torch.dtype, size: int) -> float:
    a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    return _best(device, lambda: torch.mm(a, b, out=out))
