"""`slipstream batch`: a file of requests in, a file of answers out, and what that cost."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slipstream.cli.options import AnswerOptions, AsJson, EngineOptions, flat
from slipstream.cli.show import Bar, note, plain, print_json, write
from slipstream.errors import RequestError

if TYPE_CHECKING:
    from slipstream.jobs import JobReport


@flat
def batch(
    in_file: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            help="A JSON object a line: OpenAI's batch format, or prompt or messages with sampling parameters.",
            show_default=False,
        ),
    ],
    out_file: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="The file to make: an answer a line, in the order of IN.", show_default=False
        ),
    ],
    sampling: AnswerOptions,
    engine: EngineOptions,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model that answers, whatever name the lines have for it. Default: the one that they name.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, and begin anew if IN or the settings have changed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Answer every line of a file.

    Sampling options hold where a line says nothing. OUT appears whole, at the end; what is wrong with a line is written
    as its answer. After an interruption, the same command goes on where it stopped.
    """
    changes = sampling.changes()
    engine.changes()
    from slipstream.jobs.lines import read_input
    from slipstream.jobs.run import check_out, run_batch

    given = read_input(in_file)
    check_out(given.path, out_file, overwrite=overwrite)
    name = model or given.model
    if name is None:
        raise RequestError("model: no line names one; say which model is to answer with --model", field="model")
    given = dataclasses.replace(given, model=name, any_model=model is not None)
    from slipstream.cli.load import load_llm

    llm = load_llm(name, engine)
    bar = _Bar()
    try:
        with bar:
            report = run_batch(llm, given, out_file, params=changes, overwrite=overwrite, progress=bar.lines)
    except KeyboardInterrupt:
        note(f"\nstopped; all finished answers are kept. Run the same command again to go on and make {out_file}")
        raise
    if as_json:
        print_json({"model": name, **plain(report), "engine": rounded(llm.snapshot().to_dict())})
    else:
        write(summary(report) + "\n")


def summary(r: JobReport) -> str:
    """The report in one line."""
    earlier = f" ({r.resumed} from before)" if r.resumed else ""
    parts = [f"{r.answered} of {r.lines} lines answered{earlier}", f"{r.errors} errors"]
    parts += [f"{r.prompt_tokens} prompt tokens", f"{r.new_tokens} new tokens"]
    return ", ".join([*parts, f"{r.seconds:.1f} s", f"{r.tokens_per_second:.1f} tokens/s"]) + f": {r.path}"


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Seconds and rates to three places."""
    return {name: round(v, 3) if isinstance(v, float) else v for name, v in values.items()}


class _Bar(Bar):
    """Lines done of all, and tokens a second."""

    def __init__(self) -> None:
        super().__init__()
        self._begun: tuple[float, int] | None = None

    def lines(self, done: int, total: int, tokens: int) -> None:
        now = time.monotonic()
        self._begun = self._begun or (now, tokens)
        rate = (tokens - self._begun[1]) / max(now - self._begun[0], 1e-9)
        self("answering", done, total)
        if self._drawn is not None and self._task is not None:
            self._drawn.update(self._task, rate=f"{rate:.0f} tokens/s")

    def _draw(self, label: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")
        self._drawn = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        self._task = self._drawn.add_task(label, total=None, rate="")
        self._drawn.start()
