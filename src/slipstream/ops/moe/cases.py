"""Calls of a mixture of experts, to check and to time an implementation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.config import ModelConfig
from slipstream.errors import ConfigError
from slipstream.ops.activation import reference as activations
from slipstream.ops.choose import Case
from slipstream.ops.formats import Weight, decode, encode
from slipstream.ops.moe import ExpertsKernel
from slipstream.ops.sample import Run, Sample, draw

SMALL = {"experts": 5, "top_k": 2, "hidden": 256, "inner": 128, "kind": "swiglu_clamped", "format": "dense"}


def checks(case: Case, shape: Mapping[str, Any]) -> list[dict[str, Any]]:
    formats, kinds = case.get("formats") or ("dense",), case.get("kinds") or ("swiglu_clamped",)
    return [{"format": format, "kind": kind} for format in sorted(formats) for kind in sorted(kinds)]


def shape_of(config: ModelConfig) -> dict[str, Any]:
    if not config.num_experts:
        raise ConfigError(f"model: a {config.model_type} model has no experts; name a mixture, or its sizes (shape)")
    kind = "swiglu_clamped" if config.model_type == "gpt_oss" else config.hidden_act
    return {
        "experts": config.num_experts, "top_k": config.num_experts_per_tok, "hidden": config.hidden_size,
        "inner": config.moe_intermediate_size, "kind": kind, "format": "mxfp4" if config.model_type == "gpt_oss" else "dense",
    }  # fmt: skip


def facts(shape: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {(2 * shape["inner"], shape["hidden"]), (shape["hidden"], shape["inner"])}
    return {"kinds": {shape["kind"]}, "formats": {shape["format"]}, "sizes": sizes}


class Stack:
    """What `layers/linear.py:Experts` is to an implementation."""

    def __init__(self, weight: Weight, bias: Tensor, dtype: torch.dtype, gated: bool) -> None:
        self.weight, self.bias, self.shape = weight, bias, weight.shape
        self.stack: tuple[Any, ...] = ()
        self._dtype, self._gated = dtype, gated
        self._numbers: Tensor | None = None

    def prepared(self, kernel: ExpertsKernel) -> Stack:
        """A copy as the kernel wants it: `prepare` may write over what it is given."""
        made = Stack(self.weight, self.bias, self._dtype, self._gated)
        if kernel.prepare is not None:
            made.stack = kernel.prepare(self.weight.map(torch.clone), self._dtype, gated=self._gated)
        return made

    def __call__(self, x: Tensor, expert: int) -> Tensor:
        if self._numbers is None:
            self._numbers = decode(self.weight, self._dtype)
        return F.linear(x, self._numbers[expert], self.bias[expert])


def sample(case: Case, tokens: int, shape: Mapping[str, Any]) -> Sample:
    number, top_k, hidden, inner = (shape[name] for name in ("experts", "top_k", "hidden", "inner"))
    dtype, device = getattr(torch, case.dtype), case.device
    x = draw(10, tokens, hidden, dtype=dtype, device=device)
    scores = draw(11, tokens, number, dtype=torch.float32, device=device)
    shares, ids = scores.topk(top_k)
    shares = shares.softmax(-1).to(dtype)
    stacks = []
    for seed, (rows, width), gated in ((12, (2 * inner, hidden), True), (13, (hidden, inner), False)):
        values = draw(seed, number, rows, width, dtype=torch.float32, device=device) * width**-0.5
        weight = Weight("dense", values.to(dtype), (number, rows, width))
        if shape["format"] != "dense":
            weight = encode(values, shape["format"], 32)
        stacks.append(Stack(weight, draw(seed + 9, number, rows, dtype=dtype, device=device) * 0.3, dtype, gated))

    def bind(kernel: Any) -> Run:
        gate_up, down = (stack.prepared(kernel) for stack in stacks) if isinstance(kernel, ExpertsKernel) else stacks
        experts = kernel.experts if isinstance(kernel, ExpertsKernel) else kernel
        return lambda: experts(
            x, ids, shares, gate_up, down, activations.activation, kind=shape["kind"], limit=7.0
        )  # fmt: skip

    touched = min(number, tokens * top_k) / number
    return Sample(bind, (x,), int(sum(stack.weight.nbytes for stack in stacks) * touched) + 2 * x.nbytes)
