"""The C kernel of attention: right for every shape and on older processors, and the same bits for a query in any company."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from slipstream.batch import build_batch
from slipstream.cache.spec import CacheGroup
from slipstream.errors import KernelError
from slipstream.ops import attention as ops
from slipstream.ops import native
from slipstream.ops.attention import native as module
from slipstream.ops.attention.reference import attention as reference
from slipstream.ops.attention.sdpa import attention as sdpa
from slipstream.ops.choose import Case, choose
from slipstream.request import Chunk, PageTable
from tests.ops.test_linear import _levels, compiled

F32, BF16 = torch.float32, torch.bfloat16
Rows = dict[tuple[int, int], Tensor]  # (sequence, position): result
Chunks = Sequence[tuple[int, int, int]]  # (sequence, start, queries)
LENGTHS = (1, 9, 131, 300)  # blocks of keys end at 128 and 256
MIXED = [(3, 255, 45), (0, 0, 1), (2, 130, 1), (1, 2, 7)]

if isinstance(library := native.build("attention", strict=True), str):
    pytest.skip(library, allow_module_level=True)


@dataclass
class World:
    """Sequences of a fixed content, of which any step can be made. What nobody wrote is NaN, also around the queries,
    which are a view as in the layer."""

    dtype: torch.dtype = F32
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    lengths: Sequence[int] = LENGTHS
    q: list[Tensor] = field(init=False)
    kv: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(sum(self.lengths) + self.head_dim)
        self.q = [torch.randn(n, self.heads, self.head_dim, generator=random) for n in self.lengths]
        self.kv = [torch.randn(2, n, self.kv_heads, self.head_dim, generator=random) for n in self.lengths]
        self.extra = torch.randn(self.heads, generator=random) * 2 if self.sinks else None

    def run(self, chunks: Chunks, page_size: int = 16, fn: Callable[..., Tensor] = module.attention) -> Rows:
        group, random = (
            CacheGroup(self.window, (0,), self.kv_heads, self.head_dim),
            torch.Generator().manual_seed(len(chunks)),
        )
        spans = [(group.first_visible(start), start + count) for _, start, count in chunks]
        needed = [-(-end // page_size) - first // page_size for first, end in spans]
        order = iter(torch.randperm(sum(needed), generator=random).tolist())
        tables = [tuple(next(order) for _ in range(n)) for n in needed]
        cache = torch.full((2, sum(needed) * page_size, self.kv_heads, self.head_dim), math.nan).to(self.dtype)
        made = []
        for (i, start, count), (first, end), pages in zip(chunks, spans, tables, strict=True):
            at = torch.arange(first, end)
            slots = torch.tensor(pages)[at // page_size - first // page_size] * page_size + at % page_size
            cache[:, slots] = self.kv[i][:, first:end].to(self.dtype)
            made.append(Chunk(i, start, (1,) * count, (PageTable(first // page_size, pages),), True))
        q = torch.cat([self.q[i][start : start + count] for i, start, count in chunks]).to(self.dtype)
        wide = torch.cat((q, torch.full_like(q, math.nan)), 1)[:, : self.heads]
        batch = build_batch(made, [group], page_size, torch.device("cpu"))
        scale = 1.3 * self.head_dim**-0.5
        got = fn(wide, *cache, batch, batch.groups[0], scale=scale, softcap=self.softcap, sinks=self.extra)
        assert got.shape == q.shape and got.dtype == self.dtype
        where = [(i, start + j) for i, start, count in chunks for j in range(count)]
        return dict(zip(where, got, strict=True))

    def check(self, chunks: Chunks = MIXED, page_size: int = 3) -> None:
        got, want = self.run(chunks, page_size), self.run(chunks, page_size, reference)
        for key in want:
            tolerance = {"rtol": 1e-5, "atol": 3e-6} if self.dtype == F32 else {"rtol": 2**-7, "atol": 1e-3}
            torch.testing.assert_close(got[key], want[key], **tolerance)

    def alone(self, fn: Callable[..., Tensor] = module.attention) -> Rows:
        found: Rows = {}
        for i, n in enumerate(self.lengths):
            for position in sorted({*range(0, n, 7), *range(n)[125:132], *range(n)[253:260], n - 1}):
                found |= self.run([(i, position, 1)], fn=fn)
        return found

    def together(self, threads: int, page_size: int, chunk: int, fn: Callable[..., Tensor] = module.attention) -> Rows:
        """All sequences side by side, so many queries of each a step, with so many threads."""
        found: Rows = {}
        torch.set_num_threads(threads)
        for start in range(0, max(self.lengths), chunk):
            live = [(i, start, min(chunk, n - start)) for i, n in enumerate(self.lengths) if start < n]
            found |= self.run(live[::-1], page_size, fn)
        return found


def same(alone: Rows, together: Rows) -> bool:
    return all(torch.equal(row.view(torch.int16), together[key].view(torch.int16)) for key, row in alone.items())


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("window", [None, 1, 5, 150])
@pytest.mark.parametrize("head_dim", [1, 8, 16, 20, 64, 80, 96, 128, 256, 512])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_against_the_reference(dtype: torch.dtype, head_dim: int, window: int | None, sinks: bool) -> None:
    World(dtype, 6, 2, head_dim, window, sinks=sinks).check()
    World(dtype, 6, 2, head_dim, window, 0.9, sinks).check(MIXED, 16)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (5, 5), (9, 3), (21, 3), (40, 1), (71, 1)])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_any_number_of_heads(dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    World(dtype, heads, kv_heads).check()
    World(dtype, heads, kv_heads, 48, 11).check()


SHAPES = {
    "full": World(),
    "bfloat16": World(BF16, 9, 3, 64),
    "window": World(F32, 6, 2, 24, window=37),
    "wide window": World(BF16, 5, 5, 80, window=140, sinks=True),
    "everything": World(F32, 40, 1, 48, 129, 1.1, True),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_query_has_the_same_bits_in_any_company(shape: str) -> None:
    world = SHAPES[shape]
    alone = world.alone()
    ways = [(1, 16, 1), (1, 3, 5), (2, 1, 64), (3, 16, 100), (7, 5, 300), (2, 128, 41)]
    for threads, page_size, chunk in ways:
        together = world.together(threads, page_size, chunk)
        assert same(alone, together), (threads, page_size, chunk)
    for position, row in alone.items():  # one query shared out to many threads
        torch.set_num_threads(5)
        assert same({position: row}, world.run([(*position, 1)]))


def test_this_can_fail() -> None:
    """As it does for torch's operator, whose results are the same but for their last bits."""
    world = SHAPES["full"]
    alone, together = world.alone(sdpa), world.together(1, 16, 100, sdpa)
    assert not same(alone, together)
    assert all(torch.allclose(row, together[key], atol=1e-5) for key, row in alone.items())


