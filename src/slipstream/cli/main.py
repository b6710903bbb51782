"""The program `slipstream`: its commands, and how it ends.

A user's mistake is one line and an exit code; a traceback is only ever for a bug of ours.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from slipstream import __version__
from slipstream.cli import bench, kernels
from slipstream.cli.batch import batch
from slipstream.cli.chat import chat
from slipstream.cli.explain import explain
from slipstream.cli.generate import generate
from slipstream.cli.inspect import inspect
from slipstream.cli.models import models
from slipstream.cli.options import option_name
from slipstream.cli.pull import pull
from slipstream.cli.quantize import quantize
from slipstream.cli.tune import tune
from slipstream.errors import SlipstreamError

_COMMANDS = (generate, chat, batch, pull, inspect, explain, models, quantize, tune)
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class _Command(TyperCommand):
    """Plain help keeps the groups of options apart, as rich help does."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                default = "Arguments" if parameter.param_type_name == "argument" else "Options"
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or default, []).append(record)
        for title in sorted(groups, key=lambda t: ("Arguments", "Options", "Sampling", "Engine").index(t)):
            with formatter.section(title):
                formatter.write_dl(groups[title])


def build() -> typer.Typer:
    """The commands. Help is set with rich on a terminal alone, as loading rich takes longer than all the rest."""
    app, measuring = _group("Run open-weight language models.", _COMMANDS), _group(bench.HELP, bench.COMMANDS)
    app.callback(invoke_without_command=True)(_program)
    app.add_typer(measuring, name="bench")
    app.add_typer(_group(kernels.HELP, kernels.COMMANDS), name="kernels")
    return app


def _group(help: str, commands: Sequence[Callable[..., None]]) -> typer.Typer:
    group = typer.Typer(
        help=help,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich" if sys.stdout.isatty() else None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for command in commands:
        group.command(cls=_Command)(command)
    return group


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"slipstream {__version__}")
        raise typer.Exit


def _program(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Run open-weight language models."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def run(arguments: list[str] | None = None) -> int:
    """Run the program and give its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to die
    words = sys.argv[1:] if arguments is None else arguments
    # Under torchrun every rank runs this command. Rank 0 is the front; it tells the others what it wants of them.
    shared = "RANK" in os.environ and any(w.startswith("--tensor-parallel-size") for w in words)
    try:
        if shared and not _is_front():
            return 0
        code = build()(arguments, prog_name="slipstream", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except SlipstreamError as e:
        return _fail(_with_option(str(e)), e.exit_code)
    except typer.TyperException as e:  # wrong words on the command line
        context = getattr(e, "ctx", None)
        path = context.command_path if context is not None else "slipstream"
        return _fail(f"{e.format_message().rstrip('.')}; see {path} --help", e.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print(file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        return _closed_pipe()
    finally:
        if shared and os.environ["RANK"] == "0":
            from slipstream.parallel.launcher import dismiss

            dismiss()


def _is_front() -> bool:
    """Under torchrun, whether this is rank 0. In another rank it leaves when rank 0 wants nothing of it, or not at all."""
    from slipstream.parallel.launcher import STARTING, announce

    if os.environ["RANK"] == "0":
        announce()
        return True
    from slipstream.engine.worker import attend

    attend(STARTING)
    return False


def _closed_pipe() -> int:
    """Whoever read our output has enough. What is still buffered must not fail again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _with_option(message: str) -> str:
    """An error that begins with a parameter's name begins with the option's instead."""
    match = re.match(r"([a-z_]+): ", message)
    name = option_name(match[1]) if match else None
    return f"{name}{message[match.end(1) :]}" if match and name else message


def _fail(message: str, code: int) -> int:
    text = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))  # names come from files
    print(f"error: {text}", file=sys.stderr)
    return code


def main() -> None:
    sys.exit(run())
