"""What a rank reads: its own rows and experts, counted in bytes; together they check every hash."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

from slipstream.checkpoint.load import load, transfer
from slipstream.checkpoint.manifest import shards_of
from slipstream.checkpoint.open import open_checkpoint
from slipstream.checkpoint.rules import (
    Transform,
    Weight,
    part_gate_up,
    part_rows,
    rows,
    stack_experts,
    stack_gate_up,
    transpose_experts,
)
from slipstream.checkpoint.slices import narrow
from slipstream.checkpoint.tensors import DENSE, TensorInfo, read_dense
from slipstream.config import EngineConfig
from slipstream.errors import CheckpointError
from slipstream.parallel.shares import Ranks
from slipstream.plan import Plan, make_plan
from tests.checkpoint.test_transfer import Plain, folder_of, tensors_of

ASKED = {"device": "cpu", "dtype": "float32", "kv_cache_memory_bytes": 1 << 22, "max_model_len": 32}
KINDS = [
    "llama", "llama-biases-tied", "olmo2", "phi3", "qwen3_moe", "mixtral", "gpt_oss", "llama gguf", "gpt_oss published",
    "qwen3_moe made int4", "gpt_oss made int8", "gpt_oss mxfp4",
]  # fmt: skip


def stored(tmp_path: Path, shapes: list[tuple[int, ...]]) -> list[TensorInfo]:
    """Tensors of different numbers, one after the other."""
    path, found, at = tmp_path / "x.bin", [], 13
    data = [torch.arange(math.prod(s), dtype=torch.float32) + 1000 * i for i, s in enumerate(shapes)]
    path.write_bytes(bytes(13) + b"".join(d.numpy().tobytes() for d in data))
    for i, shape in enumerate(shapes):
        nbytes = math.prod(shape) * DENSE["F32"][0]
        found.append(TensorInfo(f"t{i}", "F32", shape, nbytes, path, at))
        at += nbytes
    return found


CASES: list[tuple[Transform, list[tuple[int, ...]], int, list[range], bool]] = [
    (rows, [(7, 3), (4, 3), (5, 3)], 0, [range(2, 5), range(8, 9), range(12, 16)], True),
    (rows, [(7, 3), (4, 3)], 0, [range(0, 2), range(7, 8), range(7, 8), range(9, 11)], True),  # a key head twice
    (rows, [(7, 3), (4, 3)], 0, [range(5, 9)], True),
    (rows, [(9,)], 0, [range(1, 3), range(7, 9)], True),
    (rows, [(7, 3)], 1, [range(1, 3)], False),
    (rows, [(3, 7, 4)], 0, [range(1, 3)], True),
    (rows, [(3, 7, 4)], 1, [range(2, 3), range(5, 7)], True),
    (stack_experts, [(5, 3)] * 4, 0, [range(1, 3)], True),
    (stack_experts, [(5, 3)] * 4, 1, [range(2, 5)], True),
    (stack_experts, [(5, 3)] * 4, 2, [range(1)], False),
    (stack_experts, [(5,)] * 4, 1, [range(2, 5)], True),
    (stack_gate_up, [(5, 3)] * 6, 0, [range(1, 2)], True),
    (stack_gate_up, [(5, 3)] * 6, 1, [range(1, 4), range(6, 9)], True),
    (part_rows, [(3, 8, 2)], 0, [range(2, 3)], True),
    (part_rows, [(3, 8, 2)], 1, [range(1, 3), range(5, 7)], True),
    (part_rows, [(3, 8, 2)], 1, [range(1, 3), range(4, 6)], False),
    (part_gate_up, [(3, 2, 8)], 0, [range(1, 3)], True),
    (part_gate_up, [(3, 2, 8)], 1, [range(1, 3), range(5, 7)], False),
    (part_gate_up, [(3, 8)], 0, [range(1, 3)], True),
    (part_gate_up, [(3, 8)], 1, [range(1, 3), range(5, 7)], False),
    (transpose_experts, [(3, 6, 5)], 0, [range(2)], True),
    (transpose_experts, [(3, 6, 5)], 1, [range(2)], False),
    (transpose_experts, [(3, 6, 5)], 2, [range(2, 6)], True),
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_transform_of_slices_is_the_slice_of_the_transform(number: int, tmp_path: Path) -> None:
    turn, shapes, at, ranges, can = CASES[number]
    sources = tuple(stored(tmp_path, shapes))
    whole = turn([read_dense(s) for s in sources])
    assert tuple(whole.shape) == Weight("x", ("y",), transform=turn).shape(shapes)
    found = narrow(turn, sources, at, ranges)
    assert (found is not None) == can
    if found is not None:
        want = whole.index_select(at, torch.cat([torch.arange(r.start, r.stop) for r in ranges]))
        assert torch.equal(turn([read_dense(s) for s in found]), want)
        assert sum(s.nbytes for s in found) == want.nbytes  # no byte more
        assert all(sum(n for _, n in s.spans) == s.nbytes for s in found)


def plan_of(path: Path, rank: int, size: int, *, spread: bool = False, **options: str) -> Plan:
    asked = EngineConfig(**{**ASKED, **options}, enable_expert_parallel=spread)
    return make_plan(asked, open_checkpoint(path), ranks=Ranks(rank, size))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each read of a tensor."""
    found: list[int] = []

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        found.append(real(descriptor, buffers, offset))
        return found[-1]

    real = os.preadv
    monkeypatch.setattr(os, "preadv", preadv)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_reads_its_own(kind: str, tmp_path: Path, counted: list[int]) -> None:
    """On both ways, and the same is held after them. Columns are read whole; all else is read by one rank alone."""
    path, options = folder_of(kind, tmp_path)
    options["linear_implementation"] = "reference"
    checkpoint, size = open_checkpoint(path), 2
    for spread in (False, True) if "moe" in kind or kind.startswith(("gpt_oss", "mixtral")) else (False,):
        plans = [plan_of(path, r, size, spread=spread, **options) for r in range(size)]
        whole = plan_of(path, 0, 1, **options)
        for plan in plans:
            total = sum(item.nbytes for item in plan.loads)
            twins = sum(i.twin.nbytes // size for i in plan.loads if i.twin)
            told: list[tuple[int, int]] = []
            counted.clear()
            load(plan.model, plan.loads, checkpoint, plan.device, lambda *a, told=told: told.append(a))
            assert total <= sum(counted) <= total + twins + checkpoint.config["hidden_size"] * 4
            assert told[-1] == (total, total)
        for r, plan in enumerate(plans):
            if "made" in kind:
                continue  # hashes are of whole files
            other, wanted = plan_of(path, r, size, spread=spread, **options), sum(i.nbytes for i in plan.loads)
            counted.clear()
            assert sum(transfer(other.model, other.loads, checkpoint, Plain())) == wanted
            assert wanted <= sum(counted) <= wanted + checkpoint.config["hidden_size"] * 4 * 60
            want, got = tensors_of(plan.model), tensors_of(other.model)
            assert want.keys() == got.keys() and all(torch.equal(got[n], want[n]) for n in want)
        for first, second, all_ in zip(plans[0].loads, plans[1].loads, whole.loads, strict=True):
            replicated = first.cut.ranges is None
            columns = (first.cut.dim == 1 and first.to.endswith("down.weight")) or first.to.endswith("out.weight")
            if replicated or first.shared:
                continue
            both, once = first.nbytes + second.nbytes, all_.nbytes
            if columns and kind.startswith("gpt_oss") and first.rule.transform is transpose_experts:
                assert both == (2 * once if first.held == "int8" else once)  # stored the other way round
            elif columns or (first.rule.transform is part_gate_up and not (spread and first.rule.shard == "expert")):
                assert both == 2 * once, first.to
            elif ".qkv." in first.to or "k_norm" in first.to:
                assert once <= both < 1.4 * once, first.to
            else:
                assert both == once, first.to


@pytest.mark.parametrize("way", ["processor", "card"])
def test_every_hash_is_checked_by_one_rank(way: str, tmp_path: Path) -> None:
    path, options = folder_of("gpt_oss made int8", tmp_path)
    files, size = sorted(shards_of(path)), 3
    assert len(files) > 4
    owners = [[r for r in range(size) if f in shards_of(path, Ranks(r, size))] for f in files]
    assert all(len(o) == 1 for o in owners) and len({o[0] for o in owners}) == size
    for file, (owner,) in list(zip(files, owners, strict=True))[:3]:
        good = file.read_bytes()
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        for rank in range(size):
            plan, checkpoint = plan_of(path, rank, size, **options), open_checkpoint(path)
            try:
                if way == "card":
                    list(transfer(plan.model, plan.loads, checkpoint, Plain()))
                else:
                    load(plan.model, plan.loads, checkpoint, plan.device)
                assert rank != owner
            except CheckpointError as e:
                assert rank == owner and file.name in str(e) and "is damaged" in str(e)
        file.write_bytes(good)
