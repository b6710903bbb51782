"""`slipstream quantize`: a model in, a folder with smaller weights out, and what that cost."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slipstream.cli.options import AsJson, Model, parse_size
from slipstream.cli.show import Bar, Table, note, number, plain, print_json, print_tables, size
from slipstream.errors import RequestError, SlipstreamError

if TYPE_CHECKING:
    from slipstream.quantization.quantize import Report

_WORST = 8  # modules that the report lists


def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.", show_default=False)],
    to: Annotated[
        str, typer.Option(metavar="FORMAT", help="mxfp4 takes 4.25 bits a weight, int4 4.1 to 4.5, int8 8.")
    ] = "mxfp4",
    modules: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Convert only modules whose names match, such as '*.mlp.*'. May be repeated. Default: the linear layers "
            "and experts of the decoder; for gpt-oss to mxfp4 the experts.",
            show_default=False,
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Leave these modules as they are. May be repeated.", show_default=False),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            metavar="SIZE",
            help="Weights that share a scale in int4: 128, 64 or 32. Default: the largest that fits.",
            show_default=False,
        ),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Begin a new file at this size, such as 500MB.")
    ] = "2GiB",
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measure perplexity on this text, before and after.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT in one move, if it is a model.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a copy of a model with smaller weights.

    OUT appears whole or not at all. After an interruption, the same command goes on where it stopped. The layout is that
    of gpt-oss and of the compressed-tensors library, which others read too.
    """
    most = parse_size(max_shard_size)
    written = None if text is None else _read(text)
    from slipstream.quantization.quantize import quantize as convert

    try:
        with Bar() as bar:
            report = convert(
                model, out, to=to, modules=modules or (), skip=skip or (), group_size=group_size, max_shard_bytes=most,
                overwrite=overwrite, progress=bar,
            )  # fmt: skip
    except KeyboardInterrupt:
        note(f"\nstopped; {out} is untouched. Run the same command again to go on from here")
        raise
    measured: dict[str, float | str] = {}
    if written is not None:
        for when, name in (("before", model), ("after", str(report.path))):
            measured[when] = _perplexity(name, written)
            gc.collect()  # a model is part of a cycle, and the next one is to find its memory free
    if as_json:
        print_json({"model": model, **plain(report), "perplexity": measured or None})
    else:
        print_tables(_tables(model, report, measured))


def _read(path: Path) -> str:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "it is not UTF-8"
        raise RequestError(f"text: {path} cannot be read: {why}") from e
    if not text.strip():
        raise RequestError(f"text: {path} is empty")
    return text


def _perplexity(model: str, text: str) -> float | str:
    """A number, or why there is none: a model that does not fit into this memory may still be converted."""
    from slipstream.evaluation import perplexity
    from slipstream.llm import LLM

    try:
        with Bar() as bar:
            llm = LLM(model, progress=lambda done, total: bar(f"loading {model}", done, total))
        return perplexity(llm, text, window=min(512, llm.model_config.max_position_embeddings - 1))
    except SlipstreamError as e:
        return str(e)


def _tables(model: str, r: Report, measured: dict[str, float | str]) -> list[Table]:
    share = r.parameters_covered / r.parameters
    group = f", a scale for {r.group_size} weights" if r.group_size else ""
    rows = [
        ("path", str(r.path)),
        ("format", f"{r.to}{group}"),
        ("weights before", f"{size(r.bytes_before)} ({r.bytes_before:,} bytes)"),
        ("weights after", f"{size(r.bytes_after)} ({r.bytes_after:,} bytes), {r.bytes_after / r.bytes_before:.0%}"),
        ("covered", f"{number(r.parameters_covered)} of {number(r.parameters)} parameters, {share:.0%}"),
    ]
    rows += [(f"perplexity {when}", v if isinstance(v, str) else f"{v:.3f}") for when, v in measured.items()]
    if r.resumed:
        rows.append(("resumed", f"{r.resumed} of {r.shards} shards were finished before"))
    rows += [("note", text) for text in r.notes]
    worst = [(module, f"{error:.4f}") for module, error in list(r.errors.items())[:_WORST]]
    tables = [Table(f"{model} to {r.to}", rows)]
    if worst:
        title = f"The worst of {len(r.errors)} modules" if len(r.errors) > _WORST else "Modules"
        tables.append(Table(title, worst, ("module", "relative error")))
    return tables
