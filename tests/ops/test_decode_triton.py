"""Attention in decoding steps with what comes before it in the same kernel, without a GPU: run by Triton's interpreter in a
process of its own (float32 only), and compiled for Hopper. tests/gpu/test_decode.py runs the same steps on a device."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream.ops import attention as ops
from slipstream.ops.attention.reference import attention as attention_reference
from slipstream.ops.attention_input.reference import attention_input as input_reference
from slipstream.ops.rope import Turns
from tests.ops import interpreter

pytest.importorskip("triton")

from slipstream.ops.attention import decode as module
from slipstream.ops.attention import paged
from slipstream.ops.attention.decode import _decode, decode
from tests.ops.test_attention_triton import World, build, different

F32, F64 = torch.float32, torch.float64


@dataclass
class Entering(World):
    """Of each sequence the last token: what the product gave for it, and the keys before it. `half`: pairs that are turned."""

    half: int = 8
    norms: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        random = torch.Generator().manual_seed(len(self.lengths) + self.head_dim)
        shape = (len(self.lengths), self.heads + 2 * self.kv_heads, self.head_dim)
        spread = 2 if self.norms else 1  # larger scores would make much of how q and k are rounded
        self.product = (spread * torch.randn(shape, generator=random)).to(self.device, self.dtype)
        frequencies = torch.rand(self.half, generator=random).to(self.device)
        self.turns = (frequencies, 1.3) if self.half else None
        weights = [(torch.rand(self.head_dim, generator=random) + 0.5).to(self.device) for _ in range(2)]
        # One in the dtype of the model, one in float32 as Gemma's.
        self.weights = (weights[0].to(self.dtype), weights[1], 0.3) if self.norms else None
        self.options: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap, "sinks": self.extra}

    def asked(self, rows: Sequence[int], **layout: int) -> list[Any]:
        """Arguments of the op for these sequences. The new keys' slots hold what nobody wrote; so do those behind."""
        _, keys, values, batch, group = self.step([(i, n := self.lengths[i] - 1, n + 1) for i in rows], **layout)
        keys[group.slots] = values[group.slots] = math.nan
        qkv = self.product[list(rows)].flatten(1)
        qkv = torch.cat((torch.full_like(qkv[:, :16], math.nan), qkv), 1)[:, 16:].view(len(rows), -1, self.head_dim)
        turns = None if self.turns is None else Turns(batch.positions, *self.turns, self.dtype)
        return [qkv, turns, self.weights, keys, values, batch, group]

    def run(self, rows: Sequence[int], **layout: int) -> Tensor:  # type: ignore[override]
        return decode(*self.asked(rows, **layout), **self.options)

    def error(self, rows: Sequence[int], **layout: int) -> float:  # type: ignore[override]
        """The largest difference from the two references in float64, one after the other, in what comes out and in the cache."""
        qkv, turns, norms, keys, values, batch, group = asked = self.asked(rows, **layout)
        exact = [t.double() for t in (qkv, keys, values)]
        if turns is not None:
            turns = dataclasses.replace(turns, dtype=F64)
        q = input_reference(exact[0], turns, norms, exact[1], exact[2], group.slots)
        wanted = attention_reference(q, *exact[1:], batch, group, **self.options)
        found = decode(*asked, **self.options)
        assert found.dtype == self.dtype and found.shape == wanted.shape
        assert torch.equal(values.double().nan_to_num(9e9), exact[2].nan_to_num(9e9)), "values are copied"
        others = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
        others[group.slots] = False
        assert torch.equal(keys[others].double().nan_to_num(9e9), exact[1][others].nan_to_num(9e9))
        new = (keys.double() - exact[1])[
            group.slots
        ].abs().max() / 4  # a key is several times as large as a mean of values
        return max(new.item(), (found.double() - wanted).abs().max().item())  # NaN is no number below a limit


