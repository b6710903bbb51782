"""`slipstream bench`: how fast a model runs on this machine, beside what the machine's measured rates allow."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from slipstream.cli.options import AsJson, EngineOptions, Model, flat
from slipstream.cli.show import Bar, Table, note, print_json, print_tables, safe, size
from slipstream.errors import ConfigError

if TYPE_CHECKING:
    from slipstream.bench.report import Figure, Report
    from slipstream.bench.run import Asked

HELP = """Measure a model beside what this machine allows.

Every figure stands beside its limit: the bytes that must be read and the products that must be computed, at the rates at which
this machine copies its memory and multiplies matrices, measured in the same run. Answers are checked before they are timed.

\b
  slipstream bench decode smollm2-135m-instruct
  slipstream bench decode gpt-oss-20b --weights random --batch-size 1,8,32,64,256
  slipstream bench prefill llama-3.1-8b --weights random --input-len 8192
  slipstream bench serve ./folder --num-prompts 64 --json
  slipstream bench load ./folder
  slipstream bench decode ./folder --against transformers

With --weights random nothing is downloaded but shapes: numbers are drawn in the shapes and formats of config.json. The shapes of
gpt-oss-20b, gpt-oss-120b, llama-3.1-8b and qwen3-30b-a3b are known without a network.
"""

Against = Annotated[
    str | None,
    typer.Option(
        metavar="PEER",
        help="Measure transformers too, in the same way and the same run, if it is installed.",
        show_default=False,
    ),
]
InputLen = Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Random tokens in each prompt.")]
OutputLen = Annotated[int, typer.Option(min=1, metavar="TOKENS", help="New tokens that are timed in each answer.")]
Repeats = Annotated[int, typer.Option(min=1, metavar="N", help="Runs, after one to warm up; their median counts.")]


def parse_sizes(text: str) -> str:
    """Whole numbers with commas between them."""
    parts = [part.strip() for part in str(text).split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) <= 65536 for part in parts):
        raise typer.BadParameter(f"{text!r} is no list of batch sizes, each from 1 to 65536, such as 1,8,32")
    return ",".join(parts)


@flat
def decode(
    model: Model,
    engine: EngineOptions,
    batch_size: Annotated[
        str,
        typer.Option(
            metavar="N,N,...", parser=parse_sizes, help="Sequences that are written together; several with commas."
        ),
    ] = "1",
    input_len: InputLen = 128,
    output_len: OutputLen = 128,
    repeats: Repeats = 3,
    against: Against = None,
    as_json: AsJson = False,
) -> None:
    """Tokens a second while answers are written.

    Batch * output-len / (time for output-len + 1 new tokens - time for 1), greedy, all answers as long. The limit is what must be
    read for one step: all weights (of experts those that so many tokens touch) and the keys and values of all sequences.
    """
    sizes = dict.fromkeys(map(int, batch_size.split(",")))

    def measure(asked: Asked) -> Report:
        from slipstream.bench.run import decode_case, run

        return run(asked, [decode_case(batch, input_len, output_len, repeats) for batch in sizes])

    _bench(model, engine, against, as_json, measure)


@flat
def prefill(
    model: Model,
    engine: EngineOptions,
    input_len: InputLen = 4096,
    repeats: Repeats = 5,
    against: Against = None,
    as_json: AsJson = False,
) -> None:
    """Milliseconds from one prompt to its first new token."""

    def measure(asked: Asked) -> Report:
        from slipstream.bench.run import prefill_case, run

        return run(asked, [prefill_case(input_len, repeats)])

    _bench(model, engine, against, as_json, measure)


@flat
def serve(
    model: Model,
    engine: EngineOptions,
    num_prompts: Annotated[int, typer.Option(min=1, metavar="N", help="Requests that come at once.")] = 256,
    input_len: InputLen = 1024,
    output_len: OutputLen = 256,
    repeats: Repeats = 1,
    against: Against = None,
    as_json: AsJson = False,
) -> None:
    """Tokens a second where many requests come at once.

    All of them are queued together, and how long they wait is told too. transformers gets them as one batch.
    """

    def measure(asked: Asked) -> Report:
        from slipstream.bench.run import run, serve_case

        return run(asked, [serve_case(num_prompts, input_len, output_len, repeats)])

    _bench(model, engine, against, as_json, measure)


@flat
def load(model: Model, engine: EngineOptions, repeats: Repeats = 3, as_json: AsJson = False) -> None:
    """GB a second while loading, and the time to a first token.

    That is the seconds from a process's start. Each run is a fresh process; the one to warm up brings the files into the page
    cache. The limit is the slower of reading the files and, for a GPU, copying to it.
    """

    def measure(asked: Asked) -> Report:
        from slipstream.bench.run import run_load

        return run_load(asked, repeats)

    _bench(model, engine, None, as_json, measure)


COMMANDS = (decode, prefill, serve, load)


class Status:
    """One line on a terminal's standard error that says what is going on. Nothing where that is none."""

    def __init__(self) -> None:
        self._shows = sys.stderr.isatty()

    def __enter__(self) -> Status:
        return self

    def __exit__(self, *_: object) -> None:
        self("")

    def __call__(self, text: str) -> None:
        if self._shows:
            print(f"\r\x1b[2K{safe(text)}", end="", file=sys.stderr, flush=True)


