"""A rank that is not the first: it holds its share of the model, and runs the steps that rank 0 makes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from slipstream.checkpoint.load import load
from slipstream.checkpoint.open import Checkpoint, open_checkpoint, open_random
from slipstream.config import EngineConfig
from slipstream.engine.runner import Flight, Runner, StepResult
from slipstream.parallel.launch import Processes, connect, live
from slipstream.parallel.shares import Ranks
from slipstream.plan import Plan, make_plan
from slipstream.request import Step


class Crew:
    """All ranks, as rank 0 sees them."""

    def __init__(self, asked: EngineConfig, model: str) -> None:
        self.asked, self.ranks = asked, Ranks(0, asked.tensor_parallel_size)
        self._processes = Processes({"model": model, "asked": dataclasses.asdict(asked)}, self.ranks.size)
        self.close, self.error = self._processes.close, self._processes.error
        self.group, self.words = self._processes.wait(
            lambda: connect(self.ranks, self._processes.store, _backend(asked))
        )

    def plan(self, checkpoint: Checkpoint) -> Plan:
        mine = make_plan(_on_device(self.asked, 0), checkpoint, ranks=self.ranks, group=self.group)
        return self._processes.wait(lambda: agree(mine, self.words))


class Leader:
    """Rank 0's runner: every step goes to all ranks before it is launched here."""

    def __init__(self, runner: Runner, crew: Crew) -> None:
        self._runner, self._crew = runner, crew

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def launch(self, step: Step) -> Flight:
        try:
            dist.broadcast_object_list([step], src=0, group=self._crew.words)
            return self._runner.launch(step)
        except RuntimeError as e:
            raise self._crew.error(e) from e

    def finish(self, flight: Flight) -> StepResult:
        try:
            return self._runner.finish(flight)
        except RuntimeError as e:
            raise self._crew.error(e) from e


def agree(plan: Plan, words: dist.ProcessGroup) -> Plan:
    """The same pages and lengths on every rank: the fewest that any of them has room for."""
    mine = (*plan.num_pages, plan.max_model_len, plan.page_size)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine, group=words)
    *pages, length, size = map(min, zip(*found, strict=True))
    if any(f[-1] != size for f in found):
        raise AssertionError("ranks planned pages of different sizes")
    return dataclasses.replace(plan, num_pages=tuple(pages), max_model_len=length)


def _on_device(asked: EngineConfig, rank: int) -> EngineConfig:
    return dataclasses.replace(asked, device=f"cuda:{rank}") if _backend(asked) == "nccl" else asked


def _backend(asked: EngineConfig) -> str:
    return "nccl" if asked.device == "cuda" or (asked.device == "auto" and torch.cuda.is_available()) else "gloo"


def main() -> None:
    rank = int(sys.argv[1])
    said = live()
    ranks, asked = Ranks(rank, said["size"]), EngineConfig(**said["asked"])
    if asked.num_threads is not None:
        torch.set_num_threads(asked.num_threads)
    group, words = connect(ranks, dist.TCPStore("127.0.0.1", said["port"], is_master=False), _backend(asked))
    asked = _on_device(asked, rank)
    path = Path(said["model"])
    checkpoint = open_random(path, asked.seed or 0) if asked.weights == "random" else open_checkpoint(path)
    plan = agree(make_plan(asked, checkpoint, ranks=ranks, group=group), words)
    load(plan.model, plan.loads, checkpoint, plan.device)
    runner = Runner(plan, plan.model)
    while True:
        box: list[Any] = [None]
        dist.broadcast_object_list(box, src=0, group=words)
        runner.launch(box[0])


if __name__ == "__main__":
    main()
