"""A tiny model on disk, and the program run inside this process, which saves starting Python for each case."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slipstream.cli.main import run
from tests.cli.tiny import write_chat_model
from tests.trust.conftest import public, world  # noqa: F401


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as one JSON value; NaN and Infinity are not JSON."""

        def refuse(name: str) -> None:
            raise ValueError(f"{name} is not JSON")

        return json.loads(self.out, parse_constant=refuse)


Run = Callable[..., Ran]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_chat_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def slipstream(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the program with these words. Standard input is a pipe that holds `stdin`."""

    def call(*words: str | Path | int | float, stdin: str | bytes = "") -> Ran:
        raw = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw)))
        capsys.readouterr()
        code = run([str(word) for word in words])
        got = capsys.readouterr()
        return Ran(code, got.out, got.err)

    return call
