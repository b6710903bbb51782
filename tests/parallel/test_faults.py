"""A rank that is killed or stopped, at any moment, ends all of them within 30 s; the error names it, and nothing is left."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.engine.tiny import LLAMA, write

ROOT = Path(__file__).parents[2]
SIZE = 3
WITHIN = 30.0
MOMENTS = ("starts", "steps", "idle")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("faults") / "model", LLAMA)


class Front:
    """tests/parallel/front.py as a process, and its ranks."""

    def __init__(self, folder: Path) -> None:
        env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.parallel.front", str(folder), str(SIZE)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.strip())

    def reach(self, moment: str) -> None:
        end = time.monotonic() + 120
        while moment not in self.lines:
            assert self.process.poll() is None and time.monotonic() < end, (moment, self.lines)
            time.sleep(0.01)

    def ranks(self) -> dict[int, int]:
        """rank -> pid, of those that are there now."""
        found = {0: self.process.pid}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            if b"slipstream.engine.rank" in words and parent == self.process.pid:
                found[int(words[words.index(b"slipstream.engine.rank") + 1])] = int(folder.name)
        return found

    def result(self) -> dict[str, str]:
        self.process.wait(WITHIN)
        self._reader.join(5)
        said: dict[str, str] = json.loads(self.lines[-1])
        return said


def listening(pids: list[int]) -> set[str]:
    """The sockets on which these processes listen."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                inodes.add(os.readlink(link))
            except OSError:
                continue
    return inodes & open_ports()


def open_ports() -> set[str]:
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {f"socket:[{row[9]}]" for row in rows if row[3] == "0A"}


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone_within(pids: list[int], seconds: float) -> float:
    began = time.monotonic()
    while any(map(lives, pids)):
        assert time.monotonic() - began < seconds, "a process is left"
        time.sleep(0.02)
    return time.monotonic() - began


def one_round(folder: Path, what: signal.Signals, moment: str, rank: int, seed: int) -> float:
    """Seconds from the signal until all are gone."""
    draw = random.Random(seed)
    front = Front(folder)
    try:
        front.reach(moment)
        while max(rank, 1) not in front.ranks():  # it is about to be started; rank 0 alone is no matter of ours
            assert front.process.poll() is None, front.lines
            time.sleep(0.005)
        time.sleep(draw.random() * (2.0 if moment == "starts" else 0.4))
        ranks = front.ranks()
        pids, ports = [*ranks.values()], listening([*ranks.values()])
        os.kill(ranks[rank], what)
        if rank:
            took = gone_within(pids, WITHIN)
            said = front.result()
            assert front.process.returncode == 7 and said["kind"] == "RankError", said
            assert f"rank {rank} " in said["message"], said
            assert ("SIGKILL" if what == signal.SIGKILL else "has said nothing for") in said["message"], said
            assert said["again"] in (said["message"], "it was not there yet")
        else:
            took = gone_within([p for r, p in ranks.items() if r], WITHIN)
            if what == signal.SIGSTOP:
                os.kill(ranks[0], signal.SIGCONT)
                assert front.result()["kind"] == "RankError"
            took += gone_within(pids, WITHIN)
        left = front.ranks().keys() - {0}
        assert not left, left
        end = time.monotonic() + 5
        while left_open := ports & open_ports():  # who is a zombie may have threads that still close files
            assert time.monotonic() < end, left_open
            time.sleep(0.05)
        return took
    except BaseException as e:
        e.add_note(f"{what.name} of rank {rank} at {moment!r}, seed {seed}; it said {front.lines}")
        raise
    finally:
        for pid in front.ranks().values():
            if lives(pid):
                os.kill(pid, signal.SIGKILL)
        front.process.kill()
        front.process.communicate()


FEW = [
    (signal.SIGKILL, "starts", 2), (signal.SIGKILL, "steps", 1), (signal.SIGKILL, "idle", 2), (signal.SIGKILL, "steps", 0),
    (signal.SIGSTOP, "steps", 1), (signal.SIGSTOP, "idle", 0),
]  # fmt: skip


@pytest.mark.parametrize(("what", "moment", "rank"), FEW, ids=lambda v: getattr(v, "name", str(v)))
def test_a_fault(folder: Path, what: signal.Signals, moment: str, rank: int) -> None:
    one_round(folder, what, moment, rank, seed=random.randrange(1 << 30))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP], ids=lambda v: v.name)
def test_fifty_faults(folder: Path, what: signal.Signals) -> None:
    draw = random.Random()
    todo = [(draw.choice(MOMENTS), draw.randrange(SIZE), draw.randrange(1 << 30)) for _ in range(50)]
    with ThreadPoolExecutor(int(os.environ.get("ROUNDS_AT_ONCE", "2"))) as pool:
        took = sorted(pool.map(lambda t: one_round(folder, what, *t), todo))
    print(f"\n50 x {what.name}: median {took[25]:.1f} s, longest {took[-1]:.1f} s until all were gone")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("what", "delay"),  # before it has said anything, about while it starts, and in steps
    [(signal.SIGKILL, 4.0), (signal.SIGKILL, 12.0), (signal.SIGSTOP, 0.5), (signal.SIGSTOP, 12.0)],
    ids=lambda v: getattr(v, "name", str(v)),
)
def test_a_fault_under_torchrun(folder: Path, what: signal.Signals, rank: int, delay: float) -> None:
    one_launch(folder, what, rank, delay)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP], ids=lambda v: v.name)
def test_ten_faults_under_torchrun(folder: Path, what: signal.Signals) -> None:
    draw = random.Random()
    took = sorted(one_launch(folder, what, draw.randrange(2), draw.random() * 14) for _ in range(10))
    print(f"\n10 x {what.name} under torchrun: median {took[5]:.1f} s, longest {took[-1]:.1f} s until all were gone")


def one_launch(folder: Path, what: signal.Signals, rank: int, delay: float) -> float:
    """Seconds from the signal until the launcher and all ranks are gone."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tests.parallel.front", str(folder), "2"]
    launcher = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)  # fmt: skip
    ranks: dict[int, int] = {}
    try:
        end = time.monotonic() + 60
        while len(ranks) < 2:
            assert time.monotonic() < end
            ranks = launched(launcher.pid)
            time.sleep(0.05)
        time.sleep(delay)
        began, ports = time.monotonic(), listening([*ranks.values(), launcher.pid])
        os.kill(ranks[rank], what)
        out, _ = launcher.communicate(timeout=WITHIN)
        assert launcher.returncode and not any(map(lives, ranks.values()))
        assert f"rank {rank} " in out or f"rank      : {rank} " in out, out
        assert not ports & open_ports()
        return time.monotonic() - began
    except BaseException as e:
        e.add_note(f"{what.name} of rank {rank} after {delay:.2f} s")
        raise
    finally:
        for pid in (*ranks.values(), launcher.pid):
            if lives(pid):
                os.kill(pid, signal.SIGKILL)
        launcher.communicate()


def launched(launcher: int) -> dict[int, int]:
    """rank -> pid of what torchrun has started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == launcher:
                words = (folder / "environ").read_bytes().split(b"\0")
                found[int(next(w for w in words if w.startswith(b"RANK="))[5:])] = int(folder.name)
        except (OSError, StopIteration):
            continue
    return found
