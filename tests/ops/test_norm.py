"""RMSNorm: every implementation against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slipstream.ops import norm

SHAPES = [(13, 48), (5, 6, 20)]


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=["weight32", "weight16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["x32", "x16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", [i for i in norm.IMPLS if i.name != "triton"], ids=lambda i: i.name)
def test_norm(impl: Any, shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(shape)).to(dtype)
    weight = torch.rand(shape[-1]).add_(0.5).to(weight_dtype)
    eps = 0.7  # large, so that a forgotten one shows
    same, got = impl.load()(x, None, weight, eps)
    assert same is x
    h = x.double()
    want = h / (h.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    assert got.dtype == dtype and got.shape == x.shape
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", [i for i in norm.IMPLS if i.name != "triton"], ids=lambda i: i.name)
def test_a_slice_of_a_wider_tensor(impl: Any) -> None:
    """Queries and keys come as parts of one tensor."""
    torch.manual_seed(1)
    wide, weight = torch.randn(7, 5, 16), torch.rand(16)
    part = wide[:, 1:4]
    call = impl.load()
    torch.testing.assert_close(call(part, None, weight, 1e-5)[1], call(part.contiguous(), None, weight, 1e-5)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", [i for i in norm.IMPLS if i.name != "triton"], ids=lambda i: i.name)
def test_the_sum_is_rounded_before_it_is_normalised(impl: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x, delta, weight = (3 * torch.randn(7, 48)).to(dtype), torch.randn(7, 48).to(dtype), torch.rand(48).to(dtype)
    before, call = x.clone(), impl.load()
    total, got = call(x, delta, weight, 1e-5)
    assert torch.equal(total, x + delta) and torch.equal(x, before)
    assert torch.equal(got, call(x + delta, None, weight, 1e-5)[1])
