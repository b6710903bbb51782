"""Attention over pages: the reference against a float64 loop over dense keys, sdpa against the reference."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slipstream.batch import Batch, build_batch
from slipstream.cache.spec import CacheGroup
from slipstream.ops import attention
from slipstream.ops.choose import Case
from slipstream.request import Chunk, PageTable

HEADS, KV_HEADS, HEAD_DIM, PAGE = 6, 2, 16, 3
SCALE = 0.37
CPU = Case("cpu", "float32")
IMPLS: dict[str, Callable[..., Tensor]] = {i.name: i.load() for i in attention.IMPLS if i.reject(CPU) is None}
# (start, queries) of each sequence
DECODE = [(0, 1), (22, 1), (9, 1)]
ALONE = [(22, 1)]
PROMPTS = [(0, 13), (0, 4), (0, 1)]
MIXED = [(22, 1), (0, 13), (7, 5), (0, 1), (12, 8)]
STEPS = {"decode": DECODE, "alone": ALONE, "prompts": PROMPTS, "mixed": MIXED}


class World:
    """Sequences with dense keys and values, the same laid out in pages, and the batch of one step."""

    def __init__(self, chunks: list[tuple[int, int]], window: int | None, scattered: bool, dtype: torch.dtype) -> None:
        torch.manual_seed(len(chunks) + 7)
        group = CacheGroup(window, (0,), KV_HEADS, HEAD_DIM)
        tables = []
        used = 0
        for start, count in chunks:
            first = group.first_visible(start) // PAGE
            pages = -(-(start + count) // PAGE) - first
            tables.append((first, list(range(used, used + pages))))
            used += pages
        self.chunks = chunks
        if scattered:
            order = torch.randperm(used).tolist()
            tables = [(first, [order[p] for p in pages]) for first, pages in tables]
        slots = used * PAGE
        self.keys = torch.full((slots, KV_HEADS, HEAD_DIM), math.nan, dtype=dtype)  # what nobody wrote is never read
        self.values = self.keys.clone()
        self.dense: list[tuple[Tensor, Tensor]] = []
        made = []
        for i, ((start, count), (first, pages)) in enumerate(zip(chunks, tables, strict=True)):
            k, v = torch.randn(2, start + count, KV_HEADS, HEAD_DIM).to(dtype)
            self.dense.append((k, v))
            for position in range(group.first_visible(start), start + count):
                slot = pages[position // PAGE - first] * PAGE + position % PAGE
                self.keys[slot], self.values[slot] = k[position], v[position]
            made.append(Chunk(i, start, (1,) * count, (PageTable(first, tuple(pages)),), True))
        self.batch: Batch = build_batch(made, [group], PAGE, torch.device("cpu"))
        self.q = torch.randn(sum(n for _, n in chunks), HEADS, HEAD_DIM).to(dtype)
        self.window = window

    def run(self, name: str, softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:
        caches = (self.keys, self.values)
        group = self.batch.groups[0]
        return IMPLS[name](self.q, *caches, self.batch, group, scale=SCALE, softcap=softcap, sinks=sinks)

    def oracle(self, softcap: float | None, sinks: Tensor | None) -> Tensor:
        """One query and one head at a time, in float64."""
        rows = []
        at = 0
        for (start, count), (keys, values) in zip(self.chunks, self.dense, strict=True):
            for position in range(start, start + count):
                low = 0 if self.window is None else max(0, position - self.window + 1)
                for h in range(HEADS):
                    k, v = (c[low : position + 1, h // (HEADS // KV_HEADS)].double() for c in (keys, values))
                    scores = SCALE * (k @ self.q[at, h].double())
                    if softcap is not None:
                        scores = softcap * torch.tanh(scores / softcap)
                    weights = scores.exp()
                    total = weights.sum() + (0 if sinks is None else sinks[h].double().exp())
                    rows.append(weights @ v / total)
                at += 1
        return torch.stack(rows).view(at, HEADS, HEAD_DIM)


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("scattered", [False, True], ids=["neighbours", "scattered"])
@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", IMPLS)
def test_every_implementation_against_float64(
    name: str, step: str, window: int | None, scattered: bool, sinks: bool
) -> None:
    world = World(STEPS[step], window, scattered, torch.float32)
    extra = torch.randn(HEADS) * 2 if sinks else None
    torch.testing.assert_close(world.run(name, sinks=extra).double(), world.oracle(None, extra), rtol=0, atol=2e-6)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("step", STEPS)
def test_softcap(step: str, window: int | None) -> None:
    world = World(STEPS[step], window, True, torch.float32)
    got, want = world.run("reference", softcap=0.8), world.oracle(0.8, None)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)
    assert not torch.allclose(got, world.run("reference"), atol=1e-2)


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("step", STEPS)
def test_sdpa_in_bfloat16(step: str, window: int | None, sinks: bool) -> None:
    world = World(STEPS[step], window, True, torch.bfloat16)
    extra = torch.randn(HEADS) * 2 if sinks else None
    fast, reference = world.run("sdpa", sinks=extra), world.run("reference", sinks=extra)
    assert fast.dtype == torch.bfloat16
    torch.testing.assert_close(fast.float(), reference.float(), rtol=0, atol=3e-2)


def test_sdpa_says_what_it_cannot_do() -> None:
    sdpa = next(i for i in attention.IMPLS if i.name == "sdpa")
    assert "soft-capping" in str(sdpa.reject(Case("cpu", "float32", None, {"softcap": 50.0})))
    assert "sinks" in str(sdpa.reject(Case("cuda", "bfloat16", (9, 0), {"sinks": True})))
    assert sdpa.reject(Case("cpu", "float32", None, {"sinks": True})) is None
