"""One Hub and one Sigstore for all, and a machine of its own for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.trust.kernel_hub import Hub
    from tests.trust.signing import Sigstore
    from tests.trust.world import World


@pytest.fixture(scope="session")
def public() -> Iterator[tuple[Hub, Sigstore]]:
    pytest.importorskip("kernels")
    from tests.trust.kernel_hub import Hub, serve
    from tests.trust.signing import Sigstore

    with serve(Hub()) as hub:
        yield hub, Sigstore()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, public: tuple[Hub, Sigstore]) -> Iterator[World]:
    from huggingface_hub import constants

    from slipstream.trust.imports import forget, packages
    from tests.trust.world import World

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    hub, sigstore = public
    hub.clear()
    yield World(tmp_path / "machine", hub, sigstore, monkeypatch)
    for package in packages():
        forget(package)
