"""Two processes that tell each other that they live, and what else they have to say: lines of JSON over a socket. No torch.

An empty line every BEAT seconds is the sign of life. A line says one thing: `{"plan": [...]}` has the name `plan`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

BEAT = 1.0
SILENCE = 15.0  # seconds without a sign of life, then the other end is taken for lost
STARTING = 20.0  # while it starts: importing torch leaves no room for signs for a while
LOST = 7  # how a rank ends that has lost rank 0; RankError.exit_code is the same


class Link:
    """One end.

    Attributes:
        heard: when the other end last said anything, by the monotonic clock.
        closed: it has gone.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end, self._reader = end, end.makefile("rb")
        self._lock, self._said = threading.RLock(), threading.Condition()  # a finalizer may speak while someone speaks
        self._words: dict[str, Any] = {}
        self.heard, self.closed = time.monotonic(), False

    def start(self) -> None:
        for work in (self._beat, self._listen):
            threading.Thread(target=work, daemon=True).start()

    def say(self, name: str, words: Any) -> None:
        """What is said to someone who has gone is lost; `closed` tells."""
        with contextlib.suppress(OSError), self._lock:
            self._end.sendall(json.dumps({name: words}).encode() + b"\n")

    def said(self, name: str) -> Any:
        """What the other end has said under this name, or None."""
        return self._words.get(name)

    def wait(self, name: str) -> Any:
        """The same, waited for. Whoever calls it has somebody else watch for the end of the other end."""
        with self._said:
            self._said.wait_for(lambda: name in self._words)
        return self._words[name]

    def first(self, seconds: float) -> Any:
        """Before `start`: the first thing that is said, whatever its name. None: nothing was, in this time."""
        self._end.settimeout(seconds)
        try:
            line = self._reader.readline()
        except OSError:
            return None
        self._end.settimeout(None)
        return next(iter(json.loads(line).values())) if line.strip() else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)
        self._end.close()

    def _beat(self) -> None:
        with contextlib.suppress(OSError):
            while not self.closed:
                with self._lock:
                    self._end.sendall(b"\n")
                time.sleep(BEAT)

    def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed here
            for line in self._reader:
                self.heard = time.monotonic()
                if line.strip():
                    with self._said:
                        self._words |= json.loads(line)
                        self._said.notify_all()
        self.closed = True


def obey(link: Link, front: int | None = None) -> None:
    """In a rank that is not the first: keep saying that it lives, and end this process when rank 0 is gone, hangs or says so.

    Args:
        front: rank 0's process, if it is to be killed when it hangs, as launchers wait long for such. None: it is a user's, whose
            own work may leave no room for signs of life, so only one that was stopped has said nothing for too long.
    """

    parent = os.getppid()

    def watch() -> None:
        while (end := link.said("end")) is None and not link.closed:
            if time.monotonic() - link.heard > SILENCE and (front is not None or not _runs(parent)):
                break
            time.sleep(0.1)
        if end is None:
            end = link.said("end")  # it may have been the last thing said
        if end is None:
            how = "is gone" if link.closed else f"has said nothing for {SILENCE:.0f} s"
            end = f"rank 0 {how}, so this rank ends too"
            if front is not None and not link.closed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(front, signal.SIGKILL)
        if end:
            print(f"error: {end}", file=sys.stderr, flush=True)
        os._exit(LOST if end else 0)

    link.start()
    threading.Thread(target=watch, daemon=True).start()


def _runs(process: int) -> bool:
    """Whether it is known that the parent is there, and was not stopped."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return os.getppid() == process and file.read().rpartition(")")[2].split()[0] in "RSD"
    except OSError:
        return False
