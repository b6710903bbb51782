"""A machine with an H100, as far as a plan and Triton's compiler can tell: nothing can be launched on it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from slipstream.checkpoint.load import load
from slipstream.checkpoint.open import open_random
from slipstream.config import EngineConfig
from slipstream.engine.runner import Runner
from slipstream.hardware import Hardware
from slipstream.parallel.collectives import Wires
from slipstream.parallel.shares import Ranks
from slipstream.plan import Plan, make_plan

CARD = "NVIDIA H100 80GB HBM3"
DEVICE = 7  # Triton keeps kernels for each device: those of a device that is there stay as they are


class Driver:
    def get_current_device(self) -> int:
        return DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def compiler(cache: Path) -> Iterator[None]:
    """Triton compiles for Hopper, into this folder."""
    config, knobs = triton.runtime.driver, triton.knobs.cache
    before = config._active, knobs.dir
    config.set_active(Driver())
    knobs.dir = str(cache)
    try:
        yield
    finally:
        config._active, knobs.dir = before


def plan_for(
    folder: Path, config: dict[str, Any], patch: pytest.MonkeyPatch, wires: Wires | None = None, **options: Any
) -> Plan:
    """What would run there. Nothing is loaded.

    Args:
        wires: of the first of two ranks.
    """

    def chain(device: object) -> dict[str, bool]:
        return {"CHAIN": True, "launch_pdl": True}

    for name in ("attention", "attention_input", "moe", "norm", "reduce", "router"):
        patch.setattr(f"slipstream.ops.{name}.triton.chain", chain)
    for module in ("attention.decode", "linear.triton_few"):
        patch.setattr(f"slipstream.ops.{module}.chain", chain)
    patch.setattr("slipstream.ops.moe.triton._hopper", lambda device: True)
    for module in ("moe.triton", "attention.decode", "linear.triton_slabs"):
        patch.setattr(f"slipstream.ops.{module}.processors", lambda device: 132)
    patch.setattr("slipstream.plan.layout.find_hardware", lambda asked, why: Hardware("cuda", CARD, 64 << 30, (9, 0)))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    ranks = None if wires is None else Ranks(0, 2)
    return make_plan(EngineConfig(weights="random", **options), open_random(folder), ranks=ranks, wires=wires)


def runner_for(folder: Path, config: dict[str, Any], patch: pytest.MonkeyPatch, **options: Any) -> Runner:
    """The model with its memory on the CPU, and the kernels of the card."""
    plan = plan_for(folder, config, patch, kv_cache_memory_bytes=1 << 24, **options)
    plan = dataclasses.replace(plan, device=torch.device("cpu"))
    patch.setattr("slipstream.ops.linear.torch.Dense.wide", _wide)  # torch has it for CUDA alone
    load(plan.model, plan.loads, open_random(folder), plan.device)
    return Runner(plan, plan.model)


def _wide(
    self: object,
    x: torch.Tensor,
    packed: tuple[torch.Tensor, ...],
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    return torch.empty(len(x), len(packed[0]), dtype=None if bias is None else x.dtype) if out is None else out
