"""An answer on its way to standard output, as it is written. A terminal shows reasoning too, set back."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from slipstream.cli.show import dim, note, safe

if TYPE_CHECKING:
    from slipstream.conversation import ChatDelta
    from slipstream.engine.engine import Delta
    from slipstream.request import Completion, RequestOutput


def print_stream(stream: Iterable[ChatDelta | Delta]) -> None:
    """Print each piece at once, and end with a line's end. Interrupted, the line ends all the same.

    Reasoning goes to a terminal only: whoever reads a pipe wants the answer, and could not tell the two apart.
    """
    out, terminal = sys.stdout, sys.stdout.isatty()
    part: object = None
    try:
        for delta in stream:
            kind = getattr(delta, "kind", "answer")
            text = safe(delta.text) if terminal else delta.text
            if (not text and kind != "tool_call") or (kind == "reasoning" and not terminal):
                continue
            here = (kind, getattr(delta, "call", 0))
            if part is not None and here != part:
                out.write("\n\n")
            if kind != "answer" and here != part:
                out.write(dim("[thinks] " if kind == "reasoning" else f"[calls {getattr(delta, 'name', None)}] "))
            part = here
            out.write(text if kind == "answer" else dim(text))
            out.flush()
    finally:
        out.write("\n")
        out.flush()


def is_late(c: Completion) -> bool:
    """Whether its deadline ended the answer. A stop string may be the word deadline too, but it ends in `stop`."""
    return (c.finish_reason, c.stop_reason) == ("abort", "deadline")


def note_late(output: RequestOutput, deadline: float | None) -> None:
    """Say so where answers were cut off by their deadline."""
    late, total = sum(map(is_late, output.outputs)), len(output.outputs)
    if late:
        which = "the answer" if total == 1 else f"{late} of {total} answers"
        note(f"the deadline of {deadline:g} s cut {which} off")
