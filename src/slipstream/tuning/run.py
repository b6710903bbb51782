"""Times a handful of candidates for each entry of the table of choices, on the model's own layers, and keeps the best.

A candidate is timed by a CUDA graph that calls it once for each layer, so that weights come from memory as they do in
service. One that cannot run here is left out, and so is one whose answer is not that of the rule.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slipstream.config import EngineConfig
from slipstream.engine.warm import compile_all
from slipstream.errors import ConfigError
from slipstream.hardware import find_hardware
from slipstream.layers.linear import Experts as Stack
from slipstream.layers.linear import Linear
from slipstream.layers.mlp import MoE
from slipstream.llm import LLM
from slipstream.ops import tuned
from slipstream.ops.tuned import Experts, Group, Tile, Tuned, shape_name
from slipstream.plan import Plan, dtype_name
from slipstream.sources import resolve

Tell = Callable[[str], None]
Clock = Callable[[Callable[[], object]], float]  # microseconds of a call
BETTER = 0.98  # of the time of the choice before; what is nearer than that is noise
CLOSE = 2e-2  # of the largest number, how far two right answers in bfloat16 may lie apart
# Entries of a mixture, by the most pairs an expert has, and the pairs that each is measured at.
BOUNDS = {5.0: 3, 12.0: 8, 24.0: 18, 48.0: 36, 96.0: 72, float("inf"): 256}
TOKENS = (1, 2, 4, 8, 16, 32, 48, 64)  # at which a linear layer is measured
LAYERS = 8  # that one measurement goes through at most: more than any cache holds


@dataclass(frozen=True)
class Line:
    """One entry: what was chosen before and what is now, with microseconds of each."""

    op: str
    shape: str
    entry: str
    before: str
    before_us: float
    after: str
    after_us: float


@dataclass(frozen=True)
class Tuning:
    model: str
    card: str
    path: Path
    lines: list[Line] = field(default_factory=list)


def tune(model: str, options: Mapping[str, Any], tell: Tell, **progress: Any) -> Tuning:
    """Measure, and write what was found into the user's table.

    Args:
        progress: `progress` and `compiling` of LLM.

    Raises:
        ConfigError: the model would not run on a CUDA device.
    """
    asked = EngineConfig(**options)
    device = find_hardware(asked, {}).device
    if not device.startswith("cuda"):
        raise ConfigError(
            f"device: tune measures kernels of CUDA devices, and this model would run on {device}, "
            "where there is nothing to choose by measuring; run it on the machine with the GPU"
        )
    path = resolve(model, weights=asked.weights != "random")
    llm = LLM(path, **options, **progress)
    plan, card = llm.plan, llm.plan.hardware.name
    lines: list[Line] = []
    with torch.inference_mode(), torch.cuda.device(plan.device):
        moe = dict(_experts(plan, tell, lines, graph_clock))
        linear = dict(_linears(plan, tell, lines, graph_clock))
    return Tuning(model, card, tuned.write(card, Tuned(moe, linear)), lines)


def graph_clock(call: Callable[[], object], repeats: int = 9) -> float:
    """Microseconds of a call, recorded as a CUDA graph: the median of some replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is compiled is compiled before anything is recorded
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return 1000 * statistics.median(begin.elapsed_time(end) for begin, end in events)


