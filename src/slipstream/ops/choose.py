"""Pick one implementation of an op for one case, and keep the reason why each other one lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from slipstream.errors import KernelError


@dataclass(frozen=True, slots=True)
class Case:
    """Everything an implementation may depend on. `facts` holds what only one op asks about (window, sinks, format)."""

    device: str  # "cpu", "cuda", "mps"
    dtype: str  # activations: "float32", "bfloat16", "float16"
    capability: tuple[int, int] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        return self.facts.get(name, default)

    @property
    def batch_invariant(self) -> bool:
        """A row's result must have the same bits whatever else is in the call."""
        return bool(self.facts.get("batch_invariant"))


@dataclass(frozen=True, slots=True)
class Impl:
    """A candidate. `load` imports and returns the callable only when it is chosen.

    Attributes:
        reject: says why it cannot run.
        unasked: says why it is taken only if it is forced.
        source: where it is from, once it is loaded, if it did not come with slipstream.
    """

    name: str
    load: Callable[[], Any]
    reject: Callable[[Case], str | None]
    unasked: Callable[[Case], str | None] = lambda case: None
    source: Callable[[], str] = lambda: ""


def only_invariant(case: Case) -> str | None:
    """Why what is slower and has the same bits in any batch is not taken, where that was not asked for."""
    return None if case.batch_invariant else "is slower, so it runs only with batch_invariant"


def stands_in(case: Case) -> str | None:
    """Reject: of an entry that runs the reference's plain torch on CUDA, for machines that have no Triton."""
    return None if case.device == "cuda" else "is for CUDA without Triton; here the same is called reference"


def needs_triton(case: Case) -> str | None:
    """Why a Triton kernel of no other demands cannot run. Loads and stores of bfloat16 work on every such card."""
    if case.device != "cuda":
        return "is for CUDA devices"
    if case.capability is not None and case.capability < (7, 0):
        return f"needs compute capability 7.0, and this device has {'.'.join(map(str, case.capability))}"
    return None if find_spec("triton") else "triton is not installed: pip install triton"


@dataclass(frozen=True, slots=True)
class Choice:
    """The implementation taken, and (name, why) for each one passed over. `source` is where it is from, if not from slipstream."""

    op: str
    name: str
    reason: str
    fn: Any
    rejected: tuple[tuple[str, str], ...]
    source: str = ""


def choose(op: str, impls: Sequence[Impl], case: Case, force: str | None = None) -> Choice:
    """Take the first implementation that does not reject the case; `impls` stand best first, reference last.

    Raises:
        KernelError: `force` names an unknown implementation or one that cannot run, or none can.
    """
    if force is not None and force not in {i.name for i in impls}:
        raise KernelError(f"{op}: no implementation is called {force!r}; known are {', '.join(i.name for i in impls)}")
    rejected: list[tuple[str, str]] = []
    taken: Impl | None = None
    for impl in impls:
        why = impl.reject(case)
        if why is None and force is None:
            why = impl.unasked(case)
        if why is None and force is None and impl.name == "reference" and case.device == "cuda":
            why = "the reference is never taken on CUDA unless it is forced"
        if why is None and force is not None and impl.name != force:
            why = f"{force} was forced"
        if why is None and taken is not None:
            why = f"{taken.name} stands before it"
        if why is None:
            taken = impl
        else:
            rejected.append((impl.name, why))
    if taken is None:
        reasons = "; ".join(f"{name}: {why}" for name, why in rejected)
        what = f"{force!r} was forced but cannot run" if force else "no implementation can run"
        facts = "".join(f", {name}={value}" for name, value in case.facts.items())
        message = f"{op}: {what} on {case.device} with {case.dtype}{facts}: {reasons or 'there is none'}"
        raise KernelError(message, rejected=tuple(rejected))
    reason = "forced" if force else ("the first of the list that can run" if rejected else "the only one")
    return Choice(op, taken.name, reason, taken.load(), tuple(rejected), taken.source())
