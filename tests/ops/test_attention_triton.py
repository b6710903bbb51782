"""The Triton attention kernels without a GPU: run by Triton's interpreter in a process of its own (float32 only: bfloat16
is wrong there), and compiled for Hopper. tests/gpu/test_attention.py runs the same steps on a device."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream.batch import build_batch
from slipstream.cache.spec import CacheGroup
from slipstream.ops import attention as ops
from slipstream.ops.attention.reference import attention as reference
from slipstream.ops.choose import Case
from slipstream.request import Chunk, PageTable
from tests.ops import interpreter

pytest.importorskip("triton")

import slipstream.ops.attention.triton as module
from slipstream.ops.attention import decode, paged

F32 = torch.float32


@dataclass
class World:
    """Sequences of a fixed content in pages, of which any step can be made. What nobody wrote is NaN, also around the
    queries, which are a view as in the layer."""

    lengths: Sequence[int]
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = True
    dtype: torch.dtype = F32
    device: str = "cpu"
    q: list[Tensor] = field(init=False)
    kv: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(sum(self.lengths))

        def make(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random).to(self.device, self.dtype)

        self.q = [make(n, self.heads, self.head_dim) for n in self.lengths]
        self.kv = [make(2, n, self.kv_heads, self.head_dim) for n in self.lengths]
        self.extra = torch.randn(self.heads, generator=random).to(self.device) * 2 if self.sinks else None
        self.scale = 1.3 / self.head_dim**0.5

    def step(self, chunks: Sequence[tuple[int, int, int]], page_size: int = 16, seed: int = 0) -> tuple[Any, ...]:
        """Arguments of the op for chunks of (sequence, start, end), with pages in an order of their own."""
        group = CacheGroup(self.window, (0,), self.kv_heads, self.head_dim)
        spans = [(group.first_visible(start) // page_size, -(-end // page_size)) for _, start, end in chunks]
        total = sum(b - a for a, b in spans) + 1
        free = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
        cache = torch.full((2, total * page_size, self.kv_heads, self.head_dim), math.nan, dtype=self.dtype)
        cache = cache.to(self.device)
        made = []
        for (i, start, end), (a, b) in zip(chunks, spans, strict=True):
            pages, free = free[: b - a], free[b - a :]
            seen = torch.arange(group.first_visible(start), end)
            slots = torch.tensor(pages)[seen // page_size - a] * page_size + seen % page_size
            cache[:, slots] = self.kv[i][:, seen]
            made.append(Chunk(i, start, (1,) * (end - start), (PageTable(a, tuple(pages)),), True))
        batch = build_batch(made, [group], page_size, torch.device(self.device))
        q = torch.cat([self.q[i][start:end] for i, start, end in chunks])
        q = torch.cat((q, torch.full_like(q, math.nan)), 1)[:, : self.heads]
        return q, cache[0], cache[1], batch, batch.groups[0]

    def run(self, chunks: Sequence[tuple[int, int, int]], invariant: bool = False, **layout: int) -> Tensor:
        options: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap, "sinks": self.extra}
        return module.attention(*self.step(chunks, **layout), **options, invariant=invariant)

    def error(self, chunks: Sequence[tuple[int, int, int]], invariant: bool = False, **layout: int) -> float:
        """The largest difference from the reference in float32."""
        found = self.run(chunks, invariant, **layout)
        q, keys, values, *rest = self.step(chunks, **layout)
        options: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap, "sinks": self.extra}
        wanted = reference(q.float(), keys.float(), values.float(), *rest, **options)
        assert found.dtype == self.dtype and found.shape == wanted.shape
        return (found.float() - wanted).abs().max().item()  # NaN is no number below a limit


def all_alike(world: World, invariant: bool, cut: int) -> float:
    """Each query's bits are the same whatever else is in the call, with other pages, and, if `invariant`, in chunks or alone.
    Returns how many numbers differ."""
    wrong = 0
    chunks = [(i, 0, n) if i % 2 else (i, n - 1, n) for i, n in enumerate(world.lengths)]
    together = world.run(chunks, invariant)
    at = 0
    for i, start, end in chunks:
        part = together[at : at + end - start]
        at += end - start
        wrong += different(world.run([(i, start, end)], invariant, page_size=3, seed=5), part)
        if invariant and end - start > 1:
            pieces = [(i, a, min(a + cut, end)) for a in range(start, end, cut)]
            wrong += different(torch.cat([world.run([p], invariant) for p in pieces]), part)
            singles = [(i, p, p + 1) for p in range(max(start, end - cut), end)]
            wrong += different(world.run(singles, invariant), part[-len(singles) :])
    wrong += different(world.run(chunks[::-1], invariant, seed=9)[: len(together[at - 1 :])], together[at - 1 :])
    return float(wrong)


def different(a: Tensor, b: Tensor) -> int:
    return int((a != b).sum().item())


LENGTHS = (41, 19, 30, 1, 33)
MIXED = [(0, 40, 41), (1, 0, 19), (2, 12, 30), (3, 0, 1), (4, 32, 33), (0, 22, 26)]


def interpreted() -> dict[str, Callable[[], float]]:
    return {
        "full": lambda: World(LENGTHS).error(MIXED),
        "window": lambda: World(LENGTHS, window=5).error(MIXED),
        "wide window": lambda: World(LENGTHS, window=21, heads=5, kv_heads=1).error(MIXED, page_size=3),
        "only themselves": lambda: World(LENGTHS, window=1, sinks=False).error(MIXED),
        "softcap": lambda: World(LENGTHS, softcap=0.8, sinks=False).error(MIXED, page_size=32),
        "decode": lambda: World((70, 9, 16), heads=19, kv_heads=1).error([(0, 69, 70), (1, 8, 9), (2, 15, 16)]),
        "prompts": lambda: World((34, 3), heads=3, kv_heads=1, head_dim=80).error([(0, 0, 34), (1, 0, 3)]),
        "invariant": lambda: World(LENGTHS, window=21).error(MIXED, True, page_size=3),
        "alike": lambda: all_alike(World((30, 21, 3), window=19), False, 7),
        "alike, invariant": lambda: all_alike(World((20, 3, 17)), True, 7),
    }


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return interpreter.run(__file__)


@pytest.mark.parametrize("case", interpreted())
def test_the_kernels_in_the_interpreter(results: dict[str, Any], case: str) -> None:
    found = results[case]
    assert isinstance(found, float) and found < (0.5 if "alike" in case else 3e-6), found


def test_they_are_for_cuda_with_triton_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(name: str, device: str = "cuda", dtype: str = "bfloat16", **facts: Any) -> str | None:
        impl = next(i for i in ops.IMPLS if i.name == name)
        case = Case(device, dtype, facts.pop("capability", (9, 0)), {"head_dim": 64, "sinks": True} | facts)
        return impl.reject(case) or impl.unasked(case)

    assert why("triton") is None and "batch_invariant" in str(why("triton_invariant"))
    assert "chunk" in str(why("triton", batch_invariant=True))
    assert why("triton_invariant", batch_invariant=True) is None
    assert "CUDA" in str(why("triton", "cpu"))
    assert "float64" in str(why("triton", dtype="float64"))
    assert "256" in str(why("triton", head_dim=512))
    assert "7.5" in str(why("triton", capability=(7, 5)))
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    assert "pip install triton" in str(why("triton"))


TYPES = (
    dict.fromkeys(("q", "keys", "values", "out", "q_weight", "k_weight"), "*bf16")
    | dict.fromkeys(("sinks", "tops", "norms", "parts", "freq"), "*fp32")
    | dict.fromkeys(("pages", "first_pages", "query_starts", "starts"), "*i32")
    | dict.fromkeys(("slots", "positions"), "*i64")
    | dict.fromkeys(("scale", "inner", "factor", "eps"), "fp32")
)


def build(kernel: Any, constants: dict[str, Any], layout: dict[str, int], invariant: bool = False) -> Any:
    """The kernel for Hopper, with tensors and strides that are multiples of 16, as they are in the models."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {k: v for k, v in layout.items() if k.startswith("num_")} | {"enable_fp_fusion": not invariant}
    constants = constants | {k: v for k, v in layout.items() if not k.startswith("num_")} | {"CHAIN": True, "PAGE": 16}
    names, strides = kernel.arg_names, ("q_token", "q_head", "slot_stride", "head_stride")
    signature = {a: "constexpr" if a in constants else TYPES.get(a, "i32") for a in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(names) if signature[a][0] == "*" or a in strides}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize("invariant", [False, True], ids=["", "invariant"])
