"""The whole way, with a Hub on loopback: pin a repository, run a model with it, run it again without a network."""

from __future__ import annotations

import pytest

from tests.cli.conftest import Run
from tests.ops import repositories as repos
from tests.trust.conftest import public, world  # noqa: F401  # fixtures

pytest.importorskip("kernels")

from tests.trust.world import World

REPO = "acme/act"


def publish(there: World, text: str, version: int = 1) -> None:
    there.publish(REPO, files={"__init__.py": text.encode()}, version=version)


def test_pin_run_and_run_offline(
    slipstream: Run,
    model: str,
    world: World,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    from slipstream.trust.imports import forget, packages

    publish(world, repos.ACTIVATION["__init__.py"])
    (world.work / "kernels-policy.toml").write_text(world.policy_text())
    words = ("explain", model, "--device", "cpu", "--kernels", f"activation={REPO}", "--used", "--json")
    assert slipstream(*words).code == 6  # nobody has pinned it
    pinned = slipstream("kernels", "lock", REPO, "--yes")
    assert pinned.code == 0, pinned.err
    said = slipstream(*words).json
    used = next(u for u in said["used"] if u["op"] == "activation")
    assert used["implementation"] == REPO and used["calls"] == 8 * 4 and f"{REPO}@" in used["source"]
    assert slipstream("kernels", "verify").code == 0

    for package in packages():
        forget(package)
    publish(world, repos.ACTIVATION["__init__.py"] + "\nraise SystemExit('not what was pinned')\n", 2)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(world.hub.asked)
    again = slipstream(*words).json
    assert next(u for u in again["used"] if u["op"] == "activation") == used
    assert len(world.hub.asked) == asked
