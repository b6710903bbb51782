"""The cache's tensors: shapes, bytes, and that a layer's view is the memory itself."""

from __future__ import annotations

import torch

from slipstream.cache.spec import CacheGroup
from slipstream.cache.storage import Storage

GROUPS = (CacheGroup(None, (1, 3), 2, 16), CacheGroup(5, (0, 2, 4), 2, 16))


def storage(dtype: torch.dtype = torch.float32) -> Storage:
    return Storage(GROUPS, (7, 3), 4, dtype, torch.device("cpu"))


def test_bytes_are_those_of_the_spec() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        want = sum(n * 4 * g.bytes_per_token(dtype.itemsize) for g, n in zip(GROUPS, (7, 3), strict=True))
        assert storage(dtype).nbytes == want


def test_each_layer_has_memory_of_its_own() -> None:
    s = storage()
    for i in range(5):
        for j, tensor in enumerate(s.layer(i)):
            assert tensor.shape == ((28, 2, 16) if i in (1, 3) else (12, 2, 16))
            tensor.fill_(10 * i + j)
    for i in range(5):
        for j, tensor in enumerate(s.layer(i)):
            assert (tensor == 10 * i + j).all()
    assert [s.group_of(i) for i in range(5)] == [1, 0, 1, 0, 1]


def test_slots_count_through_the_pages() -> None:
    s = storage()
    keys, _ = s.layer(3)
    keys[2 * 4 + 3] = 5.0
    assert (s.keys[0][1, 2, 3] == 5.0).all()
