"""A step's tensors, against the plain reading of a page table: p is in slot pages[p // size] * size + p % size."""

from __future__ import annotations

import random

import pytest
import torch

from slipstream.batch import Batch, build_batch, neighbours
from slipstream.cache.pages import Pages
from slipstream.cache.spec import CacheGroup
from slipstream.request import Chunk

CPU = torch.device("cpu")
GROUPS = (CacheGroup(None, (0,), 2, 16), CacheGroup(5, (1,), 2, 16), CacheGroup(1, (2,), 2, 16))


def make(seed: int, size: int) -> tuple[list[Chunk], Batch]:
    """Some sequences at random places, in pages that others left behind in no order."""
    rng = random.Random(seed)
    pages = Pages(GROUPS, [400] * 3, size)
    for other in range(100, 130):  # holes
        pages.reserve(other, 0, rng.randint(1, 3 * size))
    for other in rng.sample(range(100, 130), 20):
        pages.free(other)
    chunks = []
    for i in range(rng.randint(1, 5)):
        at = 0
        for _ in range(rng.randint(1, 6)):
            start, at = at, at + rng.choice((1, 1, rng.randint(1, 12)))
            assert pages.reserve(i, start, at)
            pages.reserve(200 + i, start, at)  # so that a sequence's pages are not neighbours
        tokens = tuple(rng.randrange(1000) for _ in range(at - start))
        chunks.append(Chunk(i, start, tokens, pages.tables(i), sample=rng.random() < 0.7))
    return chunks, build_batch(chunks, GROUPS, size, CPU)


@pytest.mark.parametrize("size", [1, 3, 16])
def test_slots_contexts_and_masks(size: int) -> None:
    broken = 0
    for seed in range(60):
        chunks, batch = make(seed, size)
        assert batch.token_ids.tolist() == [t for c in chunks for t in c.token_ids]
        assert batch.positions.tolist() == [p for c in chunks for p in range(c.start, c.end)]
        assert batch.starts == tuple(c.start for c in chunks)
        assert batch.num_tokens == len(batch.token_ids) == batch.query_starts[-1]
        assert batch.decode_only == all(len(c.token_ids) == 1 for c in chunks)
        for g, (group, made) in enumerate(zip(GROUPS, batch.groups, strict=True)):
            slots = []
            cache = torch.arange(400 * size)
            for i, c in enumerate(chunks):
                table = c.tables[g]
                where = {(table.first + j) * size + k: page * size + k
                         for j, page in enumerate(table.pages) for k in range(size)}  # fmt: skip
                slots += [where[p] for p in range(c.start, c.end)]
                context = made.contexts[i]
                first = 0 if group.window is None else max(0, c.start - group.window + 1)
                assert (context.first, context.end) == (first, c.end)
                assert context.take(cache).tolist() == [where[p] for p in range(first, c.end)]
                assert isinstance(context.slots, slice) == neighbours(table.pages)
                broken += not isinstance(context.slots, slice)
                want = [[k <= q and (group.window is None or k > q - group.window) for k in range(first, c.end)]
                        for q in range(c.start, c.end)]  # fmt: skip
                assert made.mask(i, c.start, c.end).tolist() == want
                assert made.mask(i, c.start, c.end) is made.mask(i, c.start, c.end), "made once for all layers"
            assert made.slots.tolist() == slots
            index, real = made.decode_index
            for i, context in enumerate(made.contexts):
                own = context.take(cache).tolist()
                assert index[i][real[i]].tolist() == own
                assert set(index[i].tolist()) == set(own), "padding never reads another's memory"
                assert real[i].sum() == len(own)
    assert broken > 10


def test_no_two_tokens_share_a_slot() -> None:
    for seed in range(30):
        _, batch = make(seed, 4)
        for group in batch.groups:
            assert len(set(group.slots.tolist())) == len(group.slots)


def test_rows_of_logits() -> None:
    chunks, _ = make(3, 4)
    for whole in (frozenset(), frozenset({0}), frozenset(c.sequence for c in chunks)):
        batch = build_batch(chunks, GROUPS, 4, CPU, whole)
        want, at = [], 0
        for c in chunks:
            rows = range(at, at + len(c.token_ids))
            want += list(rows) if c.sequence in whole else list(rows[-1:]) if c.sample else []
            at = rows.stop
        assert batch.logits_rows.tolist() == want
        assert batch.logits_rows.dtype == torch.int64


@pytest.mark.parametrize(
    ("pages", "answer"),
    [((0,), True), ((7,), True), ((3, 4, 5), True), ((3, 5, 4, 6), False), ((5, 4, 3), False), ((3, 4, 6), False)],
)
def test_neighbours(pages: tuple[int, ...], answer: bool) -> None:
    assert neighbours(pages) is answer
