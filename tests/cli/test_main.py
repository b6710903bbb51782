"""The program around the commands: help, version, what it loads, what it prints into a pipe and on a terminal."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import typer

import slipstream as package
from slipstream.cli import show
from slipstream.cli.main import build
from slipstream.cli.stream import print_stream
from slipstream.conversation import ChatDelta
from tests.cli.conftest import Run
from tests.cli.test_chat import ENVIRONMENT, PROGRAM, Terminal

COMMANDS = ("generate", "chat", "batch", "pull", "inspect", "explain", "models", "quantize")


def test_version_and_help(slipstream: Run) -> None:
    assert slipstream("--version").out == f"slipstream {package.__version__}\n"
    for ran in (slipstream("--help"), slipstream("-h"), slipstream()):
        assert (ran.code, ran.err) == (0, "")
        assert all(re.search(rf"^  {name} +[A-Z]", ran.out, re.M) for name in COMMANDS)
        assert "..." not in ran.out.split("Commands:")[1]  # each fits on its line


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text(slipstream: Run, command: str) -> None:
    help_text = slipstream(command, "--help").out
    assert "--json" in help_text
    parameters = typer.main.get_command(build()).commands[command].params  # type: ignore[attr-defined]
    for parameter in parameters:
        assert parameter.help and parameter.help.endswith("."), parameter.name
        for option in parameter.opts:
            if option.startswith("--"):
                assert option in help_text
    assert "Usage: slipstream " + command in help_text


def test_options_stand_in_groups(slipstream: Run) -> None:
    for command in ("generate", "chat", "batch"):
        headings = re.findall(r"^(\w+):$", slipstream(command, "--help").out, re.M)
        assert headings == ["Arguments", "Options", "Sampling", "Engine"]


def test_help_loads_nothing_large() -> None:
    code = """
import sys
from slipstream.cli.main import run
assert run(["--help"]) == 0 and run(["generate", "--help"]) == 0
heavy = ("torch", "transformers", "huggingface_hub", "numpy", "gguf", "tokenizers", "jinja2", "safetensors", "rich")
print([m for m in heavy if m in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1] == "[]", ran.stderr


def test_no_colours_in_a_pipe(model: str) -> None:
    for words in (["--help"], ["inspect", model], ["models"]):
        ran = subprocess.run([*PROGRAM, *words], env=ENVIRONMENT | {"TERM": "xterm-256color"}, capture_output=True)
        assert ran.returncode == 0 and b"\x1b" not in ran.stdout + ran.stderr


def test_a_terminal_gets_tables(model: str) -> None:
    terminal = Terminal("inspect", model)
    try:
        out = terminal.until("Weights")
        assert "llama" in out and terminal.wait() == 0
    finally:
        terminal.close()


DELTAS = (
    ChatDelta("reasoning", "Let me\x1b[2J"),
    ChatDelta("reasoning", " see."),
    ChatDelta("answer", "One"),
    ChatDelta("answer", " two."),
    ChatDelta("tool_call", "", name="weather"),
    ChatDelta("tool_call", "{}", name="weather"),
    ChatDelta("tool_call", "[]", name="time", call=1),
)


@pytest.mark.parametrize(
    ("terminal", "no_color", "expected"),
    [
        (True, False, "~[thinks] ^~Let me�[2J^~ see.^\n\nOne two.\n\n~[calls weather] ^~{}^\n\n~[calls time] ^~[]^\n"),
        (True, True, "[thinks] Let me�[2J see.\n\nOne two.\n\n[calls weather] {}\n\n[calls time] []\n"),
        (False, False, "One two.\n\n[calls weather] {}\n\n[calls time] []\n"),
    ],
)
def test_reasoning_is_set_back_on_a_terminal_and_kept_out_of_pipes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool, no_color: bool, expected: str
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    print_stream(DELTAS)
    assert capsys.readouterr().out == expected.replace("~", "\x1b[2m").replace("^", "\x1b[0m")


def test_json_has_no_numbers_that_json_has_not(slipstream: Run, capsys: pytest.CaptureFixture[str]) -> None:
    show.print_json({"a": float("-inf"), "b": [float("nan"), 1.5], 3: ("x", None), "s": "\ud800"})
    assert capsys.readouterr().out == '{"a": null, "b": [null, 1.5], "3": ["x", null], "s": "?"}\n'


def test_a_bar_appears_after_a_moment_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(show.time, "monotonic", lambda: clock[0])
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        clock[0] = 0.0
        with show.Bar() as bar:
            bar("loading", 1, 10)
            assert bar._drawn is None
            clock[0] = 1.0
            bar("loading", 5, 10)
            assert (bar._drawn is not None) is terminal
            bar("verifying", 5, 10)  # what follows begins its own moment
            assert bar._drawn is None


def test_sizes_and_counts_for_people() -> None:
    assert [show.size(n) for n in (0, 1023, 1024, 98_362_432, 3 << 30)] == [
        "0 B", "1023 B", "1.0 KiB", "93.8 MiB", "3.00 GiB",
    ]  # fmt: skip
    assert [show.number(n) for n in (12, 35_136, 134_515_008, 20_914_757_184)] == ["12", "35,136", "135 M", "20.9 B"]
