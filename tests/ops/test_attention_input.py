"""Head norms, rotation and the write into the cache, against float64; the Triton kernel is in test_small_triton.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream.ops import attention_input
from slipstream.ops.attention_input.reference import attention_input as reference
from slipstream.ops.rope import Turns

TOKENS, HEADS, KV_HEADS, HEAD_DIM, SLOTS = 5, 6, 2, 20, 17


def case(
    dim: int | None, norms: bool, dtype: torch.dtype, device: str = "cpu", sizes: tuple[int, ...] = ()
) -> dict[str, Any]:
    """Arguments of the op: qkv within a wider tensor, a cache of random numbers, positions of any size."""
    tokens, heads, kv_heads, head_dim, slots = sizes or (TOKENS, HEADS, KV_HEADS, HEAD_DIM, SLOTS)
    torch.manual_seed(tokens)
    wide = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim + 8).to(device, dtype)
    positions = torch.randint(0, 5000, (tokens,), device=device)
    turns = None if dim is None else Turns(positions, torch.rand(dim // 2, device=device), 1.3, dtype)
    weights = [(torch.rand(head_dim) + 0.5).to(device) for _ in range(2)]
    weights[0] = weights[0].to(dtype)  # one in the dtype of the model, one in float32 as Gemma's
    return {
        "qkv": wide[:, 8:].unflatten(1, (heads + 2 * kv_heads, head_dim)),
        "turns": turns,
        "norms": (*weights, 0.3) if norms else None,
        "keys": torch.randn(slots, kv_heads, head_dim).to(device, dtype),
        "values": torch.randn(slots, kv_heads, head_dim).to(device, dtype),
        "slots": torch.randperm(slots)[:tokens].to(device),
    }


def oracle(qkv: Tensor, turns: Turns | None, norms: Any, keys: Tensor, values: Tensor, slots: Tensor) -> list[Tensor]:
    """In float64, a slot at a time: queries, keys and values as they are afterwards."""
    x, kv_heads, keys, values = qkv.double(), keys.shape[1], keys.double(), values.double()
    q, k, v = x.split((x.shape[1] - 2 * kv_heads, kv_heads, kv_heads), 1)
    if norms is not None:
        q, k = (
            h / (h.pow(2).mean(-1, keepdim=True) + norms[2]).sqrt() * w.double()
            for h, w in ((q, norms[0]), (k, norms[1]))
        )
    if turns is not None:
        half = len(turns.frequencies)
        angle = (turns.positions.float()[:, None] * turns.frequencies).double()[:, None]  # the angle is a float32
        turn = torch.polar(torch.full_like(angle, turns.factor), angle)

        def rotate(h: Tensor) -> Tensor:
            pairs = torch.complex(h[..., :half], h[..., half : 2 * half]) * turn
            return torch.cat((pairs.real, pairs.imag, h[..., 2 * half :]), -1)

        q, k = rotate(q), rotate(k)
    for row, slot in enumerate(slots.tolist()):
        keys[slot], values[slot] = k[row], v[row]
    return [q, keys, values]


def run(call: Any, dim: int | None, norms: bool, dtype: torch.dtype, device: str = "cpu", sizes: Any = ()) -> float:
    """The largest error. What no token was written to must be as it was."""
    asked = case(dim, norms, dtype, device, sizes)
    want, before = oracle(**asked), asked["qkv"].clone()
    q = call(**asked)
    assert torch.equal(before, asked["qkv"]) and q.dtype == dtype
    assert torch.equal(asked["values"].double(), want[2])
    found = (q, asked["keys"], asked["values"])
    return max((mine.double() - theirs).abs().max().item() for mine, theirs in zip(found, want, strict=True))


@pytest.mark.parametrize("norms", [False, True], ids=["", "norms"])
@pytest.mark.parametrize("dim", [None, HEAD_DIM, 12], ids=["unturned", "whole", "partial"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", [i for i in attention_input.IMPLS if i.name != "triton"], ids=lambda i: i.name)
def test_against_float64(impl: Any, dim: int | None, norms: bool, dtype: torch.dtype) -> None:
    assert run(impl.load(), dim, norms, dtype) < (1e-5 if dtype == torch.float32 else 0.06)


def test_torch_gives_what_the_reference_gives() -> None:
    torch_one = next(i for i in attention_input.IMPLS if i.name == "torch").load()
    one, other = case(HEAD_DIM, True, torch.float32), case(HEAD_DIM, True, torch.float32)
    torch.testing.assert_close(torch_one(**one), reference(**other), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one["keys"], other["keys"], rtol=1e-6, atol=1e-6)
