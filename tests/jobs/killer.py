"""Kills `run_batch` at random moments, tears its journal and fills its disk, and looks at what is left. Run in a process
of its own, which forks: starting Python and torch anew for each kill would take far longer than the work.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from slipstream import LLM, SlipstreamError
from slipstream.jobs import run_batch
from tests.cli.tiny import write_chat_model

LINES = 30
FULL = 3  # the exit code of a child whose disk was full


def requests() -> str:
    """Both formats, several lengths, some lines that are wrong. All is greedy."""
    made: list[Any] = []
    for i in range(LINES):
        sampling = {"temperature": 0, "ignore_eos": True}
        if i % 10 == 7:
            made.append({"id": i, "prompt": "x", "no_such_field": i})
        elif i % 3 == 0:
            made.append({"id": i, "prompt": f"The {i}", "max_new_tokens": 3 + i % 5, **sampling})
        else:
            body = {
                "model": "m",
                "messages": [{"role": "user", "content": str(i)}],
                "max_tokens": 2 + i % 7,
                **sampling,
            }
            made.append({"custom_id": f"line {i}", "method": "POST", "url": "/v1/chat/completions", "body": body})
    return "".join(json.dumps(line) + "\n" for line in made)


def answers(out: Path) -> list[Any]:
    """Without the time of day."""
    found = [json.loads(line) for line in out.read_text().splitlines()]
    for line in found:
        if line.get("response"):
            del line["response"]["body"]["created"]
    return found


def fill_disk(left: int) -> None:
    """Have the disk full after so many bytes: the last write is cut, the next one refused."""
    if left % 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (left, left))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        return
    write = os.write

    def short(handle: int, data: Any) -> int:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = write(handle, bytes(data)[:left])
        left -= done
        return done

    os.write = short


def start(llm: LLM, source: Path, out: Path, room: int | None = None) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(SlipstreamError):
            if room is not None:
                fill_disk(room)
                code = FULL
            run_batch(llm, source, out)
            code = 0
        os._exit(code)
    return child


def torn(out: Path) -> bool:
    """Cut the journal's last line, or leave a part of one behind it. Whether there was one to cut."""
    journal = out.with_name(f".{out.name}.partial") / "journal"
    if not journal.exists():
        return False
    data = journal.read_bytes()
    last = data.splitlines(keepends=True)[-1] if data else b""
    keep = data[: len(data) - random.randint(0, len(last))] if random.random() < 0.5 else data + last[: len(last) // 2]
    journal.write_bytes(keep if random.random() < 0.8 else keep + b"\0" * 100)
    return True


def finished(out: Path) -> bool:
    return out.exists() and not (out.with_name(f".{out.name}.partial") / "journal").exists()


def main(work: Path, kills: int, seed: int) -> None:
    random.seed(seed)
    llm = LLM(write_chat_model(work / "model"), max_num_seqs=4)
    source, whole, out = work / "in", work / "whole", work / "out"
    source.write_text(requests())
    run_batch(llm, source, whole)
    expected = answers(whole)
    assert len(expected) == LINES and sum(line["error"] is not None for line in expected) == LINES // 10
    began = time.perf_counter()
    _, status = os.waitpid(start(llm, source, out), 0)
    most = time.perf_counter() - began
    assert status == 0 and answers(out) == expected
    out.unlink()
    size = whole.stat().st_size
    counts = {"kills": 0, "torn": 0, "full": 0, "resumed": 0}
    while counts["kills"] < kills:
        for _ in range(random.randint(1, 4)):  # most runs are killed again as they resume
            if finished(out):
                break
            child = start(llm, source, out)
            time.sleep(random.uniform(0, most))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            counts["kills"] += os.WIFSIGNALED(status)
            if random.random() < 0.3:
                counts["torn"] += torn(out)
            if random.random() < 0.3 and not finished(out):
                _, status = os.waitpid(start(llm, source, out, random.randint(0, size)), 0)
                assert os.waitstatus_to_exitcode(status) in (0, FULL)
                counts["full"] += os.waitstatus_to_exitcode(status) == FULL
        if not finished(out):
            assert not out.exists() or answers(out) == expected, "the output is there before it is whole"
            counts["resumed"] += run_batch(llm, source, out).resumed > 0
        assert answers(out) == expected, "the resumed run differs from an uninterrupted one"
        shutil.rmtree(work / ".out.partial", ignore_errors=True)  # empty, if it was killed just before the end
        assert sorted(p.name for p in work.iterdir()) == ["in", "model", "out", "whole"]
        out.unlink()
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
