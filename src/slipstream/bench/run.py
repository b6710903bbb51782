"""A benchmark from beginning to end: options, model, checks, timing, the peer, the machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from slipstream.bench import start
from slipstream.bench.machine import Machine, measure_machine
from slipstream.bench.measure import Slipstream, Tell, Workload, decode, latencies, prefill, serve
from slipstream.bench.peer import Transformers, installed, release
from slipstream.bench.report import Figure, Report, versions
from slipstream.bench.work import Work, decode_work, prefill_work
from slipstream.checkpoint.open import open_checkpoint, open_random
from slipstream.config import EngineConfig, ModelConfig
from slipstream.errors import CapacityError, ConfigError, RequestError
from slipstream.llm import LLM
from slipstream.plan import Plan, make_plan
from slipstream.sources import resolve

STEP = 8192  # tokens of the largest step that a benchmark asks for by itself
LEAST_SEQS, LEAST_TOKENS = 64, 2048  # what the plan takes on any machine
GB = 1e9
Measured = tuple[list[float], dict[str, float]]  # values, and what else is known


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a benchmark is asked for, beside its own sizes.

    Attributes:
        options: of the engine, as the user gave them.
        against: measure transformers too.
        tell: hears what is going on; `progress` the bytes that are loaded.
    """

    model: str
    options: Mapping[str, Any]
    against: bool = False
    tell: Tell = lambda _: None
    progress: Callable[[int, int], None] | None = None

    def compiling(self, done: int, total: int) -> None:
        self.tell(f"compiling kernels for this card, once: {done} of {total}")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One figure to be measured.

    Attributes:
        seqs: sequences that it needs, in one step where they are to run `together`.
        input_len, new: tokens of a prompt and of an answer.
        time: the values, in `unit`, and what else is known.
        least: what must be read and computed, one after the other.
        value: what so many seconds are in `unit`.
    """

    name: str
    at: Mapping[str, int]
    unit: str
    seqs: int
    together: bool
    input_len: int
    new: int
    time: Callable[[Workload], Measured]
    least: Callable[[Plan], list[Work]]
    value: Callable[[float], float]


def decode_case(batch: int, input_len: int = 128, output_len: int = 128, repeats: int = 3) -> Case:
    """Tokens a second of `batch` sequences together; the time of their prompts is taken off."""
    context = input_len + (output_len + 1) / 2
    return Case(
        name="decode",
        at={"batch_size": batch, "input_len": input_len, "output_len": output_len},
        unit="tok/s",
        seqs=batch,
        together=True,
        input_len=input_len,
        new=output_len + 1,
        time=lambda work: (decode(work, batch, output_len, repeats), {}),
        least=lambda plan: [decode_work(plan, batch, context)],
        value=lambda seconds: batch / seconds,
    )


def prefill_case(input_len: int = 4096, repeats: int = 5) -> Case:
    """Milliseconds from one prompt to its first new token."""
    return Case(
        name="prefill",
        at={"input_len": input_len},
        unit="ms",
        seqs=1,
        together=True,
        input_len=input_len,
        new=1,
        time=lambda work: ([1000 * seconds for seconds in prefill(work, repeats)], {}),
        least=lambda plan: [prefill_work(plan, input_len)],
        value=lambda seconds: 1000 * seconds,
    )


def serve_case(num_prompts: int = 256, input_len: int = 1024, output_len: int = 256, repeats: int = 1) -> Case:
    """New tokens a second where all prompts come at once; its limit is all prompts, and then all answers together."""

    def time(work: Workload) -> Measured:
        runs = serve(work, num_prompts, output_len, repeats)
        return [num_prompts * output_len / r.seconds for r in runs], latencies(runs)

    def least(plan: Plan) -> list[Work]:
        together = min(num_prompts, plan.max_num_seqs)
        step = decode_work(plan, together, input_len + output_len / 2)
        return [prefill_work(plan, input_len, num_prompts), step * (num_prompts * (output_len - 1) / together)]

    return Case(
        name="serve",
        at={"num_prompts": num_prompts, "input_len": input_len, "output_len": output_len},
        unit="tok/s",
        seqs=num_prompts,
        together=False,
        input_len=input_len,
        new=output_len,
        time=time,
        least=least,
        value=lambda seconds: num_prompts * output_len / seconds,
    )


def run(asked: Asked, cases: Sequence[Case]) -> Report:
    """Measure our engine, then the peer, then the machine, each with the memory to itself.

    Raises:
        ConfigError, RequestError: options, sizes and model do not go together, or the peer is not there.
        CapacityError: it does not fit into memory.
        SlipstreamError: what the model answers is not right.
    """
    if asked.against:
        installed()
    random = asked.options.get("weights") == "random"
    path = resolve(asked.model, weights=not random)
    config = ModelConfig.from_hf((open_random(path) if random else open_checkpoint(path)).config)
    options, chosen = settle(asked.options, config, cases)
    notes: list[str] = []

    def ours() -> tuple[Plan, list[Measured]]:
        llm = LLM(path, progress=asked.progress, compiling=asked.compiling, **options)
        for case in cases:
            room(llm.plan, case)
        if asked.against:
            Transformers.refuse(llm.plan)
        found = [case.time(Workload(Slipstream(llm), case.input_len, asked.tell)) for case in cases]
        if thrown_out := llm.snapshot().preemptions:
            notes.append(f"{thrown_out} answers gave way for want of memory, and were computed again")
        return replace(llm.plan, model=cast(Any, None)), found  # the numbers alone: weights are to be given back

    def theirs() -> list[list[float]]:
        asked.tell("loading into transformers")
        peer = Transformers(path, plan)
        notes.append(f"transformers holds the weights as {peer.holds}")
        found: list[list[float]] = []
        for case in cases:
            work = Workload(peer, case.input_len, lambda text: asked.tell(f"transformers, {text}"))
            try:
                found.append(case.time(work)[0])
            except CapacityError as e:
                notes.append(str(e))
                found.append([])
        return found

    plan, measured = ours()
    release(plan.device)
    peers = theirs() if asked.against else [[] for _ in cases]
    release(plan.device)
    asked.tell("measuring the machine")
    machine = measure_machine(plan.hardware.name, plan.device, plan.dtype)
    figures = [
        _figure(case, plan, machine, values, more, peer)
        for case, (values, more), peer in zip(cases, measured, peers, strict=True)
    ]
    used = versions("transformers") if asked.against else versions()
    return Report(asked.model, figures, asdict(machine), plan.to_dict(), chosen, used, notes)


def run_load(asked: Asked, repeats: int = 3) -> Report:
    """Bytes a second while loading, and the seconds from a process's start to its first token."""
    from slipstream.checkpoint.transfer import BLOCK, READERS

    if asked.options.get("weights") == "random":
        raise ConfigError("weights: random ones are drawn, so there is nothing to load and time; leave the option out")
    path = resolve(asked.model)
    plan = make_plan(EngineConfig(**asked.options), open_checkpoint(path))
    runs = []
    for i in range(repeats + 1):  # the first brings the files into the page cache
        asked.tell(f"process {i + 1} of {repeats + 1}")
        runs.append(start.start(path, asked.options))
    asked.tell("measuring the machine")
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(path.glob("*.gguf"))
    read = max(start.read_rate(files, READERS, BLOCK) for _ in range(3))
    copy = start.copy_rate(str(plan.device))
    limit, bound = min((read, "reading"), (copy, "copying"))
    rates = [r.bytes / r.load_seconds for r in runs[1:]]
    rate, firsts = statistics.median(rates), [r.first_token_seconds for r in runs[1:]]
    load = Figure("load", {}, rate / GB, "GB/s", [r / GB for r in rates], limit / GB, bound, rate / limit,
                  {"seconds": runs[0].bytes / rate, "bytes": runs[0].bytes})  # fmt: skip
    least, first = runs[0].bytes / limit, statistics.median(firsts)
    more = {
        "import_seconds": statistics.median(r.import_seconds for r in runs[1:]),
        "cold_seconds": runs[0].first_token_seconds,
    }
    token = Figure("first_token", {}, first, "s", firsts, least, bound, least / first, more)
    machine = {
        "name": plan.hardware.name,
        "read_gb_s": read / GB,
        "copy_gb_s": None if copy == float("inf") else copy / GB,
    }
    return Report(asked.model, [load, token], machine, plan.to_dict(), {}, versions())


