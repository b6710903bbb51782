"""A repository's kernels as one more implementation of an op, taken or rejected with a reason like any other.

It is opened (which verifies it: ops/hub.py), adapted to the op's own signature (hub.py in the op's folder), and held against the
op's reference on small inputs; with kernels="auto" it is also timed against what would run otherwise, and must not be slower.
That happens once, where choices are made. Nothing is patched: the model calls what comes out of here as it calls our own.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from slipstream.config.kernels import KernelsAsked, is_repository
from slipstream.errors import KernelError, TrustError
from slipstream.ops.choose import Case, Choice, Impl, choose
from slipstream.ops.sample import TOLERANCE, Sample, error, seconds

if TYPE_CHECKING:
    from slipstream.ops.hub import Opened
    from slipstream.trust import Policy

log = logging.getLogger(__name__)
# What kernels="auto" tries, best first.
KNOWN: dict[str, tuple[str, ...]] = {
    "norm": ("kernels-community/liger-kernels:LigerRMSNorm",),
    "activation": ("kernels-community/activation",),
    "attention": ("kernels-community/vllm-flash-attn3",),
    "moe": ("kernels-community/gpt-oss-triton-kernels", "kernels-community/megablocks"),
    "rotary": ("kernels-community/rotary",),
}
HOMES = {"rotary": "attention_input"}  # the folder of an op, where it has another name
CHECKED, TIMED = 7, 64  # tokens
SLOWER = 1.05  # what a clock may be wrong by


def home(op: str) -> ModuleType:
    """The op's folder: its IMPLS, and hub.py and cases.py beside them."""
    return import_module(f"slipstream.ops.{HOMES.get(op, op)}")


def cases_of(op: str) -> Any:
    """The op's cases.py: SMALL, checks, shape_of, facts and sample."""
    return import_module(f"slipstream.ops.{HOMES.get(op, op)}.cases")


def sample(op: str, case: Case, tokens: int, shape: Mapping[str, Any]) -> Sample:
    """A call of the op on so many tokens. What `shape` leaves out is small."""
    cases = cases_of(op)
    made: Sample = cases.sample(case, tokens, {**cases.SMALL, **shape})
    return made


def compare(op: str, fn: Any, case: Case, shape: Mapping[str, Any]) -> float:
    """The largest error of all checks; see `error`."""
    reference = home(op).IMPLS[-1].load()
    cases = cases_of(op)
    checks = cases.checks(case, {**cases.SMALL, **shape})
    return max(error(fn, reference, sample(op, case, CHECKED, {**shape, **check})) for check in checks)


@dataclass(eq=False)
class Candidate:
    """One repository for one op.

    Attributes:
        builtin: what would run otherwise, to be timed against; None: it was asked for by name, and speed does not matter.
    """

    op: str
    name: str
    policy: Policy
    builtin: Callable[[], Any] | None = None
    opened: Opened | None = None
    fn: Any = None
    error: float = 0.0
    _why: list[str | None] = field(default_factory=list)

    def impl(self) -> Impl:
        return Impl(self.name, lambda: self.fn, self.reject, source=self.source)

    def reject(self, case: Case) -> str | None:
        if not self._why:
            self._why.append(self._judge(case))
        return self._why[0]

    def source(self) -> str:
        found = self.opened
        if found is None:
            return ""
        revision = f"@{found.revision[:12]}" if found.revision else ""
        checked = f"error {self.error:.1e} against the reference"
        return f"{found.repo}{revision}, {found.variant}, sha256 {found.sha256[:16]}, from {found.where}, {checked}"

    def _judge(self, case: Case) -> str | None:
        if case.batch_invariant:
            return "whether it gives a row the same bits in any batch is not known"
        adapter = import_module(f"slipstream.ops.{HOMES.get(self.op, self.op)}.hub")
        if (why := adapter.reject(case)) is not None:
            return str(why)
        if self.builtin is not None and (why := self.policy.why_not(self.name)) is not None:
            return why
        from slipstream.ops.hub import open_kernel

        try:
            self.opened = open_kernel(self.name, case.device, self.policy)
            self.fn = adapter.adapt(self.opened, case)
            return self._compare(case)
        except TrustError as e:
            if self.builtin is None:
                raise
            log.warning("%s: %s is pinned, but is not trusted: %s", self.op, self.name, e)
            return str(e)
        except KernelError as e:
            return str(e)

    def _compare(self, case: Case) -> str | None:
        self.error = compare(self.op, self.fn, case, {})
        if not self.error <= TOLERANCE[case.dtype]:
            most = TOLERANCE[case.dtype]
            return f"is wrong: it differs from the reference by {self.error:.2g} of a number, and {most:.2g} is allowed"
        if self.builtin is None:
            return None
        calls, device = sample(self.op, case, TIMED, {}), torch.device(case.device)
        own, theirs = (seconds(calls.bind(fn), device) for fn in (self.builtin(), self.fn))
        if theirs > SLOWER * own:
            return f"is slower here: {theirs * 1e6:.1f} us against {own * 1e6:.1f} us for {TIMED} tokens"
        return None


def pick(
    op: str,
    impls: Sequence[Impl],
    case: Case,
    wants: KernelsAsked,
    policy: Callable[[], Policy],
    device: str,
    key: str = "",
) -> Choice:
    """`choose`, with what was asked of this op and the repositories that may stand in for it.

    Args:
        key: the op's name in `kernels`, where it has another.
        policy: is asked for only where a repository is tried.
        device: where candidates are tried.
    """
    key = key or op
    force, names = wants.force(key), KNOWN.get(key, ()) if wants.word == "auto" else ()
    if force is not None:
        names = (force,) if is_repository(force) else ()
    if not names:
        return choose(op, impls, case, force)
    rules = policy()
    builtin = None if force else partial(_builtin, op, impls, case)
    hub = [Candidate(key, name, rules, builtin).impl() for name in names]
    with torch.cuda.device(device if case.device == "cuda" else -1):
        return choose(op, (*hub, *impls), case, force)


def _builtin(op: str, impls: Sequence[Impl], case: Case) -> Any:
    return choose(op, impls, case).fn


def function(module: Any, name: str, *parameters: str) -> Any:
    """module.<name>, which must take these parameters.

    Raises:
        KernelError: it is not there, or takes others.
    """
    found = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise KernelError(f"has no {name}, so it is not a kernel for this op")
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # of compiled functions: the check on small inputs is what there is
        return found
    anything = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    missing = [p for p in parameters if p not in signature.parameters]
    if missing and not anything:
        raise KernelError(f"its {name}{signature} takes no {', '.join(missing)}")
    return found
