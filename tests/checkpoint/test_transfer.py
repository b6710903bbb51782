"""Files onto a card, with the processor's memory in the place of a card's: what arrives, what ends it, what is left."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream.checkpoint.direct import Calls, Steps
from slipstream.checkpoint.load import load, transfer
from slipstream.checkpoint.manifest import Shard
from slipstream.checkpoint.open import open_checkpoint
from slipstream.checkpoint.rules import (
    Transform,
    Weight,
    part_gate_up,
    part_rows,
    plus_one,
    rows,
    stack_experts,
    stack_gate_up,
    transpose_experts,
)
from slipstream.checkpoint.tensors import TensorInfo, read_raw
from slipstream.checkpoint.transfer import Card, Transfer, cut
from slipstream.errors import CheckpointError
from slipstream.ops.native import missing
from slipstream.plan import make_plan
from slipstream.quantization.quantize import quantize
from tests.checkpoint.test_gguf_names import build, to_gguf
from tests.checkpoint.test_load import plan_of
from tests.parity.test_mxfp4 import SIZES, publish
from tests.parity.tiny import TINY, save


class Plain(Card):
    """Counts the buffers that are out. A buffer is poisoned when it is given back, as nothing may be left to read in it."""

    direct = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.out = self.taken = self.finished = 0
        self.handed: list[tuple[list[int], bool]] = []

    def beside(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    aside = beside

    room = 2000

    def free(self) -> int:
        return self.room

    def hand_over(self, landed: Iterable[Tensor], wait: bool) -> None:
        self.handed.append(([t.data_ptr() for t in landed], wait))

    @contextlib.contextmanager
    def pinned(self, nbytes: int) -> Iterator[Tensor]:
        self.out += 1
        self.taken += 1
        buffer = torch.full((nbytes,), 0xAA, dtype=torch.uint8)
        try:
            yield buffer
        finally:
            buffer.fill_(0xAA)
            self.out -= 1

    def mark(self) -> Any:
        return SimpleNamespace(synchronize=lambda: None)

    def finish(self) -> None:
        self.finished += 1


class Direct(Plain):
    """C reads. What it copies is copied when somebody waits for it, or asks for it, and not before."""

    direct = True

    def __init__(self, at_once: bool = False) -> None:
        super().__init__()
        self.lock, self.queue, self.at_once = threading.RLock(), list[tuple[int, ...]](), at_once
        self.events: dict[int, int] = {}  # copies that had been asked for at its last record
        self.asked = self.done = self.waits = 0

    def settle(self, upto: int | None = None) -> None:
        with self.lock:
            while self.queue and (upto is None or self.done < upto):
                ctypes.memmove(*self.queue.pop(0))
                self.done += 1

    def calls(self) -> Calls:
        def copy(to: int, place: int, nbytes: int, stream: int) -> int:
            with self.lock:
                self.asked += 1
                self.queue.append((to, place, nbytes))
            if self.at_once:
                self.settle()
            return 0

        def record(event: int, stream: int) -> int:
            with self.lock:
                self.events[event] = self.asked
            return 0

        def wait(event: int) -> int:
            with self.lock:
                self.waits += 1
                self.settle(self.events.get(event, 0))
            return 0

        size, place = ctypes.c_size_t, ctypes.c_void_p
        kinds = (ctypes.c_uint64, place, size, place), (place, place), (place,)
        held = [ctypes.CFUNCTYPE(ctypes.c_int, *k)(f) for k, f in zip(kinds, (copy, record, wait), strict=True)]
        addresses = [ctypes.cast(f, place).value or 0 for f in held]
        own = 16 * threading.get_ident()  # a thread has its own events
        return Calls(*addresses, 0, [own + 1, own + 2], held)

    def mark(self) -> Any:
        return SimpleNamespace(synchronize=self.settle)

    @contextlib.contextmanager
    def pinned(self, nbytes: int) -> Iterator[Tensor]:
        with super().pinned(nbytes) as buffer:
            yield buffer
            self.settle()  # as the stream is waited for before memory goes


CARDS = pytest.mark.parametrize("kind", [Plain, pytest.param(Direct, marks=pytest.mark.skipif(
    missing("transfer") is not None, reason=str(missing("transfer"))))])  # fmt: skip


def written(folder: Path, case: int, files: int = 3) -> list[list[TensorInfo]]:
    """Tensors of any size (none too) one after another with gaps, in groups that cross files."""
    draw = random.Random(case)
    found = []
    for f in range(files):
        path, at = folder / f"{f}.bin", draw.randrange(40)
        for i in range(draw.randrange(1, 12)):
            nbytes = draw.choice([0, 1, 7, 63, 64, 65, 128, 300, 1000])
            found.append(TensorInfo(f"{f}.{i}", "U8", (nbytes,), nbytes, path, at))
            at += nbytes + draw.choice([0, 0, 0, 5, 200])
        path.write_bytes(draw.randbytes(at + draw.randrange(30)))
    draw.shuffle(found)
    cuts = sorted(draw.randrange(len(found) + 1) for _ in range(6))
    return [found[a:b] for a, b in zip([0, *cuts], [*cuts, len(found)], strict=True)]


def all_shards(wanted: list[list[TensorInfo]]) -> dict[Path, Shard]:
    files = {t.file for item in wanted for t in item}
    return {f: Shard(f.stat().st_size, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files}


@CARDS
@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("case", range(12))
def test_everything_arrives_once(tmp_path: Path, case: int, hashed: bool, kind: type[Plain]) -> None:
    wanted, card = written(tmp_path, case), kind()
    readers, block = 1 + case % 4, (64, 100, 333, 4096)[case // 3]
    arrivals = Transfer(wanted, card, all_shards(wanted) if hashed else None, readers=readers, block=block)
    seen, done = [], 0
    for nbytes, complete in arrivals.arrive():
        done += nbytes
        for item in complete:
            seen.append(item)
            there = arrivals.take(item)
            card.mark().synchronize()
            assert list(there) == wanted[item]
            assert card.handed[-1] == ([t.data_ptr() for t in there.values()], not arrivals._placed)
            assert all(torch.equal(got, read_raw(t)) for t, got in there.items())
    assert sorted(seen) == list(range(len(wanted)))
    assert done == sum(t.nbytes for item in wanted for t in item)
    assert card.out == 0 and card.taken == bool(done), "once for all readers"
    assert not isinstance(card, Direct) or bool(card.waits) != hashed, "each buffer is used again"


@pytest.mark.parametrize(("room", "places"), [(600, 3), (599, 2), (400, 1), (300, 0), (0, 0)])
def test_places_are_taken_before_anything_is_read(room: int, places: int, tmp_path: Path) -> None:
    """As far as there is room for all tensors once more beside them."""
    (tmp_path / "x").write_bytes(bytes(300))
    wanted = [[TensorInfo(str(i), "U8", (100,), 100, tmp_path / "x", 100 * i)] for i in range(3)]
    card = Plain()
    card.room = room
    arrivals = Transfer(wanted, card, readers=1, block=64)
    arriving = arrivals.arrive()
    assert next(arriving) == (0, []) and card.taken == 0
    assert list(arrivals._landed) == list(range(places)) and arrivals._placed == (places == 3)
    for _, complete in arriving:
        assert all(len(arrivals.take(i)) == 1 for i in complete)
    assert [wait for _, wait in card.handed] == [places < 3] * 3


def test_only_what_is_wanted_is_read_and_in_long_runs(tmp_path: Path) -> None:
    path = tmp_path / "x"
    tensors = [TensorInfo("a", "U8", (50,), 50, path, 30), TensorInfo("b", "U8", (90,), 90, path, 450)]
    blocks = [*cut(tensors, {}, 100, 1)]
    assert [(b.begin, b.end) for b in blocks] == [(30, 80), (450, 500), (500, 540)]
    blocks = cut(tensors, {path: 612}, 100, 1)
    assert [(b.begin, b.end) for b in blocks] == [(100 * k, min(612, 100 * k + 100)) for k in range(7)]
    files = [tmp_path / n for n in "wxyz"]
    side_by_side = [b.file.name for b in cut([], dict.fromkeys(files, 150), 100, 2)]
    assert side_by_side == list("wxwxyzyz")


@pytest.mark.parametrize(
    ("turn", "count", "shapes"),
    [(rows, 1, (1, 2, 3)), (rows, 3, (1, 2, 3)), (stack_experts, 4, (1, 2)), (stack_gate_up, 6, (1, 2)), (part_rows, 1, (2, 3)),
     (transpose_experts, 1, (3,)), (part_gate_up, 1, (2, 3)), (plus_one, 1, (1, 2))],
)  # fmt: skip
def test_shapes_in_plain_numbers_are_those_of_the_transform(
    turn: Transform, count: int, shapes: tuple[int, ...]
) -> None:
    for dims in shapes:
        each = [tuple((3, 8, 5)[:dims])] * count
        want = tuple(turn([torch.empty(s) for s in each]).shape)
        assert Weight("x", ("y",), transform=turn).shape(each) == want
        if count > 1:
            each[-1] = (*each[-1][:-1], 7) if dims > 1 else each[-1]
            if dims > 1:
                with pytest.raises(ValueError):
                    Weight("x", ("y",), transform=turn).shape(each)


def test_the_dry_run_brings_no_compiler() -> None:
    """torch.cat on the meta device does, and takes seconds for it."""
    code = """
