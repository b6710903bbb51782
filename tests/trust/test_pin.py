"""What goes into a lock: what the Hub says of a commit, held against itself."""

from __future__ import annotations

import hashlib
import json

import pytest

from slipstream.errors import TrustError
from tests.trust.world import VARIANT, World

REPO = "acme/scale"


def test_a_revision_and_the_newest_version(world: World) -> None:
    old = world.publish(REPO, version=2, gain=2)
    new = world.publish(REPO, version=11, gain=3)
    assert (world.pin(REPO).revision, world.pin(REPO).version) == (new, 11)
    assert (world.pin(REPO, version=2).revision, world.pin(REPO, version=2).version) == (old, 2)
    assert (world.pin(REPO, revision=old).revision, world.pin(REPO, revision=old).version) == (old, 2)
    with pytest.raises(TrustError, match="no version 3; there are 2, 11"):
        world.pin(REPO, version=3)
    with pytest.raises(TrustError, match="could not be fetched|no such"):
        world.pin(REPO, revision="0" * 40)
    with pytest.raises(TrustError, match="no such kernel repository"):
        world.pin("acme/nothing")


def test_what_builds_share_is_fetched_once(world: World) -> None:
    files = world.build()
    tree = {f"build/torch-{v}/{n}": d for v in ("cpu", "cuda", "xpu") for n, d in files.items()}
    world.hub.commit(REPO, tree, "v1")
    pin = world.pin(REPO)
    assert pin.builds.keys() == {"torch-cpu", "torch-cuda", "torch-xpu"}
    assert len({b.sha256 for b in pin.builds.values()}) == 1
    fetched = [a for a in world.hub.asked if a.startswith("GET") and "/resolve/" in a]
    assert len(fetched) < len(files) and not any("table.bin" in a for a in fetched)


@pytest.mark.parametrize(
    ("path", "data", "cause"),
    [
        ("build/torch-cpu/__pycache__/x.cpython-311.pyc", b"x", "bytecode"),
        ("build/stray.py", b"x", "belongs to no build"),
        ("kernel-status.toml", b'kind = "redirect"\ndestination = "evil/k"\n', "has moved"),
        ("build/torch-cuda/__init__.py", b"", "torch-cuda has no metadata.json"),
        ("build/torch-cuda/metadata.json", b"[]", "metadata.json cannot be read"),
        ("build/torch-cuda/metadata.json", b'{"version": 9}', "different versions"),
    ],
)
def test_a_commit_that_is_not_a_kernel(world: World, path: str, data: bytes, cause: str) -> None:
    tree = {f"build/{VARIANT}/{n}": d for n, d in world.build().items()}
    world.hub.commit(REPO, tree | {path: data}, "v1")
    with pytest.raises(TrustError, match=cause):
        world.pin(REPO)
    assert not world.canary.exists()


def test_a_branch_that_says_another_version(world: World) -> None:
    world.hub.commit(REPO, {f"build/{VARIANT}/{n}": d for n, d in world.build(version=1).items()}, "v7")
    with pytest.raises(TrustError, match="branch says version 7, and its metadata.json 1"):
        world.pin(REPO)


def test_without_a_build(world: World) -> None:
    world.hub.commit(REPO, {"build.toml": b"", "README.md": b"# a"}, "v1")
    with pytest.raises(TrustError, match="not a kernel repository|could not be fetched"):
        world.pin(REPO)


def test_a_bad_signature_is_not_pinned(world: World) -> None:
    files = world.build(signed=True)
    files["parts/gain.py"] = b"GAIN = 10 ** 6\n"
    world.hub.commit(REPO, {f"build/{VARIANT}/{n}": d for n, d in files.items()}, "v1")
    with pytest.raises(TrustError, match="signed are other files: parts/gain.py"):
        world.pin(REPO)


def test_a_hub_that_states_one_hash_and_sends_another(world: World) -> None:
    from slipstream.ops.hub import open_kernel

    world.publish(REPO)
    pin = world.pin(REPO)
    stated = pin.builds[VARIANT].files["table.bin"].sha256
    path = f"build/{VARIANT}/table.bin"
    assert stated == hashlib.sha256(world.hub.commits[REPO, pin.revision or ""][path]).hexdigest()
    world.hub.sent_instead[path] = b"\0" * 1280
    with pytest.raises(TrustError, match="table.bin differs"):
        open_kernel(REPO, "cpu", world.policy(pin))
    assert not world.canary.exists() and not list((world.home / "kernels").iterdir())  # nothing half is kept


def test_the_installed_keys(world: World) -> None:
    """Without a root of one's own the keys are those inside the installed package: there, readable, and not ours."""
    from slipstream.trust.signature import _installed_root, signed_by

    root = json.loads(_installed_root().read_text())
    assert "sigstore" in _installed_root().parts and root["tlogs"][0]["baseUrl"] == "https://rekor.sigstore.dev"
    files = world.build(signed=True)
    with pytest.raises(TrustError, match="its signature is not valid"):
        signed_by(files["metadata.json"], files["metadata.json.sigstore"], {}, None)


def test_a_folder_that_is_not_a_kernel(world: World) -> None:
    (world.folder / "empty").mkdir()
    with pytest.raises(TrustError, match="not a kernel repository"):
        world.pin_local(world.folder / "empty")
    folder = world.local()
    (folder / "build" / VARIANT / "link.py").symlink_to("/etc/passwd")
    with pytest.raises(TrustError, match="symbolic link"):
        world.pin_local(folder)
