"""One op's implementations side by side, ours and those of repositories, on the sizes of a model: each is held against the reference
first, then timed over batch sizes.

On a GPU a time is the kernels' own, by events on the stream, with an L2 cache full of other data; on a CPU it is the wall's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from slipstream.config import EngineConfig, ModelConfig
from slipstream.config.kernels import OPS, is_repository
from slipstream.errors import ConfigError, KernelError
from slipstream.hardware import find_hardware
from slipstream.ops.candidate import KNOWN, Candidate, cases_of, compare, home, sample
from slipstream.ops.choose import Case
from slipstream.ops.sample import TOLERANCE, seconds
from slipstream.trust import Policy

Tell = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Line:
    """One candidate: its error, as ops/sample.py measures it, and for each batch size the seconds of a call.

    Attributes:
        why: it was not timed, and this is why.
        bytes_per_second: what must be read and written, at the time that it took.
    """

    name: str
    source: str
    error: float | None = None
    seconds: Mapping[int, float] = field(default_factory=dict)
    bytes_per_second: Mapping[int, float] = field(default_factory=dict)
    why: str | None = None


@dataclass(frozen=True, slots=True)
class KernelReport:
    """What was measured, and on what."""

    op: str
    hardware: str
    device: str
    dtype: str
    shape: Mapping[str, Any]
    tolerance: float
    lines: tuple[Line, ...]

    @property
    def timed(self) -> list[Line]:
        return [line for line in self.lines if line.why is None]


def bench_kernels(
    op: str,
    *,
    batches: Sequence[int],
    names: Sequence[str] = (),
    shape: Mapping[str, Any] | None = None,
    model: ModelConfig | None = None,
    device: str = "auto",
    dtype: str | None = None,
    lock: str | None = None,
    policy: str | None = None,
    repeats: int = 20,
    tell: Tell = lambda _: None,
) -> KernelReport:
    """Measure the candidates of an op.

    Args:
        names: implementations of ours and repositories; none: all of ours that can run here, and the repositories that we know, where
            they are pinned. The reference is what others are held against, and is timed only where it is named or alone.
        shape: sizes; what is not in it is the model's, else small.
        dtype: None: the model's, else bfloat16 on a GPU and float32 on a CPU.

    Raises:
        ConfigError: there is no such op, size or device.
        KernelError: a named candidate is not known, or none is right.
        TrustError: a named repository is not to be trusted.
    """
    if op not in OPS:
        raise ConfigError(f"op: there is no {op!r}; there are {', '.join(OPS)}")
    cases = cases_of(op)
    sizes = {**cases.SMALL, **(cases.shape_of(model) if model else {}), **(shape or {})}
    if unknown := sizes.keys() - cases.SMALL.keys():
        raise ConfigError(f"shape: {op} has no {sorted(unknown)[0]}; it has {', '.join(cases.SMALL)}")
    hardware = find_hardware(EngineConfig(device=device), {})
    gpu = hardware.device.startswith("cuda")
    dtype = dtype or ("bfloat16" if gpu else model.dtype if model else "float32")
    if dtype not in TOLERANCE:
        raise ConfigError(f"dtype: must be one of {', '.join(TOLERANCE)}, got {dtype!r}")
    sinks = {"sinks": True} if op == "attention" and model is not None and model.model_type == "gpt_oss" else {}
    facts = cases.facts({**sizes, **sinks})
    case = Case(hardware.device.split(":")[0], dtype, hardware.capability, facts)
    lines = []
    with torch.cuda.device(hardware.device if gpu else -1):
        _check_sizes(op, case, sizes)
        for line, fn in _candidates(op, names, case, lock, policy):
            tell(f"{op}: {line.name}")
            lines.append(line if fn is None else _measure(op, line, fn, case, sizes, batches, repeats))
    if all(line.why for line in lines):
        reasons = tuple((line.name, line.why or "") for line in lines)
        raise KernelError(
            f"{op}: no candidate can be timed: " + "; ".join(": ".join(r) for r in reasons), rejected=reasons
        )
    return KernelReport(op, hardware.name, hardware.device, dtype, sizes, TOLERANCE[dtype], tuple(lines))


def _check_sizes(op: str, case: Case, sizes: Mapping[str, Any]) -> None:
    for name, small in cases_of(op).SMALL.items():
        if type(small) is int and type(sizes[name]) is not int:
            raise ConfigError(f"shape: {name} must be a number, got {sizes[name]!r}")
    try:
        with torch.inference_mode():
            cases_of(op).sample(case, 1, sizes).bind(home(op).IMPLS[-1].load())()
    except (RuntimeError, ValueError, LookupError, TypeError, AssertionError) as e:
        what = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no message'}"
        raise ConfigError(f"shape: {op} cannot be called with these sizes: {what}") from e


def _candidates(
    op: str, names: Sequence[str], case: Case, lock: str | None, policy: str | None
) -> list[tuple[Line, Any]]:
    """Each with what runs it, or with the reason why nothing does."""
    impls = {i.name: i for i in home(op).IMPLS}
    if other := [n for n in names if not is_repository(n) and n not in impls]:
        raise KernelError(f"{op}: no implementation is called {other[0]!r}; known are {', '.join(impls)}")
    rules = Policy.find(lock, policy)
    hub = [n for n in names if is_repository(n)] if names else KNOWN[op]
    found: list[tuple[Line, Any]] = []
    for name in hub:
        if not names and (why := rules.why_not(name)) is not None:
            found.append((Line(name, "", why=why), None))
            continue
        candidate = Candidate(op, name, rules)
        why = candidate.reject(case)
        found.append((Line(name, candidate.source(), candidate.error, why=why), None if why else candidate.fn))
    for name, impl in impls.items():
        if (name in names) if names else name != "reference":
            why = impl.reject(case)
            found.append((Line(name, "slipstream", why=why), None if why else impl.load()))
    if not names and all(fn is None for _, fn in found):
        found.append((Line("reference", "slipstream"), impls["reference"].load()))
    return found


def _measure(
    op: str, line: Line, fn: Any, case: Case, shape: Mapping[str, Any], batches: Sequence[int], repeats: int
) -> Line:
    """Nothing that is wrong on the very sizes that are asked for is timed."""
    try:
        error = compare(op, fn, case, shape)
    except KernelError as e:
        return Line(line.name, line.source, why=str(e))
    if not error <= TOLERANCE[case.dtype]:
        return Line(line.name, line.source, error, why="is wrong")
    times, rates = {}, {}
    for batch in batches:
        calls = sample(op, case, batch, shape)
        with torch.inference_mode():
            run = calls.bind(fn)
        times[batch] = seconds(run, torch.device(case.device), repeats)
        rates[batch] = calls.nbytes / times[batch]
    return Line(line.name, line.source, error, times, rates)


def plot(report: KernelReport, path: Path) -> None:
    """Time over batch size, a line for each candidate, with its error in the legend.

    Raises:
        ConfigError: matplotlib is not installed, or does not know this kind of file.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plot: pictures need an extra: pip install 'slipstream[plot]'") from None
    figure = Figure(figsize=(7.2, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for line in report.timed:
        batches = sorted(line.seconds)
        label = f"{line.name.rsplit('/', 1)[-1]} (error {line.error:.1e})"
        axes.plot(batches, [line.seconds[b] * 1e6 for b in batches], marker="o", markersize=4, label=label)
    times = [t for line in report.timed for t in line.seconds.values()]
    axes.set(xscale="log", xlabel="tokens in the batch", ylabel="microseconds a call")
    if max(times) > 20 * min(times):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    ticks = sorted({b for line in report.timed for b in line.seconds})
    axes.set_xticks(ticks, [str(b) for b in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    sizes = ", ".join(f"{name} {value}" for name, value in report.shape.items() if value is not None)
    axes.set_title(f"{report.op} in {report.dtype} on {report.hardware}\n{sizes}", fontsize=9)
    axes.legend(fontsize=8)
    FigureCanvasAgg(figure)
    try:
        figure.savefig(path, dpi=150)
    except (ValueError, OSError) as e:
        raise ConfigError(f"plot: {path} cannot be written: {e}") from e
