"""Ranks that share a model: the first makes the steps, the others hold their share of the model and run what it makes."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from slipstream.checkpoint.load import load
from slipstream.checkpoint.open import Checkpoint, open_checkpoint, open_random
from slipstream.config import EngineConfig, ModelConfig
from slipstream.engine.runner import Flight, Runner, StepResult
from slipstream.errors import ConfigError
from slipstream.parallel.connect import connect
from slipstream.parallel.launch import Others
from slipstream.parallel.launcher import find_front, launchers_store, one_machine, place, refuse_other_size
from slipstream.parallel.link import Link
from slipstream.parallel.shares import Ranks, share_of
from slipstream.parallel.steps import receive, send
from slipstream.plan import Plan, make_plan
from slipstream.request import UNKNOWN, Step

_last: weakref.ref[Others] | None = None  # a process has one default group


class Crew:
    """All ranks, as rank 0 sees them. When nobody holds it any more, the other ranks end.

    Args:
        model: where it is, on every machine.

    Raises:
        ConfigError: there are fewer GPUs than ranks, or another number of ranks was launched.
    """

    def __init__(self, asked: EngineConfig, model: str) -> None:
        size = asked.tensor_parallel_size
        self.asked, self.ranks = _with_threads(_with_device(asked)), Ranks(0, size)
        launched = place()
        if launched is not None:
            refuse_other_size(size)
        _one_at_a_time()
        self._others = Others(size)
        self._finalizer = weakref.finalize(self, self._others.close)
        try:
            words = {"model": model, "asked": dataclasses.asdict(self.asked), "size": size}
            if launched is None:
                self._others.start(words)
            else:
                self._others.join(words)
            self._others.hear("started")
            store, device = self._others.store, _device(self.asked, int(os.environ.get("LOCAL_RANK", 0)))
            assert store is not None
            here = one_machine(size)
            reduce = self.asked.reduce_implementation
            self.wires = self._others.wait(lambda: connect(self.ranks, store, device, here, reduce))
        except BaseException:
            self.close()
            raise
        global _last
        self.wires = dataclasses.replace(self.wires, check=self._others.check)
        self._others.group, self._others.peers = self.wires.tensors, self.wires.peers
        self._others.stuck = self.wires.stuck
        _last = weakref.ref(self._others)
        self.asked = dataclasses.replace(self.asked, device=str(device))
        self.check, self.lost, self.together = self._others.check, self._others.lost, self._others.together

    def plan(self, checkpoint: Checkpoint) -> Plan:
        """This rank's, with as many pages and as long answers as every rank has room for."""
        mine = make_plan(self.asked, checkpoint, ranks=self.ranks, wires=self.wires)
        found = [_sizes(mine), *self._others.hear("plan")]
        *pages, length, size = map(min, zip(*found, strict=True))
        if any(f[-1] != size for f in found):
            raise AssertionError("ranks planned pages of different sizes")
        self._others.tell("plan", [*pages, length])
        return dataclasses.replace(mine, num_pages=tuple(pages), max_model_len=length)

    def watched(self, progress: Callable[[int, int], None] | None) -> Callable[[int, int], None]:
        """The same while weights load, but it ends when another rank does."""

        def tell(done: int, total: int) -> None:
            self.check()
            if progress is not None:
                progress(done, total)

        return tell

    def end_with(self, what: Callable[[], object]) -> None:
        """What is to be done before the ranks part. It may not hold whoever holds this."""
        self._others.let_go = what

    def ready(self) -> None:
        """Wait until all have loaded."""
        self._others.hear("ready")

    def close(self) -> None:
        self._finalizer()


class Leader:
    """Rank 0's runner: every step goes to all ranks before it is launched here."""

    def __init__(self, runner: Runner, crew: Crew) -> None:
        assert crew.wires.words is not None
        self._runner, self._crew, self._words = runner, crew, crew.wires.words
        if runner.decoder is not None:
            crew.end_with(runner.decoder.recorded.clear)  # the garbage collector ends weak references first
        crew.ready()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def check(self) -> None:
        """Raises RankError: a rank is gone."""
        self._crew.check()

    def launch(self, step: Step) -> Flight:
        """Raises RankError: a rank is gone, or failed in this step, also this one: then no two are at the same place any more."""
        with self._crew.together(), _uninterrupted():
            try:
                send(step, self._words)
                return self._runner.launch(step)
            except Exception as e:
                raise self._crew.lost(e) from e

    def finish(self, flight: Flight) -> StepResult:
        with self._crew.together():
            while flight.arrived is not None and not flight.arrived.query():
                self._crew.check()
                time.sleep(0)
            result = self._runner.finish(flight)
            self._crew.check()  # what a step gave that was cut off is nothing
            return result


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end, as ranks that were interrupted at different places could not go on."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    pressed: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            before(*pressed[0])