@pytest.mark.parametrize("single", [False, True], ids=["chunk", "decode"])
def test_it_compiles_for_hopper(single: bool, invariant: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The shapes of gpt-oss: keys are fetched ahead, and every wait is for all products so far, so that none still runs when
    the registers that it reads are filled again (see STAGES in ops/linear/triton.py)."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants: dict[str, Any] = {
        "WINDOW": 0, "KV_HEADS": 8, "SHARE": 8, "HEAD_DIM": 64, "WIDTH": 64, "inner": None
    }  # fmt: skip
    ready = dict.fromkeys(("slots", "positions", "freq", "q_weight", "k_weight")) | {"HALF": 0}
    constants |= ready | {"AHEAD": False} if single else {"SPLIT": paged.SPLIT, "INVARIANT": invariant}
    kernel = decode._decode if single else module._attend
    made = build(kernel, constants, paged.tiles(8, 64, torch.bfloat16, single, invariant), invariant)
    ptx = made.asm["ptx"]
    before, _, after = ptx.partition("griddepcontrol.wait")
    assert (
        "prefetch.global.L2" not in after and ("prefetch.global.L2" in before) == single and "st.global" not in before
    )
    assert ("wgmma.mma_async" in ptx) == (invariant or not single) and "cp.async" in ptx
    assert set(re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", ptx)) <= {"0"}
    assert made.metadata.shared <= 112 << 10  # two programs a multiprocessor


if __name__ == "__main__":
    paged.SPLIT = 8  # so that short sequences have many splits, more than are brought together at a time
    paged.tiles = lambda share, *_: {"BLOCK_M": 32 if share > 16 else 16, "BLOCK_N": 16}
    interpreter.main(interpreted())
