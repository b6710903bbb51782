"""Writing keys and values into their slots."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slipstream.ops import store_kv

TOKENS, KV_HEADS, HEAD_DIM, SLOTS = 5, 2, 6, 17


@pytest.mark.parametrize("impl", store_kv.IMPLS, ids=lambda i: i.name)
def test_store(impl: Any) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(TOKENS, 3 * KV_HEADS, HEAD_DIM)  # as in a layer: keys and values are parts of one tensor
    k, v = qkv[:, :KV_HEADS], qkv[:, 2 * KV_HEADS :]
    keys, values = torch.randn(2, SLOTS, KV_HEADS, HEAD_DIM)
    slots = torch.tensor([16, 3, 0, 9, 4])
    before = keys.clone(), values.clone()
    impl.load()(k, v, keys, values, slots)
    for cache, new, old in ((keys, k, before[0]), (values, v, before[1])):
        for slot in range(SLOTS):
            where = (slots == slot).nonzero()
            assert torch.equal(cache[slot], new[where.item()] if len(where) else old[slot])
