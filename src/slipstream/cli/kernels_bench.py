"""`slipstream kernels bench`: an op's implementations side by side on the user's own sizes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slipstream.cli.bench import Status, parse_sizes
from slipstream.cli.kernels_lock import LockFile, PolicyFile
from slipstream.cli.options import AsJson, flat
from slipstream.cli.show import Table, note, print_json, print_tables
from slipstream.errors import ConfigError

if TYPE_CHECKING:
    from slipstream.bench.kernels import KernelReport, Line
    from slipstream.config import ModelConfig


@flat
def bench(
    op: Annotated[
        str, typer.Argument(metavar="OP", help="norm, activation, attention, moe or rotary.", show_default=False)
    ],
    candidates: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="An implementation of ours, org/name[:Layer] or a folder. May be repeated. Default: all that can run here.",
            show_default=False,
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="SIZE=N", help="Such as width=2880. May be repeated.", show_default=False),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Take the sizes of this model.", show_default=False)
    ] = None,
    batch: Annotated[
        str, typer.Option(metavar="N,N,...", parser=parse_sizes, help="Tokens in a call; several with commas.")
    ] = "1,2,4,8,16,32,64,128,256",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. Default: the model's.", show_default=False)
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Calls that are timed; their median counts.")] = 20,
    lock: LockFile = None,
    policy: PolicyFile = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw time over batch size.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the kernels of one op, ours and those of pinned repositories.

    Each is held against the reference on these sizes first; what is wrong is told and not timed.

    \b
      slipstream kernels bench norm --model gpt-oss-20b
      slipstream kernels bench norm --shape width=2880 --candidates triton --candidates ./my-norm:MyNorm
      slipstream kernels bench attention --model ./folder --batch 1,8,64 --plot attention.png --json
    """
    from slipstream.bench.kernels import bench_kernels
    from slipstream.bench.kernels import plot as draw

    with Status() as status:
        report = bench_kernels(
            op, batches=list(dict.fromkeys(map(int, batch.split(",")))), names=candidates or (), shape=_sizes(shape or []),
            model=None if model is None else _config(model), device=device, dtype=dtype, lock=lock,
            policy=policy, repeats=repeats, tell=status,
        )  # fmt: skip
    if plot is not None:
        draw(report, plot)
    if as_json:
        print_json(report)
    else:
        print_tables(_tables(report))
        if plot is not None:
            note(f"drawn to {plot}")


def _config(model: str) -> ModelConfig:
    from slipstream.checkpoint.open import open_checkpoint, open_random
    from slipstream.config import ModelConfig
    from slipstream.sources import resolve

    path = resolve(model, weights=False)
    has_config = (path / "config.json").is_file()  # which is enough; a GGUF has it in its header
    return ModelConfig.from_hf((open_random(path) if has_config else open_checkpoint(path)).config)


def _sizes(words: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for word in ",".join(words).split(",") if words else []:
        name, equals, value = word.partition("=")
        if not equals or not value:
            raise ConfigError(f"shape: {word!r} is not SIZE=N, such as width=2880")
        if not value.isascii() or (value.isdigit() and not 0 < int(value) <= 1 << 24):
            raise ConfigError(f"shape: {name} cannot be {value!r}")
        found[name] = int(value) if value.isdigit() else None if value == "none" else value
    return found


def _tables(report: KernelReport) -> list[Table]:
    batches = sorted({b for line in report.timed for b in line.seconds})
    fastest = {b: min(line.seconds[b] for line in report.timed) for b in batches}

    def cell(line: Line, batch: int) -> str:
        time = line.seconds[batch]
        return f"{time * 1e6:,.1f} us{' *' if time == fastest[batch] else ''}"

    rows = [(line.name, f"{line.error:.1e}", *(cell(line, b) for b in batches)) for line in report.timed]
    sizes = ", ".join(f"{name} {value}" for name, value in report.shape.items() if value is not None)
    title = f"{report.op} in {report.dtype} on {report.hardware}: {sizes} (* the fastest)"
    tables = [Table(title, rows, ("implementation", "error", *(f"{b} token{'s' * (b > 1)}" for b in batches)))]
    if other := [(line.name, line.why or "") for line in report.lines if line.why]:
        tables.append(Table("Not timed", other, ("implementation", "why")))
    if hub := [(line.name, line.source) for line in report.timed if line.source != "slipstream"]:
        tables.append(Table("From elsewhere", hub, ("implementation", "from")))
    return tables
