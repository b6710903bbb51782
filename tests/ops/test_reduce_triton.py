"""The sum over ranks through shared memory: interpreted, in processes that share it, and compiled for Hopper.

tests/gpu/test_parallel.py compares it with NCCL on cards.
"""

from __future__ import annotations

import multiprocessing
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from slipstream.ops import reduce
from slipstream.ops.choose import Case, choose
from slipstream.ops.moe import Pairs
from slipstream.ops.norm.reference import add_norm
from slipstream.ops.reduce import ROWS, WORDS, Slots
from slipstream.ops.reduce.triton import _sum, reduce_norm
from slipstream.ops.reduce.triton import reduce as triton_reduce
from tests.ops import interpreter

SHAPES = [(5, 60), (1, 7), (3, 130), (5, 60), (2, 33), (7, 1)]  # one after the other, as sums of a step are


def parts(size: int, shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(size, *shape, generator=torch.Generator().manual_seed(seed))


def left_as(x: Tensor) -> Pairs:
    """Experts that left just this to add: half of it from each of two, in two parts, and NaN from one that is elsewhere."""
    rows, width = x.shape
    each = torch.stack((x / 2, x / 2, torch.full_like(x, torch.nan)), 1).view(-1, width)
    ids, shares = torch.tensor([[3, 0, -1]]).expand(rows, 3).contiguous(), torch.full((rows, 3), 1.0)
    return Pairs(torch.stack((each / 2, each / 2)), ids, shares, None, x.dtype)


def sums_of(rank: int, size: int, places: list[int], first: int) -> float:
    """One rank makes them all; how far off the norms are. The sums themselves are exact."""
    delays, worst = random.Random(rank), 0.0
    counts = torch.full((ROWS,), first, dtype=torch.int32)
    slots = Slots(rank, size, torch.tensor(places), counts, torch.zeros(1, dtype=torch.int32))
    for seed, shape in enumerate(SHAPES):
        own = parts(size, shape, seed)
        want = own[0]
        for other in own[1:]:
            want = want + other
        time.sleep(delays.random() / 50)
        if seed % 2:
            assert torch.equal(triton_reduce(own[rank], slots), want), seed
            continue
        wide = torch.cat((own[rank], own[rank]), 1)
        x, weight = parts(1, shape, 100 + seed)[0], torch.rand(shape[1])
        part = left_as(own[rank]) if seed % 4 else wide[:, shape[1] :]
        total, found = reduce_norm(part, x, weight, 0.1, slots)
        assert torch.equal(total, x + want), seed
        exact = add_norm(x.double(), want.double(), weight.double(), 0.1)[1]
        worst = max(worst, ((found - exact).abs().max() / exact.abs().max()).item())
    return worst


def together(size: int, first: int = 1) -> float:
    """Ranks as processes that have their memory from before they parted."""
    slots = [torch.zeros(2, size, ROWS, WORDS, dtype=torch.int64).share_memory_() for _ in range(size)]
    places = [s.data_ptr() for s in slots]
    fork = multiprocessing.get_context("fork")
    with fork.Pool(size) as pool:
        ranks = [pool.apply_async(sums_of, (rank, size, places, first)) for rank in range(size)]
        return max(r.get(120) for r in ranks)


def nobody_there() -> bool:
    """A rank that is told to wait no more comes back."""
    own = torch.zeros(2, 2, ROWS, WORDS, dtype=torch.int64)
    slots = Slots(
        0, 2, torch.tensor([own.data_ptr()] * 2), torch.ones(ROWS, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    )
    triton_reduce(torch.ones(2, 9), slots)
    return True


CASES = {
    "two": partial(together, 2),
    "three": partial(together, 3),
    "numbers begin again": partial(together, 2, -3),
    "stopped": nobody_there,
}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return interpreter.run(__file__)


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_sum_and_its_norm(name: str, found: dict[str, Any]) -> None:
    assert found[name] is True if name == "stopped" else isinstance(found[name], float) and found[name] < 2e-6, found[
        name
    ]


@pytest.mark.parametrize("halves", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "sum"])
@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("left", [False, True], ids=["whole", "left"])
@pytest.mark.parametrize("wide", [False, True], ids=["", "onto float32"])
def test_it_compiles_for_hopper(
    wide: bool, left: bool, ranks: int, norm: bool, halves: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if (left or wide) and not norm:
        pytest.skip("a sum with no norm is of what has been added, and is added to nothing")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants: dict[str, Any] = {
        "RANK": 1, "RANKS": ranks, "HALVES": halves, "ROWS": ROWS, "MOST": WORDS, "SIZE": 2048, "CHAIN": True,
        **({} if norm else {"x": None, "weight": None, "total": None}), "places": None,
        **({"part": None, "TOP_K": 4, "PARTS": 2} if left else {"sums": None, "ids": None, "shares": None, "TOP_K": 0, "PARTS": 0}),
    }  # fmt: skip
    types = {
        "table": "*i64",
        "weight": "*bf16" if halves else "*fp32",
        **({"x": "*fp32", "total": "*fp32"} if wide or not halves else {}),
        "eps": "fp32",
        "sums": "*fp32",
        "shares": "*fp32",
    }
    numbers = ("part_stride", "x_stride", "words", "num_pairs")
    signature = {
        a: "constexpr" if a in constants else types.get(a, "i32" if a in numbers else "*i32") for a in _sum.arg_names
    }
    even = {
        (i,): [["tt.divisibility", 16]]
        for i, a in enumerate(_sum.arg_names)
        if signature[a] != "constexpr" and a not in ("eps", "num_pairs")
    }
    source = ASTSource(_sum, signature, constants, even)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 16}).asm["ptx"]
    before, _, after = ptx.partition("griddepcontrol.wait")
    assert "st.global" in after and "st.global" not in before and "griddepcontrol.launch_dependents" in before
    lines = after.splitlines()
    sent = [line for line in lines if "st.global" in line and "b64" in line]
    assert sent and not [line for line in sent if ".b32" in line], "a word and its number go as one"
    looked = [line for line in lines if "ld.volatile.global" in line and "b64" in line]
    assert len(looked) >= 2 * (ranks - 1), "at first, and again in a loop that is not left out"
    assert not [line for line in ptx.splitlines() if line.strip().startswith(".local")]