def all_alike(world: Entering) -> float:
    """Each row's bits, in the answer and in the cache, are the same whatever else is in the step, and in other pages."""
    everybody = range(len(world.lengths))
    asked = world.asked(everybody)
    together, wrong = decode(*asked, **world.options), 0
    for i in everybody:
        alone = world.asked([i], page_size=3, seed=5)
        wrong += different(decode(*alone, **world.options), together[i : i + 1])
        for mine, theirs in ((alone[3], asked[3]), (alone[4], asked[4])):
            wrong += different(mine[alone[6].slots], theirs[asked[6].slots[i : i + 1]])
    wrong += different(world.run(everybody[::-1], seed=9).flip(0), together)
    return float(wrong)


def padded(world: Entering) -> float:
    """Rows that fill a recorded step up (engine/graphs.py) write to one slot of a page that is nobody's, and change nothing."""
    want, rows = world.run([1, 2]), 5
    qkv, turns, norms, keys, values, batch, group = world.asked([1, 2])
    assert turns is not None

    def fill(t: Tensor, value: float, count: int = rows - 2) -> Tensor:
        return torch.cat((t, t.new_full((count, *t.shape[1:]), value)))

    batch.starts, batch.query_starts = (*batch.starts, 0, 0, 0), tuple(range(rows + 1))
    batch.bounds = torch.arange(rows + 1, dtype=torch.int32, device=qkv.device), fill(batch.bounds[1], 0)
    group.pages, group.first_pages = fill(group.pages, len(keys) // group.page_size), fill(group.first_pages, 0)
    group.slots, turns.positions = fill(group.slots, len(keys)), fill(turns.positions, 0)
    keys, values = (fill(t, math.nan, group.page_size) for t in (keys, values))
    found = decode(fill(qkv, 0.5), turns, norms, keys, values, batch, group, **world.options)
    assert found.isfinite().all()
    return float(different(found[:2], want))


def with_room(case: Callable[[], float], programs: int = 1000) -> float:
    """On a device with room for so many programs: where it is for several splits of a sequence, they are short."""
    before, module.processors = module.processors, lambda device: programs  # type: ignore[assignment]
    try:
        return case()
    finally:
        module.processors = before


LENGTHS = (41, 19, 9, 1, 33, 16)  # splits are of 8 keys here: 41, 9, 1 and 33 begin one


def interpreted() -> dict[str, Callable[[], float]]:
    rows = range(len(LENGTHS))
    return {
        "full": lambda: Entering(LENGTHS).error(rows),
        "window": lambda: Entering(LENGTHS, window=5, half=6).error(rows),
        "wide window": lambda: Entering(LENGTHS, window=21, heads=5, kv_heads=1, norms=False).error(rows, page_size=3),
        "only themselves": lambda: Entering(LENGTHS, window=1, sinks=False).error(rows, page_size=3),
        "softcap, not turned": lambda: Entering(LENGTHS, softcap=0.8, half=0).error(rows, page_size=32),
        "nothing but the write": lambda: Entering(LENGTHS, sinks=False, half=0, norms=False, kv_heads=3).error(rows),
        "many heads": lambda: Entering((70, 9, 17), heads=19, kv_heads=1, half=5).error([2, 0, 1]),
        "80": lambda: Entering((34, 3), heads=3, kv_heads=3, head_dim=80, half=40, norms=False).error([0, 1]),
        "96": lambda: Entering((34, 3), heads=3, kv_heads=1, head_dim=96, half=24).error([1, 0]),
        "alike": lambda: with_room(lambda: all_alike(Entering((30, 21, 3, 17))), 0),
        "alike in windows": lambda: with_room(lambda: all_alike(Entering((30, 21, 3, 17), window=19, half=3)), 0),
        "padded": lambda: padded(Entering(LENGTHS)),
        "short splits": lambda: with_room(lambda: Entering((41, 5, 36), head_dim=80, half=40).error([0, 1, 2])),
        "short splits in a window": lambda: with_room(lambda: Entering((41, 5, 36), window=19).error([2, 0, 1])),
        "short splits alike": lambda: with_room(lambda: all_alike(Entering((30, 21, 3, 17)))),
    }


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return interpreter.run(__file__)


@pytest.mark.parametrize("case", interpreted())
def test_the_kernel_in_the_interpreter(results: dict[str, Any], case: str) -> None:
    found = results[case]
    assert isinstance(found, float) and found < (0.5 if "alike" in case or case == "padded" else 4e-6), found


SHAPES: dict[str, dict[str, Any]] = {
    "gpt-oss": {"HEAD_DIM": 64, "KV_HEADS": 8, "SHARE": 8, "HALF": 32, "WINDOW": 128, "norms": False},
    "qwen3": {"HEAD_DIM": 128, "KV_HEADS": 4, "SHARE": 8, "HALF": 64},
    "phi": {"HEAD_DIM": 96, "KV_HEADS": 32, "SHARE": 1, "HALF": 36, "norms": False},
    "gemma": {"HEAD_DIM": 256, "KV_HEADS": 4, "SHARE": 2, "HALF": 128, "WINDOW": 1024, "capped": True},
}


@pytest.mark.parametrize(("shape", "ahead"), [*((name, False) for name in SHAPES), ("gpt-oss", True), ("qwen3", True)])
def test_it_compiles_for_hopper(shape: str, ahead: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As many programs of it find room as without the entry. What comes after the wait needs few barriers before keys are fetched."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    size = dict(SHAPES[shape])
    norms, capped = size.pop("norms", True), size.pop("capped", False)
    window = size.setdefault("WINDOW", 0)
    width = 1 << (size["HEAD_DIM"] - 1).bit_length()
    constants = size | {"WIDTH": width}
    constants |= {} if window != 128 else dict.fromkeys(("tops", "norms", "parts"))
    constants |= {} if capped else {"inner": None}
    constants |= {} if norms else dict.fromkeys(("q_weight", "k_weight"))
    ready = dict.fromkeys(("slots", "positions", "freq", "q_weight", "k_weight")) | {"HALF": 0}
    layout = paged.tiles(size["SHARE"], width, torch.bfloat16, True, False, window or None, ahead)
    made = build(_decode, constants | {"AHEAD": ahead}, layout)
    plain = build(_decode, constants | ready | {"AHEAD": False}, layout)
    assert resident(made, tmp_path) >= (1 if ahead else resident(plain, tmp_path)) >= 1
    before, _, after = made.asm["ptx"].partition("griddepcontrol.wait")
    loads = re.findall(r"ld\.global\S*", before), re.findall(r"ld\.global\S*", after.partition("cp.async")[0])
    assert "prefetch.global.L2" in before and "prefetch" not in after and "st.global" not in before
    assert not any(".b16" in load for load in loads[1]) and any("v4" in load or "v2" in load for load in loads[1])
    assert any("v4" in load for load in loads[0]) or not norms, "their weights are there before the product is"
    assert after.partition("cp.async")[0].count("bar.sync") <= (16 if ahead else 8)  # with those of the first tile
    assert "mma.sync" in after and "wgmma" not in after


def resident(kernel: Any, folder: Path) -> int:
    """Programs on a multiprocessor of an H100. Nothing may be spilled: on the stack is what turns angles of more than 105,615."""
    import triton

    cubin = folder / "cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    used = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", used)}
    assert found["LOCAL"] == 0 and found["STACK"] <= 32, used
    registers = -(-found["REG"] // 8) * 8 * 32 * kernel.metadata.num_warps
    return min(65_536 // registers, (227 << 10) // (kernel.metadata.shared + 1024))


def test_it_stands_in_for_two_implementations_of_ours_alone() -> None:
    assert ops.fused("triton", "triton") is decode
    for entry, name in (
        ("torch", "triton"),
        ("org/rotary", "triton"),
        ("triton", "triton_invariant"),
        ("triton", "a/b"),
    ):
        assert ops.fused(entry, name) is None


if __name__ == "__main__":
    # So that short sequences have many splits, more than are brought together at a time.
    paged.SPLIT, paged.SHORT = 8, 2
    paged.tiles = lambda share, *_: {"BLOCK_M": 32 if share > 16 else 16, "BLOCK_N": 16}
    interpreter.main(interpreted())
