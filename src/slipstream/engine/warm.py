"""Kernels compiled before the first request needs them: once for a card and a model, and all at the same time.

Steps of every size are run as they are in service, but launches of Triton go to its compiler and no further. So there is no
list of kernels to keep: what the layers launch is what gets compiled. What is torch's runs for real, on numbers that mean
nothing; no index is among them, as those that a kernel makes are read by kernels alone (else nothing is done here).

Triton keeps what it compiled, so a second start has nothing to do. That it was done is noted in the cache folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slipstream.batch import build_batch, to_device
from slipstream.config.paths import cache_root
from slipstream.engine.runner import Runner
from slipstream.engine.worker import Leader
from slipstream.layers.ops import WIDE_ROWS
from slipstream.ops.tuned import own_table
from slipstream.plan import Plan
from slipstream.plan.choices import waits
from slipstream.request import Chunk, PageTable

Tell = Callable[[int, int], None]
CODE = ("ops", "layers", "models", "engine")  # what decides which kernels there are
ROWS = (
    "norm",
    "activation",
    "attention_input",
)  # ops that follow no index, so that anybody's kernels may run on any numbers
_one_at_a_time = threading.Lock()


def warm(runner: Runner | Leader, tell: Tell | None = None) -> int:
    """Compile what serving will launch, unless that was done before. Gives the number of kernels.

    It only ever saves time: if it fails it says so, and kernels are compiled as they are needed.

    Args:
        tell: is called with (kernels compiled, kernels in all).
    """
    plan = runner.plan
    if plan.device.type != "cuda" or any(waits(c) or (c.source and c.op not in ROWS) for c in plan.choices):
        return 0
    import triton

    note = cache_root() / "kernels" / f"{fingerprint(plan)}.json"
    kept = Path(triton.knobs.cache.dir)
    if _is_done(note, kept):
        plan.why["kernels"] = f"compiled before, and kept in {kept}"
        return 0
    began = time.perf_counter()

    def finish(kernel: Any) -> None:
        with torch.cuda.device(plan.device):
            kernel.run  # noqa: B018  # makes the launcher, by a C compiler, and loads the kernel

    try:
        kernels, failed = compile_all(lambda: rehearse(runner), finish, tell)
    except RuntimeError as e:
        warnings.warn(f"kernels cannot be compiled ahead, so the first requests wait for them: {e}", stacklevel=2)
        return 0
    plan.why["kernels"] = f"{len(kernels)} compiled once for this card, in {time.perf_counter() - began:.1f} s"
    if failed:  # those may never be needed, and say why when they are
        plan.why["kernels"] += f"; {len(failed)} cannot be: {failed[0]}"
        return len(kernels)
    with suppress(OSError):  # where nothing can be kept, the next load does it again
        note.parent.mkdir(parents=True, exist_ok=True)
        part = note.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(sorted({folder for kernel in kernels for folder in _folders(kernel)})))
        part.replace(note)
    return len(kernels)


def fingerprint(plan: Plan) -> str:
    """Changes with all that decides which kernels there are: code, versions, card, model and sizes."""
    import triton

    found = hashlib.sha256()
    home = Path(__file__).parents[1]
    for file in sorted(f for folder in CODE for kind in ("py", "json") for f in (home / folder).rglob(f"*.{kind}")):
        found.update(file.read_bytes())
    facts = (
        triton.__version__, torch.__version__, plan.hardware.name, plan.hardware.capability, plan.model_config,
        plan.dtype, plan.page_size, plan.max_model_len, plan.max_num_seqs, plan.max_num_batched_tokens, plan.cuda_graphs,
        plan.async_scheduling, *((c.op, c.name, c.source.partition(", from")[0]) for c in plan.choices),
        *((item.to, item.held, item.shape) for item in plan.loads),
    )  # fmt: skip
    found.update(repr(facts).encode())
    found.update(own_table().read_bytes() if own_table().is_file() else b"")
    return found.hexdigest()[:32]


def _folders(kernel: Any) -> set[str]:
    """Where Triton keeps it, within its cache."""
    return {Path(file).parent.name for file in kernel.metadata_group.values()}


def _is_done(note: Path, kept: Path) -> bool:
    """Whether it was noted, and Triton still has them all."""
    try:
        folders = json.loads(note.read_text())
        return isinstance(folders, list) and all((kept / str(folder)).is_dir() for folder in folders)
    except (OSError, ValueError):
        return False


class _Pool(ThreadPoolExecutor):
    """Threads that do one thing more with each result."""

    def __init__(self, then: Callable[[Any], None]) -> None:
        super().__init__(os.cpu_count() or 1, "compile")
        self._then = then

    def submit(self, fn: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        def work() -> Any:
            found = fn(*args, **options)
            self._then(found)
            return found

        return super().submit(work)


def compile_all(
    work: Callable[[], object], finish: Callable[[Any], None], tell: Tell | None = None
) -> tuple[list[Any], list[BaseException]]:
    """The kernels that `work` launches, compiled side by side, and what went wrong with others. Triton's passes and the
    assembler leave the interpreter free.

    Args:
        finish: is called with each kernel, in a thread of its own.
    """
    import triton

    with _Pool(finish) as pool, triton.AsyncCompileMode(pool, ignore_errors=True) as mode:
        try:
            with diverted() as asked:
                work()
            for done, _ in enumerate(as_completed(mode.raw_futures), 1):
                if tell is not None:
                    tell(done, len(mode.raw_futures))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            mode.raw_futures[:] = [f for f in mode.raw_futures if not f.cancelled()]  # it would wait for them for ever
            raise
        found = [k.result(ignore_errors=True) if isinstance(k, triton.FutureKernel) else k for k in asked]
        failed = [e for future in mode.raw_futures if (e := future.exception()) is not None]
    return list({k.hash: k for k in found if k is not None}.values()), failed


@contextmanager
def diverted() -> Iterator[list[Any]]:
    """This thread's launches are compiled and do not run. Those that cannot differ in their kernel are looked at once."""
    from triton.runtime.jit import JITFunction

    kernels: list[Any] = []
    seen: set[Hashable] = set()
    thread = threading.get_ident()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if threading.get_ident() != thread:
            return launch(self, *args, grid=grid, warmup=warmup, **options)
        kind = (id(self), *map(_kind, args), *((name, _kind(value)) for name, value in options.items()))
        if kind not in seen:
            seen.add(kind)
            kernels.append(launch(self, *args, grid=grid, warmup=True, **options))
        return None

    with _one_at_a_time:
        launch = JITFunction.run
        JITFunction.run = run
        try:
            yield kernels
        finally:
            JITFunction.run = launch


