"""Where a launcher such as torchrun has started the ranks: how they find rank 0, and how it says that it lives until they have.

They know RANK and WORLD_SIZE from the environment, and have a store in common, which outlives any of them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from slipstream.errors import ConfigError, RankError
from slipstream.parallel.link import BEAT, SILENCE, STARTING, Link, obey
from slipstream.parallel.shares import Ranks

COMING = 120.0  # seconds in which ranks find rank 0
FRONT = "front"  # in the store: where rank 0 listens
ALIVE = "alive"  # in the store, before there is a link: that rank 0 lives

_kept: list[dist.Store] = []
_announced = threading.Event()


def place() -> Ranks | None:
    """Where a launcher such as torchrun has put this process; None: it was started alone."""
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    return Ranks(int(rank), int(size)) if rank.isdecimal() and size.isdecimal() else None


def one_machine(size: int) -> bool:
    """Whether all ranks are on this one."""
    return place() is None or os.environ.get("LOCAL_WORLD_SIZE") == str(size)


def refuse_other_size(size: int) -> None:
    """Raises ConfigError: torchrun has started another number of ranks than are to share the model."""
    here = place()
    if here is not None and here.size != size:
        raise ConfigError(
            f"tensor_parallel_size: {size}, but the launcher has started {here.size} ranks (WORLD_SIZE); make both the same, or "
            f"start the program alone"
        )


def announce() -> None:
    """On rank 0, as soon as there is one: say every second that it lives, to those that wait for it."""
    store = launchers_store()
    if _announced.is_set():
        return
    _announced.set()

    def beat() -> None:
        with contextlib.suppress(RuntimeError):
            for n in itertools.count():
                store.set(ALIVE, json.dumps([n, *whoami()]))
                time.sleep(BEAT)
                if store.check([FRONT]):
                    return

    threading.Thread(target=beat, daemon=True).start()


def find_front(patience: float = COMING) -> tuple[Link, dict[str, Any]] | None:
    """In a rank that a launcher has started: the link to rank 0, and what it says. None: it needs no other rank.

    Args:
        patience: seconds in which rank 0 comes to speak of a model; from then on it is heard every second.

    Raises:
        RankError: it is gone, stopped, or hangs. If it is on this machine it is killed then, as launchers wait long for who hangs.
    """
    here = place()
    assert here is not None
    store = launchers_store()
    last, heard, watch = b"", time.monotonic(), Stopped()
    while not store.check([FRONT]):  # it may have a model to fetch first
        watch.look([0])
        if store.check([ALIVE]) and (now := store.get(ALIVE)) != last:
            last, heard, patience = now, time.monotonic(), STARTING
        if time.monotonic() - heard > patience:
            if last:
                _kill(local(*json.loads(last)[1:]))
            raise RankError(f"rank 0 has said nothing for {patience:.0f} s")
        time.sleep(0.1)
    host, port, key, *who = json.loads(store.get(FRONT))
    if key is None:
        return None
    link = Link(socket.create_connection((host, port), STARTING))
    link.say("hello", [here.rank, key, *whoami()])
    said = link.first(STARTING)
    if said is None:
        _kill(local(*who))
        raise RankError("rank 0 is gone, or hangs")
    obey(link, local(*who))
    return link, {**said, "local": int(os.environ.get("LOCAL_RANK", here.rank))}


class Stopped:
    """Watches ranks that a launcher has started beside this one, and that have not spoken yet, for being stopped. Linux tells it."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}
        self._looked = 0.0

    def look(self, ranks: Iterable[int]) -> None:
        """Once a second. Raises RankError: one has not gone on for too long; it is killed then, as no launcher does it."""
        now = time.monotonic()
        if now - self._looked < BEAT:
            return
        self._looked, found = now, _stopped()
        self._since = {pid: self._since.get(pid, now) for rank, pid in found.items() if rank in ranks}
        for rank, pid in found.items():
            if now - self._since.get(pid, now) > SILENCE:
                _kill(pid)
                raise RankError(
                    f"rank {rank} was stopped before it said anything, and has not gone on for {SILENCE:.0f} s"
                )


def _stopped() -> dict[int, int]:
    """rank -> process, of those with the same parent that are stopped now."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state == "T" and int(parent) == os.getppid():
                words = (folder / "environ").read_bytes().split(b"\0")
                found[int(next(w[5:] for w in words if w.startswith(b"RANK=")))] = int(folder.name)
    return found


def _kill(process: int | None) -> None:
    if process is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def dismiss() -> None:
    """On rank 0: tell those that wait for it that it needs them no more, if it never did."""
    with contextlib.suppress(RuntimeError, ConfigError):  # ConfigError: as it said before
        store = launchers_store()
        if not store.check([FRONT]):
            store.set(FRONT, json.dumps(["", 0, None]))


def launchers_store() -> dist.Store:
    """Raises ConfigError: the environment does not say where it is."""
    if not _kept:
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=COMING)))
        except ValueError as e:
            raise ConfigError(
                f"tensor_parallel_size: RANK and WORLD_SIZE are set, as by a launcher, but not all that it sets: {e}; use torchrun, "
                f"or unset them"
            ) from e
        _kept.append(dist.PrefixStore("slipstream", store))
    return _kept[0]


def whoami() -> tuple[int, str]:
    """This process, and a name that is the same for those that can signal it."""
    with contextlib.suppress(OSError):
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return os.getpid(), machine + os.readlink("/proc/self/ns/pid")
    return os.getpid(), socket.gethostname()


def local(pid: int, machine: str) -> int | None:
    """The process, if it can be signalled from here."""
    return pid if machine == whoami()[1] else None