def _one_at_a_time() -> None:
    """The groups of a model that is gone, or whose ranks failed, are in nobody's way.

    Raises:
        ConfigError: those of one that lives are.
    """
    if not dist.is_initialized():
        return
    gc.collect()
    last = None if _last is None else _last()
    if last is not None and last.failure is not None:
        last.close()
    if dist.is_initialized():
        raise ConfigError(
            "tensor_parallel_size: torch.distributed is in use in this process, by another model of several ranks or by "
            "yourself; let go of that one first, or load this one in a process of its own"
        )


def _with_threads(asked: EngineConfig) -> EngineConfig:
    """Ranks on a CPU share its cores."""
    if asked.num_threads is not None or _on_gpus(asked):
        return asked
    beside = (
        int(os.environ.get("LOCAL_WORLD_SIZE", asked.tensor_parallel_size)) if place() else asked.tensor_parallel_size
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return dataclasses.replace(asked, num_threads=max(1, min(torch.get_num_threads(), cores // beside)))


def _with_device(asked: EngineConfig) -> EngineConfig:
    """Raises ConfigError: this machine cannot give each rank its own."""
    if asked.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"device: {asked.tensor_parallel_size} ranks cannot share {asked.device}; write cuda, or cpu, and choose cards with "
            f"CUDA_VISIBLE_DEVICES"
        )
    if asked.device == "auto":
        asked = dataclasses.replace(asked, device="cuda" if torch.cuda.is_available() else "cpu")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if place() else asked.tensor_parallel_size
    if asked.device == "cuda" and torch.cuda.device_count() < here:
        raise ConfigError(
            f"tensor_parallel_size: {here} ranks on this machine want a GPU each, and torch sees {torch.cuda.device_count()}; "
            f"take fewer, or device='cpu'"
        )
    return asked


def _on_gpus(asked: EngineConfig) -> bool:
    return asked.device.startswith("cuda")


def _device(asked: EngineConfig, local: int) -> torch.device:
    return torch.device("cuda", local) if _on_gpus(asked) else torch.device("cpu")


def _sizes(plan: Plan) -> list[int]:
    return [*plan.num_pages, plan.max_model_len, plan.page_size]


def serve(link: Link, said: dict[str, Any]) -> NoReturn:
    """Be one of the others, until rank 0 ends; it is told what goes wrong here."""
    try:
        _serve(link, said)
    except BaseException as e:
        traceback.print_exc()
        sys.stderr.flush()
        link.say("error", [type(e).__name__, str(e)])
        time.sleep(0.2)  # whoever waits for this rank sees it end; first its reason should arrive
    os._exit(1)


def _serve(link: Link, said: dict[str, Any]) -> None:
    ranks, asked = Ranks(said["rank"], said["size"]), EngineConfig(**said["asked"])
    if asked.num_threads is not None:
        torch.set_num_threads(asked.num_threads)
    device = _device(_with_device(asked), said["local"])
    here = one_machine(ranks.size)
    store = dist.TCPStore("127.0.0.1", said["port"], is_master=False) if "port" in said else launchers_store()
    link.say("started", True)
    wires = connect(ranks, store, device, here, asked.reduce_implementation)
    path = Path(said["model"])
    checkpoint = open_random(path, asked.seed or 0) if asked.weights == "random" else open_checkpoint(path)
    plan = make_plan(dataclasses.replace(asked, device=str(device)), checkpoint, ranks=ranks, wires=wires)
    link.say("plan", _sizes(plan))
    *pages, length = link.wait("plan")
    plan = dataclasses.replace(plan, num_pages=tuple(pages), max_model_len=length)
    load(plan.model, plan.loads, checkpoint, plan.device)
    runner = Runner(plan, plan.model)
    link.say("ready", True)
    assert wires.words is not None
    before: Flight | None = None
    while True:
        step = receive(wires.words)
        # Steps end here in the order in which they do on rank 0, so that penalties count the same tokens in each.
        if before is not None and not any(UNKNOWN in c.token_ids[-1:] for c in step.chunks):
            runner.finish(before)
            before = None
        runner.follow(step)
        flight = runner.launch(step)
        if before is not None:
            runner.finish(before)
        before = flight if flight.plain else None  # else rank 0 alone chooses, and the next step has its tokens


def gather(asked: EngineConfig, config: ModelConfig, model: str) -> Crew | None:
    """The ranks that are to share a model; None: this process alone has it.

    Where a launcher has made this process another rank than the first, it serves that one and then ends: nothing comes back.

    Raises:
        ConfigError: there is less of something than ranks, which is known before any is started; or as Crew says.
    """
    if asked.tensor_parallel_size == 1:
        return None
    here = place()
    if here is not None and here.rank > 0:
        refuse_other_size(asked.tensor_parallel_size)
        attend()
        raise SystemExit(0)
    share_of(config, Ranks(0, asked.tensor_parallel_size), spread=asked.enable_expert_parallel)
    return Crew(asked, model)


def attend(patience: float | None = None) -> None:
    """Under a launcher, in a rank that is not the first: serve rank 0, if it wants anything; leaves only where it does not."""
    found = find_front() if patience is None else find_front(patience)
    if found is not None:
        serve(*found)