def test_it_is_for_cards_of_one_machine() -> None:
    def chosen(device: str = "cuda", dtype: str = "bfloat16", **facts: Any) -> tuple[str, str]:
        choice = choose("reduce", reduce.IMPLS, Case(device, dtype, (9, 0), {"ranks": 2, "width": 2880, **facts}))
        return choice.name, dict(choice.rejected).get("peers", "")

    assert chosen() == ("peers", "")
    for why, case in {
        "CUDA": {"device": "cpu"}, "one machine": {"machines": 2}, "8 ranks": {"ranks": 9}, "float16": {"dtype": "float16"},
        "16,384 bytes": {"width": 8194}, "no handle": {"unreachable": "no handle"},
    }.items():  # fmt: skip
        name, said = chosen(**case)  # type: ignore[arg-type]
        assert name == "collective" and why in said, said


def test_messages_that_have_room() -> None:
    slots = Slots(0, 2, *(torch.zeros(1),) * 3)
    half, full = torch.bfloat16, torch.float32
    assert slots.take(torch.empty(ROWS, 2 * WORDS, dtype=half)) and slots.take(torch.empty(2, WORDS, dtype=full))
    for shape, dtype in (((ROWS + 1, 64), half), ((1, 2 * WORDS + 2), half), ((1, WORDS + 1), full), ((4, 33), half)):
        assert not slots.take(torch.empty(shape, dtype=dtype)), shape


if __name__ == "__main__":
    interpreter.main(CASES)