def _bench(
    model: str,
    engine: EngineOptions,
    against: str | None,
    as_json: bool,
    measure: Callable[[Asked], Report],
) -> None:
    if against not in (None, "transformers"):
        raise ConfigError(f"against: must be transformers, got {against!r}")
    options = engine.changes()
    from slipstream.bench.run import Asked

    with Status() as status, Bar() as bar:

        def progress(done: int, total: int) -> None:
            bar(f"loading {model}", done, total)
            if done == total:
                bar.__exit__()

        report = measure(Asked(model=model, options=options, against=against is not None,
                               tell=status, progress=progress))  # fmt: skip
    if as_json:
        print_json(report.to_dict())
    else:
        print_tables(_tables(report))
        for text in report.notes:
            note(text)


def _tables(report: Report) -> list[Table]:
    peer = any(f.against for f in report.figures)
    columns = ("", "measured", "limit", "of the limit", "bound by", *(("transformers", "ratio") if peer else ()))
    tables = [Table(f"{report.figures[0].name}: {report.model}", [_row(f, peer) for f in report.figures], columns)]
    latencies = [
        (name, f.more)
        for f in report.figures
        for name in ("time_to_first_token", "inter_token")
        if f"{name}_ms_p50" in f.more
    ]
    if latencies:
        rows = [
            (name.replace("_", " "), *(f"{more[f'{name}_ms_{p}']:.1f} ms" for p in ("p50", "p95")))
            for name, more in latencies
        ]
        tables.append(Table("Latency", rows, ("", "median", "95 of 100 within")))
    return [*tables, Table("Measured on", _conditions(report))]


def _row(figure: Figure, peer: bool) -> tuple[str, ...]:
    at = figure.at
    label = {
        "decode": f"batch {at.get('batch_size')}",
        "prefill": f"{at.get('input_len', 0):,} tokens",
        "serve": f"{at.get('num_prompts')} prompts of {at.get('input_len')}, {at.get('output_len')} new each",
    }.get(figure.name, figure.name.replace("_", " "))

    def spell(value: float) -> str:
        return f"{value:,.{0 if value >= 1000 else 1 if value >= 10 else 2}f} {figure.unit}"

    row = (label, spell(figure.value), spell(figure.limit), f"{figure.fraction:.0%}", figure.bound_by)
    if not peer:
        return row
    theirs = figure.against.get("transformers")
    return (*row, "", "") if theirs is None else (*row, spell(theirs), f"{figure.ratio:.2f}")


def _conditions(report: Report) -> list[tuple[str, str]]:
    machine = report.machine
    if "read_gb_s" in machine:
        rates = f"reads these files at {machine['read_gb_s']:.1f} GB/s"
        rates += f", copies to the GPU at {machine['copy_gb_s']:.1f} GB/s" if machine["copy_gb_s"] else ""
    else:
        rates = f"copies {machine['bandwidth'] / 1e9:,.0f} GB/s, read and written; multiplies {machine['dtype']} matrices at "
        rates += f"{machine['flops'] / 1e12:,.3g} TFLOP/s"
    rows = [
        ("machine", machine["name"]),
        ("its rates", rates),
        ("weights", f"{size(report.plan['bytes']['weights'])}, activations in {report.plan['dtype']}"),
    ]
    chosen = ", ".join(f"{name}={value}" for name, value in report.chosen.items())
    return [*rows, ("set for this", chosen)] if chosen else rows
