"""Gated activations against formulas in float64 and the modules of transformers."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.activations import ACT2FN

from slipstream.ops.activation.native import activation as native_activation
from slipstream.ops.activation.reference import activation


@pytest.mark.parametrize(
    ("kind", "name"),
    [("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh"), ("gelu_tanh", "gelu_new")],
)
def test_gate_comes_first_and_is_activated(kind: str, name: str) -> None:
    torch.manual_seed(0)
    gate, up = 4 * torch.randn(2, 7, 5, 12).double()
    want = ACT2FN[name](gate) * up
    torch.testing.assert_close(activation(torch.cat((gate, up), -1), kind), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("limit", [7.0, 1.5])
def test_clamped_swiglu(limit: float) -> None:
    values = [-30.0, -7.1, -2.0, -0.3, 0.0, 0.9, 1.6, 6.9, 7.2, 40.0]
    for g in values:
        for u in values:
            gate, up = min(g, limit), max(-limit, min(u, limit))
            want = gate / (1 + math.exp(-1.702 * gate)) * (up + 1)
            got = activation(torch.tensor([[g, u]], dtype=torch.float64), "swiglu_clamped", limit)
            assert got.item() == pytest.approx(want, rel=1e-12, abs=1e-12)


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="relu"):
        activation(torch.zeros(1, 2), "relu")


@pytest.mark.parametrize("kind", ["silu", "swiglu_clamped"])
def test_what_is_wide_is_rounded_once(kind: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(5, 64) * 3
    for one in (activation, native_activation):
        assert torch.equal(one(x, kind, 7.0, torch.bfloat16), one(x, kind, 7.0).bfloat16())
        assert (
            one(x.bfloat16(), kind).dtype == torch.bfloat16
            and one(x.bfloat16(), kind, 7.0, torch.float32).dtype == torch.float32
        )
