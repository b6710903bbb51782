"""The router's two ways of weighing, against float64; the Triton kernel is in test_small_triton.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slipstream.ops.router.reference import router

TOKENS, EXPERTS, TOP_K = 13, 7, 3


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("softmax_first", [True, False])
def test_router(softmax_first: bool, renormalize: bool) -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(TOKENS, 10), torch.randn(EXPERTS, 10)
    logits = x @ weight.T
    ids, weights = router(x, lambda x: x @ weight.T, TOP_K, softmax_first=softmax_first, renormalize=renormalize)
    assert ids.shape == weights.shape == (TOKENS, TOP_K)
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    for row, chosen, weight in zip(logits.double(), ids, weights, strict=True):
        assert chosen.tolist() == row.argsort(descending=True)[:TOP_K].tolist()
        whole = row.softmax(-1)[chosen]
        # A softmax of the best alone is the softmax of all, made to add up to one.
        want = whole / whole.sum() if renormalize or not softmax_first else whole
        torch.testing.assert_close(weight.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softmax_first", [True, False])
@pytest.mark.parametrize("row", [[1.0, 2.0, 0.0, 2.0, 2.0, 1.0], [0.0, -0.0, 0.0, -0.0, -1.0, 0.0]])
def test_of_equal_ones_the_lower_number(row: list[float], softmax_first: bool) -> None:
    ids, _ = router(torch.tensor([row], dtype=torch.bfloat16), torch.clone, 4, softmax_first=softmax_first)
    assert ids.tolist() == [sorted(range(6), key=lambda i: (-row[i], i))[:4]]


def test_nan_stays_in_its_row() -> None:
    logits: Any = torch.randn(3, EXPERTS)
    logits[1, 4] = torch.nan
    for softmax_first in (True, False):
        ids, weights = router(logits, torch.clone, TOP_K, softmax_first=softmax_first)
        assert weights.isnan().any(-1).tolist() == [False, True, False]
        assert ((ids >= 0) & (ids < EXPERTS)).all()
