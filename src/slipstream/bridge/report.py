"""What became of every layer of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from slipstream.ops.choose import Choice


@dataclass(frozen=True, slots=True)
class Layer:
    """One module. `now` is "op[implementation]", or None where it was left, and `why` is the reason of either.

    Attributes:
        name: as `named_modules` has it.
        kind: its class in transformers.
        source: where the implementation is from, if not from slipstream.
    """

    name: str
    kind: str
    now: str | None
    why: str
    source: str = ""


@dataclass(slots=True, eq=False)
class Report:
    """All layers, in the model's order, and the choices behind them: each has the implementations that were passed over, and why."""

    layers: list[Layer]
    choices: list[Choice] = field(default_factory=list)
    _undo: list[Callable[[], object]] = field(default_factory=list, repr=False)

    @property
    def changed(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.now is not None]

    @property
    def left(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.now is None]

    def undo(self) -> None:
        """Make the model what it was. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def to_dict(self) -> dict[str, Any]:
        choices = [
            {"op": c.op, "implementation": c.name, "rejected": [{"implementation": n, "why": w} for n, w in c.rejected]}
            for c in self.choices
        ]
        layers = [asdict(layer) for layer in self.layers]
        return {"changed": len(self.changed), "left": len(self.left), "layers": layers, "choices": choices}

    def __str__(self) -> str:
        """One line for layers of one kind with one fate."""
        groups: dict[tuple[str, str | None, str, str], list[str]] = {}
        for layer in self.layers:
            groups.setdefault((layer.kind, layer.now, layer.why, layer.source), []).append(layer.name)
        rows = [(f"{len(names)} x {kind}", now or "left", ": ".join(filter(None, (why, source))), names[0])
                for (kind, now, why, source), names in groups.items()]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        total = f"{len(self.changed)} of {len(self.layers)} layers changed"
        lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join([total, *(f"  {line}" for line in lines)])
