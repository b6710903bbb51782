"""An hour of mixed load: memory does not grow, no file, thread or page stays, and the answers stay right.

    HOUR_SECONDS=3600 pytest -m slow tests/engine/test_hour.py -s

is the hour (its default); it takes half of one core. The short form, which judges all but memory, is in the suite.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import resource
import sys
import time
from pathlib import Path

import pytest

from slipstream import LLM
from tests.engine import mixed, tiny

HOUR = float(os.environ.get("HOUR_SECONDS", 3600))
WARM_UP = 1 / 2  # of the time: caches and heaps reach their sizes, which grow by whole arenas of 1 MiB
LIMIT = 1.0  # MB an hour
SHARE = 0.5  # of one core


def memory() -> float:
    """MB resident. What was freed but is still with malloc is handed back first: it comes and goes, and is not ours.

    Not from statm, which the kernel adds up late for each CPU: half a MB of noise.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Rss:")) * 1024 / 1e6


class _Malloc(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    )


def in_use() -> float:
    """MB that are asked of malloc and of Python's own allocator (at 64 bytes a block): without the holes between them, so
    that a slope of `memory` can be told from one of ours."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Malloc
    found = libc.mallinfo2()
    return (found.uordblks + found.hblkhd + 64 * sys.getallocatedblocks()) / 1e6


def slope(readings: list[tuple[float, float]]) -> float:
    """Least squares, in units of the second column for an hour of seconds."""
    n = len(readings)
    mean_t, mean_y = sum(t for t, _ in readings) / n, sum(y for _, y in readings) / n
    over = sum((t - mean_t) ** 2 for t, _ in readings)
    return 3600 * sum((t - mean_t) * (y - mean_y) for t, y in readings) / over


def left_open() -> tuple[int, int]:
    """Open files and threads of the process."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def test_the_slope_of_a_leak_is_seen() -> None:
    noisy = [(60.0 * i, 300 + 2 * i / 60 + (0.3 if i % 2 else -0.3)) for i in range(50)]  # 2 MB an hour
    assert slope(noisy) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(
    "seconds", [8.0, pytest.param(HOUR, marks=[pytest.mark.slow, pytest.mark.timeout(2 * HOUR + 600)], id="hour")]
)
def test_mixed_load(tmp_path: Path, capsys: pytest.CaptureFixture[str], seconds: float) -> None:
    judged = seconds >= 600
    apart = seconds / 60  # a minute of an hour
    llm = LLM(mixed.write(tmp_path / "model"), kv_cache_memory_bytes=110_000, max_model_len=160, page_size=4,
              max_num_seqs=6, max_num_batched_tokens=32, scheduling_policy="priority")  # fmt: skip
    load = mixed.Load(llm, tmp_path, seed=1)
    for _ in range(5):  # whatever is imported or opened once
        asyncio.run(load.burst(8))
    time.sleep(0.2)  # a thread that has been joined may be in the list for a moment
    open_before = left_open()
    began, used = time.monotonic(), time.process_time()
    readings: list[tuple[float, float]] = []
    inner: list[tuple[float, float]] = []
    while (now := time.monotonic() - began) < seconds or load.bursts < 20:
        asyncio.run(load.burst(20))
        tiny.check_idle(llm)
        assert len(llm.engine.runner.rows) <= llm.plan.max_num_seqs + 1
        for _ in range(100):
            if left_open() == open_before:
                break
            time.sleep(0.01)
        assert left_open() == open_before, "open files, threads"
        if now >= apart * len(readings):
            readings.append((now, memory()))
            inner.append((now, in_use()))
            print(f"{now:6.0f} s  {readings[-1][1]:.2f} MB, {inner[-1][1]:.2f} in use  {dict(load.seen)}", flush=True)
        if judged:
            time.sleep(max(0.0, (time.process_time() - used) / SHARE - (time.monotonic() - began)))
    counted = llm.snapshot()
    late, late_inner = ([r for r in some if r[0] >= seconds * WARM_UP] for some in (readings, inner))
    record = {
        "seconds": round(time.monotonic() - began),
        "slope_mb_per_hour": round(slope(late), 3) if judged else None,
        "slope_in_use": round(slope(late_inner), 3) if judged else None,
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1),
        "requests": sum(load.seen.values()),
        **load.seen,
        "tokens": counted.new_tokens,
        "steps": counted.steps,
        "preemptions": counted.preemptions,
        "cached_tokens": counted.cached_tokens,
        "open_files": open_before[0],
        "threads": open_before[1],
        "cores": round((time.process_time() - used) / (time.monotonic() - began), 2),
    }
    with capsys.disabled():
        print("\n" + json.dumps(record))
    assert counted.preemptions and counted.cached_tokens
    kinds = ("good", "cancelled", "refused", "late", "spoiled", "failed", "handler raised", "job lines")
    assert all(load.seen[k] for k in kinds), load.seen
    if judged:
        assert slope(late_inner) < LIMIT and slope(late) < LIMIT