import sys, torch
from slipstream.checkpoint import rules
for turn in (rules.part_rows, rules.part_gate_up, rules.transpose_experts):
    rules.Weight("x", ("y",), transform=turn).shape([(4, 8, 6)])
sys.exit("it does" if "torch._dynamo" in sys.modules else 0)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def run(arrivals: Transfer, during: Callable[[], object] = lambda: None) -> None:
    with contextlib.closing(arrivals.arrive()) as arriving:
        for _ in arriving:
            during()


def no_reader_is_left() -> bool:
    return not [t for t in threading.enumerate() if t.name.startswith("slipstream-read")]


@pytest.mark.parametrize("place", ["header", "tensor", "end"])
def test_a_flipped_bit_is_found_in_what_was_read(tmp_path: Path, place: str) -> None:
    path, card = tmp_path / "model.safetensors", Plain()
    path.write_bytes(random.Random(1).randbytes(5000))
    info = TensorInfo("a", "U8", (4000,), 4000, path, 800)
    shards = all_shards([[info]])
    run(Transfer([[info]], card, shards, block=512))
    data = bytearray(path.read_bytes())
    data[{"header": 3, "tensor": 900, "end": 4999}[place]] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model.safetensors: is damaged: its SHA-256 is"):
        run(Transfer([[info]], card, shards, block=512))
    assert card.out == 0 and no_reader_is_left()


