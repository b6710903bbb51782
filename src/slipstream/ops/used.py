"""What actually ran: calls of every implementation, counted where `count_calls` asks for it. Nothing is wrapped otherwise.

A CUDA graph calls nothing when it is replayed. What it holds was called while it was recorded, so each replay adds the calls of one
recorded step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from slipstream.ops.choose import Choice

Run = Callable[[], Any]


class Used:
    """Calls so far, by op and implementation."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()

    def counted(self, choice: Choice, fn: Any = None) -> Any:
        """The implementation, counted. `fn` is it where the choice's own was adjusted since."""
        fn, key = choice.fn if fn is None else fn, (choice.op, choice.name)

        def count(call: Callable[..., Any]) -> Callable[..., Any]:
            def counting(*args: Any, **options: Any) -> Any:
                self.calls[key] += 1
                return call(*args, **options)

            return counting

        if hasattr(fn, "experts"):
            return replace(fn, experts=count(fn.experts))
        return _Kernel(fn, count) if hasattr(fn, "prepare") else count(fn)

    def record(self, make: Callable[[Run], Run], step: Run) -> Run:
        """`make` runs the step a few times and gives what replays it. Each replay counts as the last of these runs did."""
        before, once = Counter(self.calls), Counter[tuple[str, str]]()

        def run() -> Any:
            nonlocal once
            start = Counter(self.calls)
            out = step()
            once = self.calls - start
            return out

        try:
            replay = make(run)
        finally:
            self.calls = before

        def counting() -> Any:
            self.calls.update(once)
            return replay()

        return counting


class _Kernel:
    """A linear kernel whose products are counted; all else of it is its own."""

    def __init__(self, kernel: Any, count: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self._kernel, self._call, self._count = kernel, count(kernel), count

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._kernel, name)
        return self._count(found) if name in ("wide", "left") else found
