"""What a user gets on installing: light imports, a typed package, and versions that fit each other."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import slipstream

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = {"torch", "numpy", "transformers", "huggingface_hub", "gguf", "safetensors", "tokenizers", "jinja2", "httpx"}

HELP = """
import sys
from slipstream.cli.main import main
sys.argv = ["slipstream", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh Python has loaded after running the code."""
    code += "\nimport sys; print('MODULES', *{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("MODULES")[2].split())


@pytest.mark.parametrize(
    "code",
    [
        "import slipstream; slipstream.SamplingParams(temperature=0); slipstream.CheckpointError",
        "from slipstream import sources; sources.known_models(); sources.cache_root()",
        HELP,
    ],
    ids=["import", "sources", "help"],
)
def test_what_costs_time_is_not_imported(code: str) -> None:
    modules = modules_after(code)
    assert "slipstream" in modules
    assert modules & HEAVY == set()


def test_every_public_name_loads() -> None:
    for name in slipstream.__all__:
        assert getattr(slipstream, name).__name__ == name
    assert set(slipstream.__all__) <= set(dir(slipstream))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        slipstream.Nothing  # noqa: B018


def test_the_version_is_that_of_the_package() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", slipstream.__version__)
    try:
        installed = importlib.metadata.distribution("slipstream")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("slipstream runs from its folder here and is not installed")
    assert installed.version == slipstream.__version__
    (script,) = installed.entry_points.select(group="console_scripts")
    assert (script.name, callable(script.load())) == ("slipstream", True)


def test_every_dependency_has_a_pin_that_fits() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert len(pins) == len(lines)
    extras = PROJECT["optional-dependencies"].values()
    for requirement in map(Requirement, [*PROJECT["dependencies"], *(each for extra in extras for each in extra)]):
        if requirement.name != "slipstream":
            assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    assert pins["torch"] == "2.13.0"  # no +cpu: the same file serves machines with a GPU


def test_it_installs_on_the_pythons_it_says() -> None:
    assert PROJECT["requires-python"] == ">=3.11"
    assert (ROOT / "src/slipstream/py.typed").exists()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_an_old_python_is_told(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1"\n[ "$1" = --version ]\n')
    old.chmod(0o755)
    for python, found in ((str(old), "Python 3.9.1"), ("no-such-python", "missing")):
        command = ["make", "demo", f"PYTHON={python}", f"VENV={tmp_path}/venv"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode != 0
        assert f"slipstream needs Python 3.11 or later; {python} is {found}." in done.stderr
        assert "make demo PYTHON=python3.12" in done.stderr
        assert not (tmp_path / "venv").exists()


def test_ci_runs_what_a_developer_runs() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert {"make check", "make test"} <= set(script.read_text().splitlines())


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("slipstream-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    kinds = (".py", ".c", ".h", ".json")
    files = (p for p in (ROOT / "src/slipstream").rglob("*") if p.suffix in kinds)
    sources = {p.relative_to(ROOT / "src").as_posix() for p in files}
    assert {"slipstream/ops/native/blocks.c", "slipstream/ops/native/formats.h"} <= sources
    assert sources | {"slipstream/py.typed"} == {name for name in names if ".dist-info/" not in name}
    assert any(name.endswith("LICENSE") for name in names)
