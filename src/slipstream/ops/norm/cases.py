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
    held = ("float32",) if case.dtype == "float32" else (case.dtype, "float32")
    return [{"residual": dtype, "delta": delta} for dtype in held for delta in (True, False)]


def shape_of(config: ModelConfig) -> dict[str, Any]:
    return {"width": config.hidden_size}


def facts(shape: Mapping[str, Any]) -> dict[str, Any]:
    return {"width": shape["width"]}


def sample(case: Case, tokens: int, shape: Mapping[str, Any]) -> Sample:
    width, dtype = shape["width"], getattr(torch, case.dtype)
    held = getattr(torch, shape.get("residual", case.dtype))
    x, more = (draw(i, tokens, width, dtype=d, device=case.device) for i, d in ((1, held), (2, dtype)))
    delta = more if shape["delta"] else None
    kept = torch.float32 if case.get("wide_weight") else dtype
    weight = draw(3, width, dtype=kept, device=case.device) * 0.2 + 1

    def bind(add_norm: Any) -> Run:
        return lambda: add_norm(x, delta, weight, 1e-5, dtype)

    return Sample(bind, (x, more, weight), (2 * x.nbytes if shape["delta"] else x.nbytes) + 2 * more.nbytes)