def _kind(value: Any) -> Hashable:
    """What a kernel can depend on of an argument, or more."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16
    if hasattr(value, "block_shape"):  # a tensor descriptor
        return value.base.dtype, tuple(value.block_shape), repr(getattr(value, "layout", None))
    return type(value), value


def rehearse(runner: Runner | Leader) -> None:
    """Run steps of all sizes, so that every kernel is launched that serving may launch."""
    with torch.inference_mode(), runner.on_stream(), runner.plan.ops.ranks.silent():
        _rehearse(runner)


def _rehearse(runner: Runner | Leader) -> None:
    plan, decoder = runner.plan, runner.decoder
    most, longest = plan.max_num_batched_tokens, plan.max_model_len
    for size in sizes(most):
        counts = [longest] * (size // longest) + [size % longest] * (size % longest > 0)
        _run(runner, [(0, count) for count in counts[: plan.max_num_seqs]])
    rest = min(longest, most - 1, 2 * plan.page_size)
    for start in {1, longest - 1} if rest > 0 and plan.max_num_seqs > 1 else ():  # an answer beside a prompt
        _run(runner, [(start, 1), (0, rest)])
    for rows in sizes(plan.max_num_seqs)[1:]:  # so many rows in what is left of the last layer, of a step that is large
        if (prompt := min(longest, most - rows + 1, WIDE_ROWS + 1)) > 1:
            _run(runner, [(1, 1)] * (rows - 1) + [(0, prompt)])
    if decoder is not None:
        decoder.rehearse()
        return
    for rows in sizes(min(most, plan.max_num_seqs)):
        _run(runner, [(longest - 1, 1)] * rows)
    for rows in {1, min(most, plan.max_num_seqs)}:  # of few keys, few and many
        _run(runner, [(0, 1)] * rows)


def _run(runner: Runner | Leader, parts: list[tuple[int, int]]) -> None:
    """A step of sequences of which so many tokens are computed from there on. All of them are in the cache's first page."""
    plan = runner.plan
    chunks = []
    for i, (start, count) in enumerate(parts):
        table = PageTable(0, (0,) * -(-(start + count) // plan.page_size))
        chunks.append(Chunk(i, start, (0,) * count, (table,) * len(plan.groups), True))
    logits = runner.model(build_batch(chunks, plan.groups, plan.page_size, plan.device), runner.storage)
    if plan.async_scheduling:
        heat, noise = to_device([np.zeros(len(parts), np.float32), np.zeros(len(parts), np.int64)], plan.device)
        plan.ops.pick(logits, heat, noise, tuple(t[: len(parts)] for t in runner.answers))


def sizes(most: int) -> list[int]:
    """Numbers of tokens: of each power of two four steps up to the next, and one more than it, which is not even."""
    powers = [1 << power for power in range(most.bit_length())]
    found = {n for p in powers for n in (p, p + 1, p * 5 // 4, p * 3 // 2, p * 7 // 4)}
    return sorted({n for n in found if n <= most} | {most})
