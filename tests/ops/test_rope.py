"""Rotary embedding: frequencies against transformers, the rotations against complex numbers in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from slipstream.config import RopeConfig
from slipstream.ops.attention_input import torch as fast
from slipstream.ops.rope import Turns, angles, inverse_frequencies, rope

TOKENS, HEADS, HEAD_DIM = 13, 6, 20
ROPES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {"factor": 2.5}),
    ("llama3", {"factor": 8.0, "low_freq_factor": 1.5, "high_freq_factor": 5.0}),
    ("yarn", {"factor": 16.0}),
    ("yarn", {"factor": 16.0, "truncate": False, "beta_fast": 20.0, "beta_slow": 2.0}),
    ("yarn", {"factor": 16.0, "attention_factor": 1.7}),
    ("yarn", {"factor": 16.0, "mscale": 0.7, "mscale_all_dim": 1.3}),
    ("yarn", {"factor": 0.5}),
]


@pytest.mark.parametrize(("rule", "numbers"), ROPES, ids=[f"{r}-{i}" for i, (r, _) in enumerate(ROPES)])
def test_frequencies_are_those_of_transformers(rule: str, numbers: dict[str, Any]) -> None:
    params = {"rope_type": rule, "rope_theta": 5e4, "original_max_position_embeddings": 512, **numbers}
    config = transformers.LlamaConfig(head_dim=128, max_position_embeddings=8192, rope_parameters=params)
    want, want_factor = ROPE_INIT_FUNCTIONS[rule](config)
    mine = RopeConfig(theta=5e4, kind=rule, dim=128, original_max_position=512, **numbers)
    freq, factor = inverse_frequencies(mine)
    torch.testing.assert_close(freq, want, rtol=1e-6, atol=0)
    assert factor == pytest.approx(want_factor, rel=1e-12)
    plain, _ = inverse_frequencies(RopeConfig(theta=5e4, dim=128))
    assert not torch.equal(freq, plain)


def test_default_frequencies() -> None:
    freq, factor = inverse_frequencies(RopeConfig(theta=1e3, dim=HEAD_DIM))
    want = [1e3 ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2)]
    assert factor == 1 and freq.tolist() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("dim", [HEAD_DIM, 12], ids=["whole", "partial"])
@pytest.mark.parametrize("turn_by", [rope, fast.rope], ids=["reference", "torch"])
def test_a_pair_turns_as_a_complex_number(turn_by: Any, dim: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(TOKENS, HEADS, HEAD_DIM)
    positions = torch.randint(0, 5000, (TOKENS,))
    freq, factor = torch.rand(dim // 2), 1.3
    got = turn_by(x, *angles(positions, freq, factor, torch.float32))
    pairs = torch.complex(x[..., : dim // 2].double(), x[..., dim // 2 : dim].double())
    turn = (positions.float()[:, None] * freq).double()[:, None]  # the angle itself is a float32
    turned = pairs * torch.polar(torch.full_like(turn, factor), turn)
    want = torch.cat((turned.real, turned.imag, x[..., dim:].double()), -1).float()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_equals_the_reference(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = torch.randn(TOKENS, HEADS, HEAD_DIM).to(dtype)
    turns = angles(torch.arange(TOKENS) * 37, torch.rand(HEAD_DIM // 2), 1.0, dtype)
    mine, reference = fast.rope(x, *turns), rope(x, *turns)
    assert mine.dtype == reference.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(mine, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("row_by_row", [False, True])
def test_the_turns_of_a_step_are_made_once(row_by_row: bool) -> None:
    positions, freq = torch.arange(TOKENS) * 37, torch.rand(HEAD_DIM // 2)
    turns = Turns(positions, freq, 1.3, torch.float32, row_by_row)
    assert turns.cos_sin is turns.cos_sin
    for mine, want in zip(turns.cos_sin, angles(positions, freq, 1.3, torch.float32), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-6, atol=1e-6)