def _figure(case: Case, plan: Plan, machine: Machine, runs: list[float], more: dict[str, float],
            theirs: list[float]) -> Figure:  # fmt: skip
    parts = case.least(plan)
    rates = machine.bandwidth, machine.flops
    seconds = sum(part.seconds(*rates) for part in parts)
    reading = sum(part.seconds(*rates) for part in parts if part.is_read(*rates))
    value, limit = statistics.median(runs), case.value(seconds)
    lower = case.unit == "ms"
    work = {"bytes": sum(p.bytes for p in parts), "flops": sum(p.flops for p in parts), "least_ms": 1000 * seconds}
    peer = {"transformers": statistics.median(theirs)} if theirs else {}
    ratio = None if not peer else peer["transformers"] / value if lower else value / peer["transformers"]
    bound = "bandwidth" if 2 * reading >= seconds else "matrices"
    return Figure(case.name, case.at, value, case.unit, runs, limit, bound, limit / value if lower else value / limit,
                  {**more, **work}, peer, ratio)  # fmt: skip


def settle(
    given: Mapping[str, Any], config: ModelConfig, cases: Sequence[Case]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All options of the engine, and those among them that the cases need and the user did not give.

    Raises:
        RequestError: the model has not so many positions.
        ConfigError: what the user set does not let a case be what it says.
    """
    step = min(STEP, max(c.seqs * c.input_len for c in cases))
    wanted = {
        "max_model_len": max(c.input_len + c.new for c in cases),
        "max_num_seqs": max(LEAST_SEQS, *(c.seqs for c in cases)),
        "max_num_batched_tokens": max(LEAST_TOKENS, step),
        "enable_prefix_caching": False,
    }
    for case in cases:
        if (length := case.input_len + case.new) > config.max_position_embeddings:
            raise RequestError(
                f"input_len: {case.input_len} tokens and {case.new} new ones are more than the "
                f"{config.max_position_embeddings} positions of this model; take fewer"
            )
        for option, need in (("max_model_len", length), ("max_num_seqs", case.seqs if case.together else 1)):
            if given.get(option, need) < need:
                raise ConfigError(
                    f"{option}: {given[option]} is less than the {need} that are to be measured; leave it out"
                )
    planned = {"max_num_seqs": LEAST_SEQS, "max_num_batched_tokens": LEAST_TOKENS}
    chosen = {name: value for name, value in wanted.items() if name not in given and value != planned.get(name)}
    return {**given, **chosen}, chosen


def room(plan: Plan, case: Case) -> None:
    """Raises CapacityError if the sequences of a case that run together cannot be in the cache together."""
    size, seqs, length = plan.page_size, case.seqs if case.together else 1, case.input_len + case.new
    for group, pages in zip(plan.groups, plan.num_pages, strict=True):
        one = group.max_pages(length, 1, size)
        extra = 0 if group.window is None else group.max_pages(length, plan.max_num_batched_tokens, size)
        if seqs * one + extra > pages:
            raise CapacityError(
                f"{seqs} sequences of {length} tokens need {seqs * one + extra:,} pages of {group.name}, and the cache has "
                f"{pages:,}, for {max(0, (pages - extra) // one)} of them; take fewer or shorter ones, or more kv_cache_memory_bytes"
            )