def _experts(plan: Plan, tell: Tell, lines: list[Line], clock: Clock) -> Iterator[tuple[str, Experts]]:
    """Entries of the mixtures among the layers: one, if there are any that a tile can be chosen for."""
    layers = [m for m in plan.model.modules() if isinstance(m, MoE) and len(m.gate_up.stack) == 2]
    if not layers or not plan.ops.experts.kernel.tunable or plan.dtype != torch.bfloat16:
        return
    from slipstream.ops.moe.triton import FEW, choose_group, choose_tiles, stacks

    one = layers[0]
    number, name = one.gate_up.shape[0], shape_name("mxfp4", one.gate_up.shape)
    grouped = choose_group(1 << 20, 1, torch.empty(0, dtype=plan.dtype, device=plan.device), one.down.stack) > 0
    known = getattr(plan.ops.experts.kernel.experts, "keywords", {}).get("tuned")

    def call(tokens: int) -> tuple[Callable[..., Any], int]:
        """What runs all layers with a table, and the pairs."""
        draw = torch.Generator(plan.device).manual_seed(tokens)
        x = torch.randn(tokens, one.gate_up.shape[2], generator=draw, device=plan.device).to(plan.dtype)
        ids = torch.rand(tokens, number, generator=draw, device=plan.device).topk(one.top_k).indices.int()
        shares = torch.full(ids.shape, 1 / one.top_k, device=plan.device)

        def run(table: Experts | None) -> Any:
            for layer in layers[:LAYERS]:
                parts: tuple[Stack, Stack] = (layer.gate_up, layer.down)
                out = stacks(x, ids, shares, *parts, None, kind=one.kind, limit=one.limit, tuned=table)
            return out

        return run, ids.numel()

    def now(pairs: int) -> Tile | Group:
        x = torch.empty(0, dtype=plan.dtype, device=plan.device)
        size = choose_group(pairs, number, x, one.down.stack, known)
        return Group(size) if size else Tile(*choose_tiles(pairs, number, plan.dtype, True, known)[1:])

    found: list[tuple[float, Tile | Group | None]] = []
    for most, each in {0.0: 0, **BOUNDS}.items():
        tokens = max(1, each * number // one.top_k)
        entry = "one token" if not most else f"up to {most:g} pairs an expert" if most < float("inf") else "more pairs"
        run, pairs = call(tokens)
        tile = now(pairs)
        by_rule = not most and (known is None or known.few is None)
        before = None if by_rule else tile
        if (pairs <= FEW) != (not most):  # of few experts, this entry is about so few pairs that it is the one before
            found.append((most, before))
            continue
        tell(f"experts, {entry}")
        tried = [*([None] if by_rule else []), *candidates(tile, grouped)]
        trials = {c: partial(run, only(c)) for c in tried}
        compile_all(lambda t=trials: [run() for run in t.values()], lambda kernel: None)  # type: ignore[misc]
        best, times = fastest(before, trials, clock)
        count = len(layers[:LAYERS])
        lines.append(Line("moe", name, entry, spell(before), times[before] / count, spell(best), times[best] / count))
        found.append((most, best))
    (_, few), *steps = found
    assert not isinstance(few, Group)
    yield name, Experts(few, tuple((most, choice) for most, choice in steps if choice is not None))


def only(choice: Tile | Group | None) -> Experts:
    """A table that has one choice for everything."""
    return Experts(choice if isinstance(choice, Tile) else None, ((float("inf"), choice or Group(64)),))


def candidates(before: Tile | Group, grouped: bool) -> list[Tile | Group]:
    """What is tried: the choice so far, what lies around it, and products of sorted pairs where there are such."""
    if isinstance(before, Group):
        return [before, Group(192 - before.group), Tile(64, 8, 2, 4, 4), Tile(128, 8, 2, 4, 3)]
    p, s, b, w, n = before
    around = [
        before, Tile(p, s, b, w, n - 1), Tile(p, s, b, w, n + 1), Tile(p, s, 2 * b, w, n), Tile(p, s, b // 2, w, n),
        Tile(2 * p, s, b, w, n), Tile(p // 2, s, b, w, n), Tile(p, 2 * s, b, w, n), Tile(p, s // 2, b, w, n),
    ]  # fmt: skip
    possible = [t for t in around if tuned.possible(t)]
    return [*possible, *([Group(64), Group(128)] if grouped and p >= 32 else [])]


def fastest(before: Any, trials: Mapping[Any, Callable[[], Tensor]], clock: Clock) -> tuple[Any, dict[Any, float]]:
    """The best of the candidates, and the time of each that ran and was right. One has to be clearly better than `before`."""
    from triton.errors import TritonError

    want = trials[before]().float()
    scale = float(want.abs().max())
    times: dict[Any, float] = {}
    for choice, run in trials.items():
        try:
            got = run().float()
            if choice == before or float((got - want).abs().max()) <= CLOSE * scale:
                times[choice] = clock(run)
        except (TritonError, RuntimeError) as e:  # more shared memory or registers than there are, or no such layout
            if not isinstance(e, TritonError) and "PassManager" not in str(e):
                raise
    best = min(times, key=lambda choice: times[choice])
    return (best if times[best] < BETTER * times[before] else before), times


def _linears(plan: Plan, tell: Tell, lines: list[Line], clock: Clock) -> Iterator[tuple[str, int]]:
    """For each shape of a dense weight, the tokens up to which our kernel is faster than cuBLAS."""
    from slipstream.ops.linear.triton_few import Few

    found: dict[tuple[int, ...], list[tuple[Few, Linear, Tensor]]] = {}
    for layer in plan.model.modules():
        if not isinstance(layer, Linear) or len(layer.parts) != 1:
            continue
        kernel, (weight, *_) = layer.parts[0]
        if isinstance(kernel, Few):
            found.setdefault(tuple(weight.shape), []).append((kernel, layer, weight))
    for shape, layers in found.items():
        name = shape_name(dtype_name(plan.dtype), shape)
        tell(f"linear layers of {shape[0]} x {shape[1]}")
        times = {tokens: _both(plan, layers[:LAYERS], tokens, clock) for tokens in TOKENS}
        before, few = layers[0][0].few, crossover(times)
        count = len(layers[:LAYERS])
        at = max(t for t in TOKENS if t <= max(few, before, 1))
        ours, cublas = times[at]
        lines.append(
            Line("linear", name, f"{at} tokens", f"up to {before}", (ours if at <= before else cublas) / count,
                 f"up to {few}", (ours if at <= few else cublas) / count)
        )  # fmt: skip
        yield name, few


def _both(plan: Plan, layers: Sequence[Any], tokens: int, clock: Clock) -> tuple[float, float]:
    """Microseconds of ours and of cuBLAS. Logits are float32, which decides between them by as much, so all are timed alike."""
    draw = torch.Generator(plan.device).manual_seed(tokens)
    x = torch.randn(tokens, layers[0][2].shape[1], generator=draw, device=plan.device).to(plan.dtype)

    def ours() -> None:
        for kernel, layer, weight in layers:
            kernel.own(x, weight, layer.bias)

    def cublas() -> None:
        for _, layer, weight in layers:
            torch.nn.functional.linear(x, weight, layer.bias)

    return clock(ours), clock(cublas)


def crossover(times: Mapping[int, tuple[float, float]]) -> int:
    """The tokens up to which the first of two is faster, and never slower before."""
    few = 0
    for tokens, (ours, cublas) in sorted(times.items()):
        if ours > cublas:
            break
        few = tokens
    return few


def spell(choice: Tile | Group | None) -> str:
    if choice is None:
        return "by rule"
    if isinstance(choice, Group):
        return f"sorted, {choice.group} pairs"
    p, s, b, w, n = choice
    return f"{p} pairs x {s * 16} rows, {b * 32} inputs, {w} warps, {n} stages"
