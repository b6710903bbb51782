"""Starting ranks on this machine, watching them, and ending them all when one of them ends.

The process that asks for a model is rank 0; the others are processes of their own, `python -m slipstream.engine.worker`. Each
tells rank 0 every second that it lives, over a pipe that also ends it when rank 0 is gone. A rank that says nothing for
SILENCE seconds is killed: whoever waits for it then gets an error, which names the rank and the last lines that it wrote.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from typing import IO, Any, TypeVar

import torch.distributed as dist

from slipstream.errors import RankError
from slipstream.parallel.shares import Ranks

SILENCE = 15.0  # seconds without a word from a rank
T = TypeVar("T")
FOREVER = timedelta(days=999)  # between two requests; who is gone is noticed otherwise
LINES = 8  # of a rank's log in an error


@dataclass
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    heard: float = field(default_factory=time.monotonic)

    def last_lines(self) -> str:
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return "\n".join(lines[-LINES:]) or "it wrote nothing"


class Processes:
    """The ranks that this process started. `failure` is why they were ended, if one of them failed.

    Args:
        said: what each is told, as JSON; the port of the store is added.
    """

    def __init__(self, said: Mapping[str, Any], size: int) -> None:
        self.failure: str | None = None
        self._closed = False
        self._workers: list[_Worker] = []
        self.store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=120)
        )
        line = json.dumps({**said, "size": size, "port": self.store.port}).encode() + b"\n"
        for rank in range(1, size):
            log = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `close`
            process = subprocess.Popen(
                [sys.executable, "-m", "slipstream.engine.worker", str(rank)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, start_new_session=True,  # Ctrl-C reaches rank 0 alone, which ends the others
            )  # fmt: skip
            self._workers.append(_Worker(rank, process, log))
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(line)
                process.stdin.flush()
        for worker in self._workers:
            threading.Thread(target=self._listen, args=(worker,), daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()
        atexit.register(self.close)

    def _listen(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        while worker.process.stdout.read(1):
            worker.heard = time.monotonic()

    def _watch(self) -> None:
        while not self._closed:
            for worker in self._workers:
                code = worker.process.poll()
                silent = time.monotonic() - worker.heard
                if code is None and silent < SILENCE:
                    continue
                if self._closed:
                    return
                how = f"has said nothing for {silent:.0f} s and was killed" if code is None else _ended(code)
                self._kill([worker])
                self.failure = f"rank {worker.rank} {how}; the last that it wrote:\n{worker.last_lines()}"
                self._kill(self._workers)
                return
            time.sleep(0.1)

    def wait(self, work: Callable[[], T]) -> T:
        """Do something that needs all ranks, but do not wait for those that failed."""
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as e:
                done.set_exception(e)

        threading.Thread(target=run, daemon=True).start()
        while True:
            try:
                return done.result(0.1)
            except TimeoutError:
                if self.failure is not None:
                    raise RankError(self.failure) from None
            except RuntimeError as e:
                raise self.error(e) from e

    def error(self, cause: Exception) -> RankError:
        """What to raise where a word to the other ranks failed: the watch may need a moment to see why."""
        end = time.monotonic() + 3
        while self.failure is None and time.monotonic() < end:
            time.sleep(0.05)
        return RankError(self.failure or f"the ranks lost each other: {cause}")

    def _kill(self, workers: Sequence[_Worker]) -> None:
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                worker.process.kill()
            worker.process.wait()

    def close(self) -> None:
        """End all ranks but this one."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        for worker in self._workers:  # they end when their input does
            assert worker.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                worker.process.stdin.close()
        end = time.monotonic() + 5
        for worker in self._workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.0, end - time.monotonic()))
        self._kill(self._workers)
        for worker in self._workers:
            worker.log.close()


def _ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


def connect(ranks: Ranks, store: dist.Store, backend: str) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The groups for tensors, and for what is said between steps."""
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=FOREVER)
    together, words = dist.group.WORLD, dist.new_group(backend="gloo", timeout=FOREVER)
    assert together is not None
    return together, words


def live() -> dict[str, Any]:
    """In a worker: read what to do, then keep saying that it lives; ends the process when rank 0 is gone."""
    said: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    words = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no sign of life

    def beat() -> None:
        with contextlib.suppress(OSError):
            while True:
                os.write(words, b".")
                time.sleep(1)
        os._exit(1)

    def orphaned() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=beat, daemon=True).start()
    threading.Thread(target=orphaned, daemon=True).start()
    return said
