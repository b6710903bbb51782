"""The tiny models, written once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine import tiny


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("hybrid"), tiny.HYBRID)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("llama"), tiny.LLAMA)
