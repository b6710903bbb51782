"""One Hub and one Sigstore for a module, and a machine of its own for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.trust.world import World


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    pytest.importorskip("kernels")
    from huggingface_hub import constants

    from slipstream.trust.imports import forget, packages
    from tests.trust.kernel_hub import Hub, serve
    from tests.trust.signing import Sigstore
    from tests.trust.world import World

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with serve(Hub()) as hub:
        yield World(tmp_path / "machine", hub, Sigstore(), monkeypatch)
    for package in packages():
        forget(package)
