"""Kills `quantize` at random moments, and looks at what is left. Run in a process of its own, which forks: starting Python
and torch anew for each kill would take far longer than the work.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from slipstream.checkpoint.manifest import verify
from slipstream.checkpoint.open import open_checkpoint
from slipstream.errors import CheckpointError
from slipstream.quantization.quantize import quantize

ASKED: dict[str, Any] = {"to": "int8", "max_shard_bytes": 30_000, "overwrite": True}


def digest(folder: Path, *, journal: bool = True) -> str:
    """Of the names and bytes of all files in a folder, or of all but the journal."""
    found = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and (journal or p.name != ".journal")):
        found.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return found.hexdigest()


def start(source: Path, out: Path) -> int:
    child = os.fork()
    if child == 0:
        try:
            quantize(source, out, **ASKED)
            os._exit(0)
        finally:
            os._exit(1)
    return child


def finish(source: Path, out: Path) -> None:
    _, status = os.waitpid(start(source, out), 0)
    assert status == 0, "an uninterrupted run failed"


def kill_once(source: Path, out: Path, most: float) -> bool:
    """Whether it was killed before it ended."""
    child = start(source, out)
    time.sleep(random.uniform(0, most))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def check(out: Path, old: str | None, new: str, whole: Path) -> str:
    """What stands under the name: nothing, the old, or the new. Anything else is a fault."""
    state = "nothing" if not out.exists() else {old: "old", new: "new"}[digest(out)]
    hidden = out.with_name(f".{out.name}.partial")
    if hidden.exists():
        try:
            found = open_checkpoint(hidden)
        except CheckpointError:
            return state
        if state == "new" and (digest(hidden) == old or digest(hidden, journal=False) == new):
            return state  # the names have been swapped and the old folder is about to go, or it is all done once more
        assert state != "new" or old is None, "what is left of the old folder opens"
        verify(hidden)  # it is whole, and only its name is missing
        assert len(found.tensors) == len(open_checkpoint(whole).tensors)
    return state


def main(source: Path, work: Path, kills: int, seed: int) -> None:
    random.seed(seed)
    whole = work / "whole"
    quantize(source, whole, **ASKED)  # in this process, so that what is imported late is there in the others
    began = time.perf_counter()
    finish(source, work / "out")
    most = 1.1 * (time.perf_counter() - began)
    shutil.rmtree(work / "out")
    new = digest(whole)
    counts = {"kills": 0, "resumed": 0, "nothing": 0, "old": 0, "new": 0}
    while counts["kills"] < kills:
        out = work / "out"
        old = None
        if counts["kills"] % 2:
            shutil.copytree(source, out)
            old = digest(out)
        for _ in range(1 + counts["kills"] % 3):  # some runs are killed, and killed again as they resume
            counts["kills"] += kill_once(source, out, most)
            counts[check(out, old, new, whole)] += 1
        journal = out.with_name(".out.partial") / ".journal"
        counts["resumed"] += journal.exists() and len(journal.read_text().splitlines()) > 1
        finish(source, out)
        assert digest(out) == new, "the resumed run differs from an uninterrupted one"
        assert [p.name for p in work.iterdir() if p.name not in ("out", "whole")] == []
        shutil.rmtree(out)
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
