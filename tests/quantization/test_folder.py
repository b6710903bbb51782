"""A folder appears whole or not at all: interrupted, killed, resumed, replaced, refused."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slipstream import CapacityError, CheckpointError, ConfigError, quantize
from slipstream.checkpoint.open import open_checkpoint
from slipstream.quantization import folder as folders
from tests.engine.tiny import LLAMA, write
from tests.quantization.killer import digest

CONFIG = LLAMA | {"hidden_size": 96, "intermediate_size": 160}
ASKED: dict[str, Any] = {"to": "int8", "max_shard_bytes": 60_000}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", CONFIG)


def stop_after(steps: int, error: type[BaseException] = KeyboardInterrupt) -> Callable[[str, int, int | None], None]:
    left = [steps]

    def progress(label: str, done: int, total: int | None) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise error

    return progress


def interrupted(source: Path, out: Path, steps: int, **changes: Any) -> Path:
    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, progress=stop_after(steps), **ASKED | changes)
    return out.with_name(f".{out.name}.partial")


@pytest.mark.parametrize("steps", [1, 9, 17, 30, 39])
def test_an_interrupted_run_goes_on_to_the_same_bytes(source: Path, tmp_path: Path, steps: int) -> None:
    whole = quantize(source, tmp_path / "whole", **ASKED)
    assert whole.shards >= 5 and whole.resumed == 0
    hidden = interrupted(source, tmp_path / "out", steps)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError):
        open_checkpoint(hidden)
    kept = {json.loads(line)["shard"] for line in (hidden / ".journal").read_text().splitlines()[1:]}
    inodes = {name: (hidden / name).stat().st_ino for name in kept}
    report = quantize(source, tmp_path / "out", **ASKED)
    assert report.resumed == len(kept) and (steps < 9 or kept) and not report.notes
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in kept} == inodes
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert report.errors == whole.errors
    assert not hidden.exists()


@pytest.mark.parametrize(
    "change", [{"to": "mxfp4"}, {"skip": ["*.o_proj"]}, {"modules": ["*.mlp.*"]}, {"max_shard_bytes": 61_000}]
)
def test_other_settings_start_anew_and_say_so(source: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    interrupted(source, tmp_path / "out", 20)
    report = quantize(source, tmp_path / "out", **ASKED | change)
    assert report.resumed == 0 and "started anew" in report.notes[0]
    quantize(source, tmp_path / "whole", **ASKED | change)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_another_source_starts_anew(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "out", 20)
    write(source, CONFIG, seed=1)
    report = quantize(source, tmp_path / "out", **ASKED)
    assert report.resumed == 0 and "started anew" in report.notes[0]
    quantize(source, tmp_path / "whole", **ASKED)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_finished_shard_that_was_damaged_is_written_again(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "whole", **ASKED)
    hidden = interrupted(source, tmp_path / "out", 30)
    _, second = sorted(hidden.glob("*.safetensors"))[:2]
    data = bytearray(second.read_bytes())
    data[-3] ^= 4
    second.write_bytes(data)
    (hidden / ".journal").open("a").write('{"shard": "cut off')  # as a crash leaves it
    assert quantize(source, tmp_path / "out", **ASKED).resumed == 1
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


@pytest.mark.parametrize(
    "line", ["5", "null", "[]", "{}", '{"shard": "config.json"}', '{"shard": "model-00001-of-00006.safetensors"}', "\0"]
)
def test_a_journal_that_was_damaged_is_not_trusted(source: Path, tmp_path: Path, line: str) -> None:
    whole = quantize(source, tmp_path / "whole", **ASKED)
    journal = interrupted(source, tmp_path / "out", 30) / ".journal"
    head = journal.read_text().splitlines()[0]
    journal.write_text(f"{head}\n{line}\n")
    report = quantize(source, tmp_path / "out", **ASKED)
    assert report.resumed == 0 and report.errors == whole.errors
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_folder_that_exists_is_replaced_only_when_asked(source: Path, tmp_path: Path) -> None:
    out = write(tmp_path / "out", CONFIG, seed=5)
    old = digest(out)
    with pytest.raises(ConfigError, match="exists.*--overwrite"):
        quantize(source, out, **ASKED)
    interrupted(source, out, 20, overwrite=True)
    assert digest(out) == old
    quantize(source, out, **ASKED, overwrite=True)
    quantize(source, tmp_path / "whole", **ASKED)
    assert digest(out) == digest(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source", "whole"]


@pytest.mark.parametrize("kind", ["file", "link", "other files", "folders"])
def test_what_is_no_model_is_never_replaced(source: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "link":
        out.symlink_to(tmp_path)
    else:
        (out / "inner").mkdir(parents=True)
        (out / ("config.json" if kind == "folders" else "letter.txt")).write_text("{}")
        if kind == "other files":
            (out / "inner").rmdir()
    with pytest.raises(ConfigError, match="not a folder|more than a model"):
        quantize(source, out, **ASKED, overwrite=True)
    assert os.path.lexists(out)


def test_where_names_cannot_be_swapped_it_says_so_before_any_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write(tmp_path / "out", CONFIG, seed=5)
    old = digest(out)
    monkeypatch.setattr(folders.ctypes, "CDLL", lambda *_, **__: object())
    with pytest.raises(ConfigError, match="remove it first"):
        quantize(source, out, **ASKED, overwrite=True, progress=stop_after(1))
    assert digest(out) == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_source_and_out_never_contain_each_other(source: Path, tmp_path: Path) -> None:
    before = digest(source)
    (tmp_path / "link").symlink_to(source)
    for out in (source, source / "inner", tmp_path, tmp_path / "link" / "inner"):
        with pytest.raises(ConfigError, match="contain each other"):
            quantize(source, out, **ASKED, overwrite=True)
    assert digest(source) == before


def test_a_parent_that_is_not_there(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        quantize(source, tmp_path / "a" / "b", **ASKED)


def test_two_runs_on_one_folder(source: Path, tmp_path: Path) -> None:
    hidden = interrupted(source, tmp_path / "out", 20)
    handle = os.open(hidden, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="another process is writing"):
        quantize(source, tmp_path / "out", **ASKED)
    os.close(handle)
    assert quantize(source, tmp_path / "out", **ASKED).resumed > 0


def test_a_disk_without_room(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CapacityError, match="the disk has 1,000 free"):
        quantize(source, tmp_path / "out", **ASKED)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_a_disk_that_is_still_full_loses_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(source, tmp_path / "out", 20)
    with monkeypatch.context() as patch:
        patch.setattr(folders.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(CapacityError, match="the disk has 1,000 free"):
            quantize(source, tmp_path / "out", **ASKED)
    assert quantize(source, tmp_path / "out", **ASKED).resumed > 0


def test_a_disk_that_fills_up(source: Path, tmp_path: Path) -> None:
    class Full(OSError):
        def __init__(self) -> None:
            super().__init__(28, "No space left on device")

    with pytest.raises(CapacityError, match="goes on from here"):
        quantize(source, tmp_path / "out", **ASKED, progress=stop_after(20, Full))
    assert quantize(source, tmp_path / "out", **ASKED).resumed > 0


@pytest.mark.parametrize("seed", [0])
def test_killed_at_50_random_moments(tmp_path: Path, seed: int) -> None:
    source = write(tmp_path / "source", LLAMA | {"num_hidden_layers": 6})
    (tmp_path / "work").mkdir()
    words = [sys.executable, "-m", "tests.quantization.killer", source, tmp_path / "work", 50, seed]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(map(str, words), env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr
    counts = json.loads(ran.stdout)
    assert counts["kills"] >= 50 and counts["nothing"] > 5 and counts["old"] > 5 and counts["resumed"] > 2
