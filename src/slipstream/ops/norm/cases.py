"""Calls of RMSNorm, to check and to time an implementation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from slipstream.config import ModelConfig
from slipstream.ops.choose import Case
from slipstream.ops.sample import Run, Sample, draw

SMALL = {"width": 96, "delta": True}


def checks(case: Case, shape: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What to change in the shape, for each call that a new implementation is held against the reference with."""
    return [{}, {"delta": False}]


def shape_of(config: ModelConfig) -> dict[str, Any]:
    return {"width": config.hidden_size}


def facts(shape: Mapping[str, Any]) -> dict[str, Any]:
    return {"width": shape["width"]}


def sample(case: Case, tokens: int, shape: Mapping[str, Any]) -> Sample:
    width, dtype = shape["width"], getattr(torch, case.dtype)
    x, more = (draw(seed, tokens, width, dtype=dtype, device=case.device) for seed in (1, 2))
    delta = more if shape["delta"] else None
    kept = torch.float32 if case.get("wide_weight") else dtype
    weight = draw(3, width, dtype=kept, device=case.device) * 0.2 + 1

    def bind(add_norm: Any) -> Run:
        return lambda: add_norm(x, delta, weight, 1e-5)

    return Sample(bind, (x, more, weight), (4 if shape["delta"] else 2) * x.nbytes)
