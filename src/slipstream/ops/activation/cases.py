"""Calls of gated activations, to check and to time an implementation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from slipstream.config import ModelConfig
from slipstream.ops.choose import Case
from slipstream.ops.sample import Run, Sample, draw

SMALL = {"inner": 96, "kind": "silu"}


def checks(case: Case, shape: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"kind": kind} for kind in case.get("kinds", ("silu",))]


def shape_of(config: ModelConfig) -> dict[str, Any]:
    moe = bool(config.num_experts)
    kind = "swiglu_clamped" if config.model_type == "gpt_oss" else config.hidden_act
    return {"inner": config.moe_intermediate_size if moe else config.intermediate_size, "kind": kind}


def facts(shape: Mapping[str, Any]) -> dict[str, Any]:
    return {"kinds": (shape["kind"],)}


def sample(case: Case, tokens: int, shape: Mapping[str, Any]) -> Sample:
    x = draw(4, tokens, 2 * shape["inner"], dtype=getattr(torch, case.dtype), device=case.device) * 2

    def bind(activation: Any) -> Run:
        return lambda: activation(x, shape["kind"], 7.0)

    return Sample(bind, (x,), x.nbytes * 3 // 2)