@CARDS
@pytest.mark.parametrize("readers", [1, 4])
@pytest.mark.parametrize("hashed", [False, True])
def test_a_file_that_is_cut_short(tmp_path: Path, readers: int, hashed: bool, kind: type[Plain]) -> None:
    path, card = tmp_path / "model.safetensors", kind()
    path.write_bytes(bytes(100_000))
    info = TensorInfo("model.norm.weight", "U8", (90_000,), 90_000, path, 10_000)
    shards = all_shards([[info]]) if hashed else None
    arrivals = Transfer([[info]], card, shards, readers=readers, block=1024)
    if not hashed:  # before a reader has opened it, or when the first block is there
        os.truncate(path, 60_000)
        with pytest.raises(CheckpointError, match="model.safetensors: was cut short while in use: model.norm.weight"):
            run(arrivals)
    else:
        with pytest.raises(CheckpointError, match="cut short|changed while it was read|is damaged"):
            run(arrivals, lambda: os.truncate(path, 50_000))
    assert card.out == 0 and no_reader_is_left()


@pytest.mark.parametrize("change", ["grown", "written"])
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, change: str) -> None:
    wanted = written(tmp_path, 3)
    path = wanted[0][0].file

    def spoil() -> None:
        with path.open("ab" if change == "grown" else "r+b") as file:
            file.write(b"x")
        os.utime(path, ns=(0, 123))  # the clock of a file system may stand still for some milliseconds

    with pytest.raises(CheckpointError, match="changed while it was read"):
        run(Transfer(wanted, Plain(), block=64), spoil)


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    wanted = written(tmp_path, 5)
    wanted[0][0].file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        run(Transfer(wanted, Plain()))


@CARDS
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("hashed", [False, True])
def test_whatever_ends_it_ends_the_threads_and_frees_the_buffers(
    tmp_path: Path, error: type[BaseException], hashed: bool, kind: type[Plain]
) -> None:
    path, card = tmp_path / "x", kind()
    path.write_bytes(bytes(1 << 20))
    info = TensorInfo("a", "U8", (1 << 20,), 1 << 20, path, 0)
    left = iter(range(5))

    def stop() -> None:
        if next(left, None) is None:
            raise error

    with pytest.raises(error):
        run(Transfer([[info]], card, all_shards([[info]]) if hashed else None, block=1024), stop)
    assert card.out == 0 and card.taken and no_reader_is_left()


