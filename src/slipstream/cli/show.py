"""What commands print: tables, JSON, sizes, progress. On a terminal with rich, else plain; rich is loaded only then."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_MOMENT = 0.5  # seconds; what is done sooner shows no bar
# What a model or a file says must not steer the terminal: control characters but for tab and line end.
_DIM, _NORMAL = "\x1b[2m", "\x1b[0m"
_CONTROLS = {c: "\ufffd" for c in (*range(32), *range(127, 160)) if c not in (9, 10)}


@dataclass(frozen=True)
class Table:
    """Rows of text; without `columns` the first cell names the rest."""

    title: str
    rows: Sequence[tuple[str, ...]]
    columns: tuple[str, ...] = ()


def print_tables(tables: Sequence[Table]) -> None:
    if sys.stdout.isatty():
        _print_rich(tables)
        return
    for i, table in enumerate(tables):
        rows = ([table.columns] if table.columns else []) + list(table.rows)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        print(*([""] if i else []), table.title, *(f"  {line}" for line in lines), sep="\n")


def _print_rich(tables: Sequence[Table]) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(highlight=False)
    for table in tables:
        console.print(Text(safe(table.title), style="bold"))
        shown = RichTable(box=None, pad_edge=False, show_header=bool(table.columns), padding=(0, 2, 0, 0))
        for i in range(len(table.columns or table.rows[0])):
            header = table.columns[i] if table.columns else ""
            shown.add_column(header, header_style="dim", style="" if i or table.columns else "cyan", overflow="fold")
        for row in table.rows:
            shown.add_row(*(Text(safe(cell)) for cell in row))
        console.print(shown)
        console.print()


def print_json(value: Any) -> None:
    """One line of JSON, at once."""
    print(json.dumps(plain(value), ensure_ascii=False, allow_nan=False), flush=True)


def plain(value: Any) -> Any:
    """Dataclasses and paths as JSON has them; a number that is not finite, which JSON cannot write, becomes null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def safe(text: str) -> str:
    """The text without what a terminal would take as a command."""
    return text.translate(_CONTROLS)


def write(text: str) -> None:
    """A piece of a model's text, at once; into a pipe or a file just as it is."""
    sys.stdout.write(safe(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def dim(text: str) -> str:
    """The text set back, where standard output is a terminal that may have colours."""
    return f"{_DIM}{safe(text)}{_NORMAL}" if text and sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


def note(text: str) -> None:
    """A line beside the result: to standard error."""
    sys.stdout.flush()
    print(safe(text) if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def size(count: float) -> str:
    """Bytes in the unit that reads best."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def number(count: float) -> str:
    """A count as people say it: 135 M, 20.9 B."""
    for unit, one in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if count >= one:
            return f"{count / one:.3g} {unit}"
    return f"{count:,.0f}"


class Bar:
    """Called with (what is done, bytes done, bytes in all), or other things than bytes. Draws a bar on a terminal, for what
    takes a moment.

    Use it in a `with`, so that the terminal is left clean however it ends.
    """

    def __init__(self) -> None:
        self._shows = sys.stderr.isatty()
        self._label = self._things = ""
        self._since = 0.0
        self._drawn: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn is not None:
            self._drawn.stop()
            self._drawn = None

    def __call__(self, label: str, done: int, total: int | None, things: str = "") -> None:
        if not self._shows:
            return
        now = time.monotonic()
        if label != self._label:
            self.__exit__()
            self._label, self._since = label, now
        if self._drawn is None:
            if now - self._since < _MOMENT:
                return
            self._things = things
            self._draw(label)
        if self._drawn is not None and self._task is not None:
            self._drawn.update(self._task, completed=done, total=total)

    def _draw(self, label: str) -> None:
        from rich import progress
        from rich.console import Console
        from rich.markup import escape

        counts: tuple[progress.ProgressColumn, ...] = (progress.DownloadColumn(True), progress.TransferSpeedColumn())
        if self._things:
            counts = progress.MofNCompleteColumn(), progress.TextColumn(self._things)
        columns = (
            progress.TextColumn("{task.description}"), progress.BarColumn(), *counts, progress.TimeRemainingColumn(),
        )  # fmt: skip
        self._drawn = progress.Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._drawn.add_task(escape(safe(label)), total=None)
        self._drawn.start()
