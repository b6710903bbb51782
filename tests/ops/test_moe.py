"""Mixture of experts: every implementation against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from slipstream.ops import moe
from slipstream.ops.activation.reference import activation

TOKENS, HIDDEN, INNER, EXPERTS, TOP_K = 13, 24, 10, 7, 3


def _case(bias: bool, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    ids = torch.stack([torch.randperm(EXPERTS - 1)[:TOP_K] for _ in range(TOKENS)])  # the last expert gets nothing
    weights = torch.rand(TOKENS, TOP_K)
    case = {
        "x": torch.randn(TOKENS, HIDDEN),
        "gate_up": torch.randn(EXPERTS, 2 * INNER, HIDDEN) / 4,
        "down": torch.randn(EXPERTS, HIDDEN, INNER) / 3,
        "gate_up_bias": torch.randn(EXPERTS, 2 * INNER) if bias else None,
        "down_bias": torch.randn(EXPERTS, HIDDEN) if bias else None,
    }
    return {k: None if v is None else v.to(dtype) for k, v in case.items()} | {"ids": ids, "weights": weights}


def _called(case: dict[str, Any]) -> dict[str, Any]:
    """The stacks as the layers of experts that an implementation calls."""

    def layer(name: str) -> Callable[[torch.Tensor, int], torch.Tensor]:
        weight, bias = case[name], case[f"{name}_bias"]
        return lambda x, e: F.linear(x, weight[e], None if bias is None else bias[e])

    return {k: case[k] for k in ("x", "ids", "weights")} | {k: layer(k) for k in ("gate_up", "down")}


def _oracle(case: dict[str, Any], kind: str, limit: float) -> torch.Tensor:
    """All experts on all tokens in float64, then a weighted sum."""
    case = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in case.items()}
    h = torch.einsum("th,eih->tei", case["x"], case["gate_up"])
    h = h if case["gate_up_bias"] is None else h + case["gate_up_bias"]
    gate, up = h[..., :INNER], h[..., INNER:]
    if kind == "silu":
        h = gate * torch.sigmoid(gate) * up
    else:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        h = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    h = torch.einsum("tei,ehi->teh", h, case["down"])
    h = h if case["down_bias"] is None else h + case["down_bias"]
    share = torch.zeros(TOKENS, EXPERTS, dtype=torch.float64).scatter(1, case["ids"], case["weights"])
    return torch.einsum("te,teh->th", share, h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "bias"), [("silu", False), ("silu", True), ("swiglu_clamped", True)])
@pytest.mark.parametrize("impl", moe.IMPLS[1:], ids=lambda i: i.name)  # triton: test_moe_triton
def test_experts(impl: Any, kind: str, bias: bool, dtype: torch.dtype) -> None:
    case = _case(bias, dtype)
    got = impl.load().experts(**_called(case), activation=activation, kind=kind, limit=1.1)
    assert got.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(got.double(), _oracle(case, kind, 1.1), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", moe.IMPLS[1:], ids=lambda i: i.name)
def test_experts_of_other_ranks_count_as_zero(impl: Any) -> None:
    """Two ranks' parts, added up, are the whole."""
    case = _case(True, torch.float32)
    wanted = _oracle(case, "silu", 1.1)
    parts = [case["ids"].where(case["ids"] < 4, -1), case["ids"].where(case["ids"] >= 4, -1)]
    run = impl.load().experts
    found = sum(run(**_called(case | {"ids": ids}), activation=activation, kind="silu", limit=1.1) for ids in parts)
    torch.testing.assert_close(found.double(), wanted, rtol=4e-6, atol=4e-6)
