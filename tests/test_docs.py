"""The documents tell the truth: what the README says to type is typed, its tables are the code's, and names exist.

The commands run in a folder of their own, where the README's example names are a tiny checkpoint and the small model.
`make` is what brought the reader here, so it is not run again.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from slipstream import errors
from slipstream.config import EngineConfig
from slipstream.models import ARCHITECTURES
from slipstream.request import SamplingParams
from tests.cli.tiny import write_chat_model

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(d.relative_to(ROOT)) for d in DOCUMENTS]
MOST_SECONDS = 120  # for one block on a machine that has much else to do; alone it takes 2 to 15


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def without_make(block: str) -> str:
    return "".join(line for line in block.splitlines(keepends=True) if not line.startswith("make "))


BASH = [block for block in map(without_make, blocks("bash")) if block.strip()]


@pytest.fixture
def desk(tmp_path: Path, smollm2: Path) -> tuple[Path, dict[str, str]]:
    """A folder with what the examples name, and an environment in which `slipstream` is a command. Each block has its own: which of
    them one process runs, and in what order, is left to chance, and two write to the same name."""
    folder = tmp_path / "desk"
    folder.mkdir()
    write_chat_model(folder / "Qwen" / "Qwen3-0.6B")
    (folder / "model.gguf").symlink_to(smollm2)
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    program = folder / "bin" / "slipstream"
    program.parent.mkdir()
    main = "from slipstream.cli.main import main; main()"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "{main}" "$@"\n')
    program.chmod(0o755)
    paths = {"PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src")}
    return folder, {**os.environ, **paths}


def run(command: list[str], desk: tuple[Path, dict[str, str]]) -> str:
    folder, environment = desk
    done = subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=MOST_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_opens_with_two_commands() -> None:
    first = [line.split("#")[0].strip() for line in blocks("bash")[0].splitlines()]
    assert first == ["make demo", "make test"]
    assert README.index("make demo") < 100


@pytest.mark.parametrize("block", BASH, ids=lambda b: b.splitlines()[0][:60])
def test_commands(block: str, desk: tuple[Path, dict[str, str]]) -> None:
    out = run(["bash", "-euo", "pipefail", "-c", block], desk)
    assert out.strip() or "slipstream chat" in block  # a conversation that nobody begins


def test_python(desk: tuple[Path, dict[str, str]]) -> None:
    """One program of all the blocks. What stands behind a print as a comment is what it prints."""
    source = "\n".join(blocks("python"))
    expected = re.findall(r"^ *print\(.*\)  # (.+)$", source, re.M)
    assert len(expected) >= 5
    out, at = run([sys.executable, "-c", source], desk), 0
    for line in expected:
        found = out.find(f"{line}\n", at)
        assert found >= 0, f"{line!r} is not in {out[at:]!r}"
        at = found + len(line)


def table(heading: str) -> dict[str, str]:
    """First column -> second column of the first table under a heading; ticks taken off."""
    part = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([^`|]+)` \| `?([^`|]+?)`? \|", part, re.M)
    assert rows and len(dict(rows)) == len(rows)
    return dict(rows)


@pytest.mark.parametrize(
    ("heading", "kind"), [("Sampling parameters", SamplingParams), ("Engine options", EngineConfig)]
)
def test_tables_are_the_fields(heading: str, kind: type) -> None:
    defaults = {}
    for f in dataclasses.fields(kind):
        value = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        defaults[f.name] = str(value) if not isinstance(value, str) else f'"{value}"'
    assert table(heading) == defaults


def test_exit_codes() -> None:
    kinds = {n: k for n, k in vars(errors).items() if inspect.isclass(k) and issubclass(k, errors.SlipstreamError)}
    del kinds["SlipstreamError"]
    assert table("Errors") == {name: str(kind.exit_code) for name, kind in kinds.items()}


def test_architectures() -> None:
    paragraph = README.split("**Architectures**")[1].split("\n\n")[0].split("Each is held")[0]
    assert set(re.findall(r"`([a-z0-9_]+)`", paragraph)) - {"model_type", "gemma3"} == set(ARCHITECTURES)


def test_every_command_is_shown() -> None:
    shown = set(re.findall(r"slipstream (\w+)", "".join(BASH)))
    measured = set(re.findall(r"slipstream bench (\w+)", "".join(BASH)))
    assert measured == {"decode", "prefill", "serve", "load"}
    assert shown == {
        "generate",
        "chat",
        "batch",
        "pull",
        "inspect",
        "explain",
        "models",
        "quantize",
        "bench",
        "kernels",
    }


# -- names of files and of what is in them -----------------------------------------------------------------------------

MENTION = re.compile(r"`([\w./-]+\.(?:py|c|md|toml|txt)|Makefile)(?::([A-Za-z_][\w.]*))?`")
PLACEHOLDER = re.compile(r"\b(NAME|OP)\b")  # of a file that a contributor is to write
LINK = re.compile(r"\]\(([^)#\s]+)\)")


def where(path: str) -> Path | None:
    """Documents name files from src/slipstream or from the root."""
    return next((p for base in (ROOT / "src" / "slipstream", ROOT) if (p := base / path).is_file()), None)


@functools.cache
def names_in(file: Path) -> frozenset[str]:
    """Top-level names of a module, and the members of its classes as Class.member."""

    def of(body: list[ast.stmt], prefix: str) -> set[str]:
        found = set()
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    found |= of(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
            found |= {prefix + t.id for t in targets if isinstance(t, ast.Name)}
        return found

    return frozenset(of(ast.parse(file.read_text()).body, ""))


def wrong_mentions(text: str) -> list[str]:
    wrong = []
    for path, name in MENTION.findall(text):
        file = where(path)
        if PLACEHOLDER.search(path):
            continue
        if file is None:
            wrong.append(path)
        elif name and not (name in names_in(file) if file.suffix == ".py" else name in file.read_text()):
            wrong.append(f"{path}:{name}")
    return wrong


@pytest.mark.parametrize("name", NAMES)
def test_every_file_and_function_that_is_named_exists(name: str) -> None:
    text = (ROOT / name).read_text()
    assert wrong_mentions(text) == []
    gone = [
        link for link in LINK.findall(text) if "://" not in link and not (ROOT / name).parent.joinpath(link).exists()
    ]
    assert gone == []


def test_the_check_of_names_finds_what_is_wrong() -> None:
    right = (
        "`llm.py`, `llm.py:LLM.generate`, `tests/test_docs.py:names_in`, `ops/native/blocks.c:dot_rows`, `README.md`"
    )
    wrong = ["nowhere.py", "llm.py:LLM.nothing", "ops/native/blocks.c:nothing_here"]
    assert wrong_mentions(right) == []
    assert wrong_mentions(" ".join(f"`{w}`" for w in wrong)) == wrong


def test_the_tour_says_where_a_key_is_written() -> None:
    tour = (ROOT / "docs" / "tour.md").read_text()
    assert len(MENTION.findall(tour)) > 60
    paragraph = next(p for p in tour.split("\n\n") if "key is written" in p)
    for name in (
        "layers/attention.py:Attention.forward",
        "ops/attention_input/reference.py:attention_input",
        "batch.py:",
    ):
        assert name in paragraph


def test_decisions_are_numbered_and_short() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [p.name[:4] for p in pages] == [f"{i:04}" for i in range(1, len(pages) + 1)]
    for page in pages:
        text = page.read_text()
        assert text.startswith("# ") and len(text.splitlines()) <= 40, page.name
