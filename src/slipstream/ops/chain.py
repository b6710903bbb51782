"""Kernels that start before the one before them has ended (programmatic dependent launch, on Hopper and later).

A kernel of the chain says at once that the next may start, and waits (gdc_wait) for all that went before it. What it waited
for had waited itself, so behind its wait everything earlier is done. Before it, a kernel may read only what no kernel of
the step writes (weights, positions, page tables), and may write nothing: an earlier one may still read what stood there.
But a kernel whose predecessor says so only after its own wait may, before it waits itself, read and write what is older than that
predecessor.
At least one program of every kernel has to wait, or the chain is broken for those that come after it.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl


@cache
def chain(device: torch.device) -> dict[str, bool]:
    """Options of a launch: whether the kernel is one of the chain, which CHAIN tells the kernel itself."""
    can = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9
    return {"CHAIN": can, "launch_pdl": can}


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@triton.jit
def prefetch(pointers):  # type: ignore[no-untyped-def]
    """What a kernel will read is on its way to the L2, before it waits."""
    # What helpers need stands in them, as tests/ops/test_keys.py says why.
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )
