"""How fast a checkpoint gets into memory, and a fresh process to its first token; each run is a process of its own.

Loading is held against the slower of two ways through which all bytes go: reading the files with several threads, and, for a
GPU, copying from pinned memory to it. Files that were read before come from the page cache, in all of these.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipstream.errors import SlipstreamError


@dataclass(frozen=True, slots=True)
class Started:
    """One fresh process. Seconds: imports, loading, and all from its start to its first token. `bytes` were read."""

    import_seconds: float
    load_seconds: float
    first_token_seconds: float
    bytes: int


def start(path: Path, options: Mapping[str, Any]) -> Started:
    """Raises SlipstreamError if the process ends early; what it said last is in the message."""
    began = time.time()
    asked = json.dumps({"path": str(path), "options": options, "began": began})
    command = [sys.executable, "-m", "slipstream.bench.start", asked]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise SlipstreamError(f"a fresh process did not get to its first token: {said[-1]}")
    return Started(**json.loads(done.stdout.splitlines()[-1]))


def _fresh(asked: Mapping[str, Any]) -> None:
    """What the fresh process does."""
    began = time.perf_counter()
    import torch  # noqa: F401  # on the clock of imports

    from slipstream.llm import LLM
    from slipstream.request import SamplingParams

    imported = time.perf_counter() - began
    read = 0

    def progress(_: int, total: int) -> None:
        nonlocal read
        read = total

    llm = LLM(asked["path"], progress=progress, **asked["options"])
    first = 0.0
    for _ in llm.submit([1, 2, 3, 4], SamplingParams(temperature=0, max_new_tokens=1, ignore_eos=True)):
        first = time.time() - asked["began"]
    found = {"import_seconds": imported, "load_seconds": llm.load_seconds, "first_token_seconds": first, "bytes": read}
    print(json.dumps(found))


def read_rate(files: list[Path], threads: int, block: int) -> float:
    """Bytes a second that so many threads read from the files, into memory that stays in the cache of the processor."""
    work = iter([(f, at) for f in files for at in range(0, f.stat().st_size, block)])
    opened = {f: os.open(f, os.O_RDONLY) for f in files}
    lock = threading.Lock()

    def read() -> None:
        view = memoryview(bytearray(block))
        while True:
            with lock:
                todo = next(work, None)
            if todo is None:
                return
            os.preadv(opened[todo[0]], [view], todo[1])

    began = time.perf_counter()
    pool = [threading.Thread(target=read) for _ in range(threads)]
    for t in pool:
        t.start()
    for t in pool:
        t.join()
    took = time.perf_counter() - began
    for fd in opened.values():
        os.close(fd)
    return sum(f.stat().st_size for f in files) / took


def copy_rate(device: str) -> float:
    """Bytes a second from pinned memory to the card; no limit where there is no card."""
    import torch

    if not device.startswith("cuda"):
        return float("inf")
    here = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    best = 0.0
    for _ in range(4):
        torch.cuda.synchronize()
        began = time.perf_counter()
        there.copy_(here, non_blocking=True)
        torch.cuda.synchronize()
        best = max(best, here.nbytes / (time.perf_counter() - began))
    return best


if __name__ == "__main__":
    _fresh(json.loads(sys.argv[1]))