@pytest.fixture(scope="module", params=_levels())
def older(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The C kernel as an older processor runs it."""
    return ctypes.CDLL(str(compiled("attention", request.param, tmp_path_factory.mktemp("native"), strict=True)))


def test_on_an_older_processor(older: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "build", lambda name, strict: older)
    for dtype in (F32, BF16):
        for head_dim in (1, 20, 64, 80):
            World(dtype, 9, 3, head_dim, sinks=True).check()
            World(dtype, 6, 2, head_dim, 7, 0.9).check()
        world = World(dtype, 9, 3, 40, 140)
        assert same(world.alone(), world.together(3, 5, 100))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_what_is_not_finite_reaches_those_who_see_it_and_nobody_else(
    dtype: torch.dtype, window: int | None, kind: int, value: float
) -> None:
    world, bad = World(dtype, window=window), World(dtype, window=window)
    steps = [[(2, 0, 131), (3, 100, 80), (1, 4, 1)], [(2, 60, 1), (3, 130, 1), (1, 8, 1)]]
    bad.kv[3][kind, 117, 1] = value  # of the key head that query heads 3 to 5 look at
    for step in steps:
        want, got, expected = world.run(step), bad.run(step), bad.run(step, fn=reference)
        for (i, position), row in got.items():
            seen = i == 3 and position >= 117 and (window is None or position < 117 + window)
            assert torch.equal(row[:3], want[i, position][:3])
            assert seen or torch.equal(row, want[i, position])
            if seen and math.isnan(value):
                assert row[3:].isnan().all()
            elif seen:  # an infinite score takes all the weight, or none
                clean = expected[i, position].isfinite()
                assert torch.equal(row.isfinite(), clean)
                torch.testing.assert_close(row[clean], expected[i, position][clean], rtol=1e-2, atol=1e-2)


def test_exponentials() -> None:
    """Two keys with scores 0 and x: the weight of the second is exp(x) / (1 + exp(x))."""
    x = torch.cat((torch.linspace(-86.5, 0, 4001), -torch.logspace(-12, 1.9, 500), torch.tensor([-88.0, -200, -3e38])))
    world = World(F32, 1, 1, 1, lengths=[2] * len(x))
    world.q, world.kv = [torch.ones(2, 1, 1)] * len(x), [torch.zeros(2, 2, 1, 1) for _ in x]
    for kv, score in zip(world.kv, x, strict=True):
        kv[0, 1], kv[1, 1] = score / 1.3, 1.0
    got = torch.stack(list(world.run([(i, 1, 1) for i in range(len(x))]).values())).flatten().double()
    scores = (torch.stack([kv[0, 1] for kv in world.kv]).flatten() * torch.tensor(1.3)).double()
    torch.testing.assert_close(got, scores.sigmoid(), rtol=4e-7, atol=2e-38)


def test_offsets_beyond_32_bits() -> None:
    """The one page that is written stands 2^31 numbers into a cache of which the system hands out no more than that."""
    page, pages = 16, (1 << 31) // (16 * 2 * 64) + 2
    cache = torch.empty(pages * page, 2, 64, dtype=BF16)
    near, far = torch.randn(page, 2, 64).to(BF16), pages - 1
    cache[far * page :] = near
    q, got = torch.randn(1, 6, 64).to(BF16), []
    for held, where in ((cache, far), (near, 0)):
        chunk = Chunk(0, 12, (1,), (PageTable(0, (where,)),), True)
        batch = build_batch([chunk], [CacheGroup(None, (0,), 2, 64)], page, torch.device("cpu"))
        got.append(module.attention(q, held, held, batch, batch.groups[0], scale=0.2))
    assert torch.equal(*got)


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    (impl,) = (i for i in ops.IMPLS if i.name == "native")
    for case, words in (
        (Case("cuda", "bfloat16"), "for CPUs"),
        (Case("cpu", "float16"), "not float16"),
        (Case("cpu", "float32", None, {"head_dim": 576}), "not 576"),
    ):
        assert words in str(impl.reject(case))
    why = "there is no C compiler (cc) on this machine"
    facts = {"head_dim": 64, "batch_invariant": True}
    assert choose("attention", ops.IMPLS, Case("cpu", "float32", None, facts)).name == "native"
    monkeypatch.setattr(native, "build", lambda name, strict: why)
    choice = choose("attention", ops.IMPLS, Case("cpu", "float32", None, {"head_dim": 64}))
    assert choice.name == "sdpa" and ("native", why) in choice.rejected
    with pytest.raises(KernelError, match="no C compiler"):
        choose("attention", ops.IMPLS, Case("cpu", "float32", None, facts))
    with pytest.raises(KernelError, match="no C compiler"):
        World().run(MIXED)
