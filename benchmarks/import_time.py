"""Claims import.ms and cli.help.ms: what `import slipstream` and `slipstream --help` cost, each in a fresh Python.

import.ms is the import alone (budget 150 ms), against `import transformers`; cli.help.ms is the whole process from
start to end (budget 300 ms), of which a Python that does nothing is the limit.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from record import record

REPEATS = 15
IMPORT = "import time; t = time.perf_counter(); import {}; print(1000 * (time.perf_counter() - t))"
HELP = "import sys; from slipstream.cli.main import main; sys.argv = ['slipstream', '--help']; main()"
# Bytecode is cached on a user's machine, so it is here too.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def wall_ms(code: str) -> float:
    start = time.perf_counter()
    run(code)
    return 1000 * (time.perf_counter() - start)


def median(measure: Callable[[], float], repeats: int = REPEATS) -> float:
    measure()  # writes the bytecode and warms the disk's cache
    return statistics.median(measure() for _ in range(repeats))


def main() -> None:
    if "torch" in run("import sys, slipstream; print(*sys.modules)").split():
        raise SystemExit("import slipstream has loaded torch")
    if "generate" not in run(HELP):
        raise SystemExit("slipstream --help does not show its commands")
    ours = median(lambda: float(run(IMPORT.format("slipstream"))))
    peer = median(lambda: float(run(IMPORT.format("transformers"))), 5)
    peers = {"transformers": round(peer, 1)}
    record("import.ms", ours, "ms", baseline=peers, ratio=peer / ours, versions=("transformers",), budget=150)
    bare = round(median(lambda: wall_ms("pass")), 1)
    record(
        "cli.help.ms", median(lambda: wall_ms(HELP)), "ms", limit=bare, versions=("typer",), family="import", budget=300
    )


if __name__ == "__main__":
    main()
