"""Starting the ranks that share a model, or joining those that torchrun has started; watching them, and ending all when one ends.

The process that asks for a model is rank 0. Alone, it starts the others on its machine, as processes of their own. Under torchrun
(or whatever else sets RANK and WORLD_SIZE) all are there already, and find rank 0 through the store of their launcher. Rank 0
holds a Link to each, on which both sides say every second that they live. A rank that dies, or is silent for SILENCE seconds,
ends all of them; the error names it and has the last lines that it wrote, where they are known.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, TypeVar

import torch.distributed as dist

from slipstream import errors
from slipstream.errors import ConfigError, KernelError, RankError, SlipstreamError
from slipstream.parallel.launcher import COMING, FRONT, Stopped, launchers_store, local, one_machine, whoami
from slipstream.parallel.link import SILENCE, STARTING, Link
from slipstream.parallel.peers import Peers

T = TypeVar("T")
MEETING = timedelta(seconds=20)  # to connect with ranks that are known to be there
ROOT = str(Path(errors.__file__).parents[1])
PROGRAM = """  # finds this same slipstream, and then what rank 0 finds; its script's folder hides no module of Python's
import json, sys
path = json.loads(sys.argv.pop())
sys.path.insert(0, path[0])
import slipstream
sys.path[:] = [*sys.path[1:], *(p for p in path if p not in sys.path[1:])]
from slipstream.engine.rank import main
main()
"""
LEAVING = 10.0  # seconds for a group to end, at most
LINES = 8  # of a rank's log in an error


@dataclass(eq=False)
class _Rank:
    """One of the others, as rank 0 knows it."""

    rank: int
    link: Link
    process: subprocess.Popen[bytes] | None = None  # where it was started here
    log: IO[bytes] | None = None
    pid: int | None = None  # where it runs on this machine, but was started by another

    def trouble(self) -> tuple[int, str] | None:
        """What is wrong with it, and how likely it is that others fail because of this: 0 is a cause, 1 may be an effect."""
        if (said := self.link.said("error")) is not None:
            kind, message = said
            return (0 if _typed(kind) or "OutOfMemory" in kind else 1), f"failed: {kind}: {message}"
        code = None if self.process is None else self.process.poll()
        if code is not None:
            return (0 if code < 0 else 1), _ended(code)
        if self.link.closed and self.process is None:
            return 1, "is gone"
        silent = time.monotonic() - self.link.heard
        limit = SILENCE if self.link.said("ready") else STARTING
        return None if silent < limit else (0, f"has said nothing for {silent:.0f} s and was killed")

    def last_lines(self) -> str:
        if self.log is None:
            return ""
        size = os.fstat(self.log.fileno()).st_size
        text = os.pread(
            self.log.fileno(), 1 << 14, max(0, size - (1 << 14))
        )  # its place in the file stays, it is shared
        lines = text.decode(errors="replace").strip().splitlines()[-LINES:]
        return "; the last that it wrote:\n" + "\n".join(lines) if lines else "; it wrote nothing"

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        elif self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class Others:
    """The other ranks, while they live. `failure` is why they were ended, if one of them failed."""

    def __init__(self, size: int) -> None:
        self.failure: SlipstreamError | None = None
        self.group: dist.ProcessGroup | None = None
        self.store: dist.Store | None = None
        self.let_go: Callable[[], object] = lambda: (
            None
        )  # of what holds the group: NCCL waits for the graphs that have it in them
        self.peers: Peers | None = None
        self.stuck: list[Any] = []  # what waits for a rank that is gone, and cannot be told
        self.ranks: list[_Rank] = []
        self._size, self._waiting, self._joined = size, 0, False
        self._owner = os.getpid()
        self._closed, self._changing = False, threading.RLock()

    def start(self, words: Mapping[str, Any]) -> None:
        """Start them on this machine.

        Args:
            words: what each is told.
        """
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        self.store = dist.TCPStore(
            "127.0.0.1",
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=MEETING,
            master_listen_fd=listener.detach(),
        )
        environment, path = dict(os.environ), json.dumps([p or os.getcwd() for p in (ROOT, *sys.path)])
        if (threads := words["asked"].get("num_threads")) is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        for rank in range(1, self._size):
            here, there = socket.socketpair()
            log = tempfile.TemporaryFile("ab+")  # noqa: SIM115  # closed in `close`
            with there:
                arguments = ("slipstream.engine.rank", str(rank), str(there.fileno()), path)
                process = subprocess.Popen(
                    [sys.executable, "-P", "-c", PROGRAM, *arguments], env=environment, pass_fds=[there.fileno()],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True,  # Ctrl-C reaches rank 0 alone, which ends the others
                )  # fmt: skip
            self._greet(_Rank(rank, Link(here), process, log), {**words, "rank": rank, "local": rank, "port": port})
        threading.Thread(target=self._watch, daemon=True).start()

    def join(self, words: Mapping[str, Any]) -> None:
        """Wait for those that torchrun has started.

        Raises:
            RankError: one does not come.
            ConfigError: they came for another model before.
        """
        self._joined = True
        here = one_machine(self._size)
        host = "127.0.0.1" if here else os.environ["MASTER_ADDR"]
        self.store = launchers_store()
        if self.store.check([FRONT]):
            raise ConfigError(
                "tensor_parallel_size: the ranks of this launch have served a model already; launch again"
            )
        key = secrets.token_hex(16)  # on a network anybody may knock
        end = time.monotonic() + COMING
        threading.Thread(target=self._watch, daemon=True).start()
        with socket.create_server(("127.0.0.1" if here else "", 0)) as listener:
            listener.settimeout(0.1)
            self.store.set(FRONT, json.dumps([host, listener.getsockname()[1], key, *whoami()]))
            watch = Stopped()
            while missing := {*range(1, self._size)} - {r.rank for r in self.ranks}:
                self.check()
                watch.look(missing)
                if time.monotonic() > end:
                    raise RankError(f"rank {min(missing)} did not find rank 0 within {COMING:.0f} s; see what it wrote")
                with contextlib.suppress(ValueError, TypeError, OSError):  # nobody yet, or a stranger
                    rank = _welcome(listener.accept()[0], key)
                    self._greet(rank, {**words, "rank": rank.rank})

    def _greet(self, rank: _Rank, words: Mapping[str, Any]) -> None:
        self.ranks.append(rank)
        rank.link.say("words", words)
        rank.link.start()

    def _watch(self) -> None:
        while not self._closed:
            if any(r.trouble() for r in self.ranks):
                time.sleep(0.4)  # a cause may show later than its effects
                found = [(*t, r) for r in self.ranks if (t := r.trouble())]
                if not self._closed and found:
                    _, what, rank = min(found, key=lambda f: f[0])
                    self.fail(rank, what)
                return
            time.sleep(0.1)

    def fail(self, rank: _Rank | None, what: str) -> None:
        """End all of them because of this one (None: rank 0)."""
        with self._changing:
            if self.failure is not None:
                return
            self.failure = self._failure(rank, what)
        if self._joined:  # the launcher may end this rank before it can say why
            print(f"error: {self.failure}", file=sys.stderr, flush=True)
        for other in self.ranks:
            other.link.say("end", str(self.failure))
        for other in self.ranks:
            if other.process is not None:
                other.kill()
        self._free()

    def _failure(self, rank: _Rank | None, what: str) -> SlipstreamError:
        if rank is None:
            return RankError(f"rank 0 {what}")
        if (said := rank.link.said("error")) and _typed(said[0]) and not rank.link.said("ready"):
            failure: SlipstreamError = _typed(said[0])(said[1])
            failure.add_note(f"rank {rank.rank} says so")
            return failure
        rank.kill()  # which frees others that wait for it
        return RankError(f"rank {rank.rank} {what}{rank.last_lines()}")

    def _free(self) -> None:
        """Let go whoever on this rank waits for one that is gone."""
        if self.peers is not None:
            self.peers.end()
        if self.group is not None and dist.get_backend(self.group) == "nccl":
            # Its kernels spin until they are told. It comes back when the last graph is gone, in `close`.
            threading.Thread(target=_abort, args=(self.group,), daemon=True).start()
        if not self._joined:
            return  # all sockets to them are closed
        time.sleep(5)
        if self._waiting:  # for a rank of another machine that hangs, over a connection that lives
            os._exit(RankError.exit_code)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around what needs all ranks, and ends badly if one is gone."""
        self.check()
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    def check(self) -> None:
        if self.failure is not None:
            raise type(self.failure)(*self.failure.args)
        if self._closed:
            raise RankError("the other ranks of this model were ended; load it again")

    def wait(self, work: Callable[[], T]) -> T:
        """Do something that needs all ranks, but do not wait for those that failed."""
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as e:
                done.set_exception(e)

        with self.together():
            threading.Thread(target=run, daemon=True).start()
            while True:
                try:
                    return done.result(0.02)
                except TimeoutError:
                    self.check()
                except RuntimeError as e:
                    raise self.lost(e) from e

    def hear(self, name: str) -> list[Any]:
        """What each of them says under this name, once all have."""
        while True:
            self.check()
            if all(r.link.said(name) is not None for r in self.ranks):
                return [r.link.said(name) for r in self.ranks]
            time.sleep(0.005)

    def tell(self, name: str, words: Any) -> None:
        for rank in self.ranks:
            rank.link.say(name, words)

    def lost(self, cause: BaseException) -> SlipstreamError:
        """What to raise where something that needs all ranks failed here: the watch may need a moment to see who it was."""
        end = time.monotonic() + 3
        while self.failure is None and time.monotonic() < end:
            time.sleep(0.02)
        self.fail(None, f"failed: {type(cause).__name__}: {cause}")
        assert self.failure is not None
        return type(self.failure)(*self.failure.args)

    def close(self) -> None:
        """End all ranks but this one."""
        with self._changing:
            if self._closed or os.getpid() != self._owner:  # a fork of this process has not started them
                return
            self._closed = True
        for rank in self.ranks:
            rank.link.say("end", "")
        end = time.monotonic() + 2
        for rank in self.ranks:
            if rank.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    rank.process.wait(max(0.0, end - time.monotonic()))
                rank.kill()
            rank.link.close()
            if rank.log is not None:
                rank.log.close()
        self.let_go()
        left = True
        if self.group is not None and dist.is_initialized() and dist.group.WORLD is self.group:
            left = not self.stuck and _leave(self.group)
            if self.stuck:  # the end of a group waits for it, so this one is there as long as the process
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.group))
        if self.peers is not None and left:
            with contextlib.suppress(KernelError, RuntimeError):  # RuntimeError: the card is lost
                self.peers.free()
        self.group = self.store = self.peers = None


def _abort(group: dist.ProcessGroup) -> None:
    with contextlib.suppress(RuntimeError):
        group.abort()


def _leave(group: dist.ProcessGroup) -> bool:
    """NCCL's way of leaving in order wants all ranks to do it, and the others are gone by now; gloo's waits for what still waits
    for them. Whether it is done."""

    def leave() -> None:
        if nccl:
            _abort(group)
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()

    nccl = dist.get_backend(group) == "nccl"
    leaving = threading.Thread(target=leave, daemon=True)
    leaving.start()
    leaving.join(LEAVING)  # if it is not done then, a later model is refused, but nobody waits for ever
    return not leaving.is_alive()


def _typed(kind: str) -> Any:
    found = getattr(errors, kind, None)
    return found if isinstance(found, type) and issubclass(found, SlipstreamError) else None


def _ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


def _welcome(end: socket.socket, key: str) -> _Rank:
    """Raises ValueError, TypeError: it is none of us."""
    link = Link(end)
    rank, said, pid, machine = link.first(5)
    if not secrets.compare_digest(str(said), key):
        raise ValueError("it does not know the key")
    return _Rank(int(rank), link, pid=local(int(pid), machine))