def tensors_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every tensor that loading left in the model, wherever a layer or a kernel keeps it."""
    found: dict[str, Tensor] = {}

    def walk(name: str, value: object) -> None:
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, (list, tuple)):
            for i, each in enumerate(value):
                walk(f"{name}.{i}", each)
        elif hasattr(value, "scales") and hasattr(value, "format"):
            walk(f"{name}.data", value.data)  # type: ignore[attr-defined]
            walk(f"{name}.scales", value.scales)  # type: ignore[attr-defined]

    for name, module in model.named_modules():
        for key, value in {**vars(module), **module._parameters}.items():
            if key not in ("ops", "_modules", "_parameters"):
                walk(f"{name}.{key}", value)
    return found


def folder_of(kind: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of a kind, and the options to load it with."""
    name, _, way = kind.partition(" ")
    if way == "gguf":
        arch, config = build(name.replace("_", "-"), folder / "hf")
        return to_gguf(arch, config, open_checkpoint(folder / "hf"), folder / "m.gguf", lambda w: None), {}
    changes = SIZES | {"hidden_size": 192, "moe_intermediate_size": 64, "head_dim": 32} if way else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY, name, (TINY[name][0], TINY[name][1] | changes))
        save(name, folder / "hf")
    if way == "published":
        publish(folder / "hf")
    if way.startswith("made "):  # with a manifest
        quantize(folder / "hf", folder / "made", to=way[5:], max_shard_bytes=60_000)
        return folder / "made", {"quantization": "auto"}
    if way == "published" or not way:
        return folder / "hf", {"quantization": "auto"}
    return folder / "hf", {"quantization": way}


KINDS = [
    "llama", "llama-biases-tied", "gemma3-vision", "phi3", "qwen3_moe", "mixtral", "gpt_oss", "llama gguf", "gpt_oss gguf",
    "gpt_oss published", "gpt_oss dequantize", "qwen3_moe made int4", "gpt_oss made int8", "llama made mxfp4",
    "qwen3_moe int8", "gpt_oss mxfp4", "llama int4",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_model_by_both_ways(kind: str, tmp_path: Path) -> None:
    path, options = folder_of(kind, tmp_path)
    plans = [plan_of(path, device="cpu", linear_implementation="reference", **options) for _ in range(2)]
    checkpoint, card = open_checkpoint(path), Plain() if missing("transfer") else Direct(at_once=True)
    load(plans[0].model, plans[0].loads, checkpoint, plans[0].device)
    done = sum(transfer(plans[1].model, plans[1].loads, checkpoint, card))
    want, got = (tensors_of(p.model) for p in plans)
    assert want.keys() == got.keys() and len(want) > 20
    for name, value in want.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name
    assert done == sum(s.nbytes for i in plans[1].loads if not i.shared for s in i.sources)
    assert card.out == 0 and card.finished == 1 and no_reader_is_left()


def test_a_manifest_is_held_against_what_was_read(tmp_path: Path) -> None:
    path, options = folder_of("llama made int8", tmp_path)
    plan = plan_of(path, linear_implementation="reference", **options)
    shard = sorted(path.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{shard.name}: is damaged"):
        list(transfer(plan.model, plan.loads, open_checkpoint(path), Plain()))


def test_a_plan_for_another_model_is_not_half_loaded(tmp_path: Path) -> None:
    """A twin that differs is told from the files, when all else is there."""
    save("llama-biases-tied", tmp_path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint, card = open_checkpoint(tmp_path), Plain()
    plan = make_plan(plan_of(tmp_path).asked, checkpoint)
    with pytest.raises(CheckpointError, match="ties the head to the embedding, but lm_head.weight differs"):
        list(transfer(plan.model, plan.loads, checkpoint, card))
    assert card.out == 0 and card.finished == 1


@pytest.mark.skipif(missing("transfer") is not None, reason=str(missing("transfer")))
def test_what_fails_in_c_is_done_once_more_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, card = written(tmp_path, 7), Direct()
    run_steps, broken = Calls.run, iter((3, 0, 7))

    def some(self: Calls, steps: Steps, buffer: int) -> int:
        done = Steps()
        done.numbers = steps.numbers[: 5 * next(broken, len(steps))]
        return run_steps(self, done, buffer)

    monkeypatch.setattr(Calls, "run", some)
    arrivals, seen = Transfer(wanted, card, readers=1, block=64), 0
    for _, complete in arrivals.arrive():
        for item in complete:
            there, seen = arrivals.take(item), seen + 1
            card.settle()
            assert all(torch.equal(got, read_raw(t)) for t, got in there.items())
    assert seen == len(wanted) and next(broken, None) is None
