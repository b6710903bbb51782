"""`slipstream kernels`: what it pins, what it asks, how it ends; against a Hub on the loopback address and folders."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.trust.world import VARIANT, World

REPO = "acme/scale"


@pytest.fixture
def ready(world: World) -> World:
    """A policy in the working folder, which nobody has accepted yet."""
    (world.work / "kernels-policy.toml").write_text(world.policy_text())
    return world


def open_it(name: str = REPO) -> object:
    from slipstream.ops.hub import open_kernel
    from slipstream.trust import Policy

    return open_kernel(name, "cpu", Policy.find()).module


def test_lock_list_verify_and_use(ready: World, slipstream: Run) -> None:
    commit = ready.publish(REPO, signed=True, version=4, gain=7)
    locked = slipstream("kernels", "lock", REPO, "--yes")
    assert locked.code == 0, locked.err
    assert not ready.canary.exists()  # looked at and fetched, not run
    lock = json.loads((ready.work / "kernels.lock").read_text())
    entry = lock["kernels"][REPO]
    assert (entry["revision"], entry["version"]) == (commit, 4)
    sent = {n.split("/", 2)[2]: d for n, d in ready.hub.commits[REPO, commit].items()}
    files = entry["builds"][VARIANT]["files"]
    assert files == {n: [len(d), hashlib.sha256(d).hexdigest()] for n, d in sent.items()}
    # The tree's hash as docs/security.md has it, by hand.
    lines = "".join(f"{digest}  {size}  {name}\n" for name, (size, digest) in sorted(files.items()))
    assert entry["builds"][VARIANT]["sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    row = locked.out.splitlines()[2].split()
    assert row[:4] == [REPO, "4", commit[:12], VARIANT] and row[-1].endswith("build.yaml@refs/heads/main")
    assert "Python" in row

    listed = slipstream("kernels", "list", "--json").json["kernels"]
    assert [(k["repo"], k["here"], k["refused"], k["bytes"]) for k in listed] == [
        (REPO, True, None, sum(map(len, sent.values())))
    ]
    assert slipstream("kernels", "verify").code == 0
    assert open_it().scale(3) == 21 and ready.canary.read_text() == "ran"  # type: ignore[attr-defined]


def test_verify_ends_with_a_code_and_names_the_file(ready: World, slipstream: Run) -> None:
    ready.publish(REPO)
    ready.publish("acme/other", gain=9)
    assert slipstream("kernels", "lock", REPO, "acme/other", "--yes").code == 0
    (stored,) = {p for p in (ready.home / "kernels").glob("*/parts/gain.py") if b"9" in p.read_bytes()}
    stored.chmod(0o644)
    stored.write_bytes(b"GAIN = 8\n")
    ran = slipstream("kernels", "verify", "--json")
    assert ran.code == 6 and "parts/gain.py differs" in ran.err
    assert {k["repo"]: k["wrong"] for k in ran.json["kernels"]} == {REPO: False, "acme/other": True}


def test_without_a_policy_one_that_allows_exactly_this_is_written(world: World, slipstream: Run) -> None:
    folder = world.local("mine", gain=5)
    locked = slipstream("kernels", "lock", folder, "--yes")
    assert locked.code == 0, locked.err
    policy = (world.work / "kernels-policy.toml").read_text()
    assert str(folder) in policy and "repos = []" in policy and "there is no policy yet" in locked.err
    assert open_it(str(folder)).scale(2) == 10  # type: ignore[attr-defined]
    other = world.local("another", gain=6)
    refused = slipstream("kernels", "lock", other, "--yes")
    assert refused.code == 6 and "none of the folders" in refused.err


def test_a_folder_of_signed_kernels_is_pinned_with_its_signer(world: World, slipstream: Run) -> None:
    folder = world.local("signed", signed=True, gain=7)
    (world.work / "kernels-policy.toml").write_text(world.policy_text().split("[[signers]]")[0])
    refused = slipstream("kernels", "lock", folder, "--yes")
    assert refused.code == 6 and f"does not list as a signer for {folder}" in refused.err
    signers = (
        f'[[signers]]\nrepos = ["{folder}"]\n' + world.policy_text().split("[[signers]]")[1].rpartition("repos")[0]
    )
    (world.work / "kernels-policy.toml").write_text(world.policy_text().split("[[signers]]")[0] + signers)
    assert slipstream("kernels", "lock", folder, "--yes").code == 0
    assert open_it(str(folder)).scale(2) == 14  # type: ignore[attr-defined]


def test_nothing_is_written_without_a_yes(ready: World, slipstream: Run) -> None:
    ready.publish(REPO)
    ran = slipstream("kernels", "lock", REPO)
    assert ran.code == 6 and "--yes" in ran.err and REPO in ran.out
    assert not (ready.work / "kernels.lock").exists()


def test_what_comes_into_the_policy_while_somebody_reads_is_not_accepted(
    ready: World, slipstream: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slipstream.errors import TrustError

    def agreed() -> bool:
        (ready.work / "kernels-policy.toml").write_text(ready.policy_text(repos='["*/*"]'))
        return True

    ready.publish(REPO)
    monkeypatch.setattr("slipstream.cli.kernels_lock._agreed", agreed)
    assert slipstream("kernels", "lock", REPO).code == 0
    with pytest.raises(TrustError, match="kernels-policy.toml was not accepted on this machine"):
        open_it()


def test_what_the_policy_does_not_allow_is_not_even_looked_at(ready: World, slipstream: Run) -> None:
    ready.publish("evil/scale")
    ran = slipstream("kernels", "lock", "evil/scale", "--yes")
    assert ran.code == 6 and "does not list it" in ran.err and not ready.hub.asked


@pytest.mark.parametrize("name", ["scale", "./nothing", "acme/scale:Layer/x", "a/b/c", "-x/y", "acme/..", ""])
def test_names_that_are_none(ready: World, slipstream: Run, name: str) -> None:
    ran = slipstream("kernels", "lock", "--yes", "--", name)
    assert ran.code in (2, 6) and len(ran.err.splitlines()) == 1 and not ready.hub.asked


def test_the_newest_version_is_pinned_and_going_back_is_said(ready: World, slipstream: Run) -> None:
    for version in (2, 10, 9):
        ready.publish(REPO, version=version, gain=version)
    assert slipstream("kernels", "lock", REPO, "--yes", "--json").json["kernels"][0]["version"] == 10
    back = slipstream("kernels", "lock", REPO, "--version", 9, "--yes")
    assert back.code == 0 and "goes back to an older version" in back.err
    assert open_it().scale(2) == 18  # type: ignore[attr-defined]
    assert "has no version 3; there are 2, 9, 10" in slipstream("kernels", "lock", REPO, "--version", 3, "--yes").err
    both = slipstream("kernels", "lock", REPO, "--version", 9, "--revision", "ab", "--yes")
    assert both.code == 2


def test_a_changed_lock_must_be_accepted_again(ready: World, slipstream: Run) -> None:
    from slipstream.errors import TrustError

    ready.publish(REPO)
    assert slipstream("kernels", "lock", REPO, "--yes").code == 0
    lock = ready.work / "kernels.lock"
    lock.write_text(lock.read_text().replace("\n", "\n\n", 1))  # as a pull from a repository changes it
    with pytest.raises(TrustError, match="was not accepted on this machine"):
        open_it()
    assert slipstream("kernels", "list").code == 6
    assert slipstream("kernels", "lock", "--yes").code == 0
    assert open_it() is not None


def test_a_lock_that_was_there_is_shown_whole_before_it_is_accepted(ready: World, slipstream: Run) -> None:
    """Else one would agree to the entry that one named, and accept what somebody had put beside it."""
    ready.publish("acme/planted")
    ready.publish(REPO, gain=8)
    assert slipstream("kernels", "lock", "acme/planted", "--yes").code == 0
    (ready.folder / "config" / "slipstream" / "kernels-accepted.json").unlink()
    ran = slipstream("kernels", "lock", REPO, "--yes")
    assert ran.code == 0 and "acme/planted" in ran.out and REPO in ran.out
    assert "will be accepted as it is" in ran.err and 'repos = ["acme/*"]' in ran.err


def test_what_a_kernel_needs_is_pinned_with_it(ready: World, slipstream: Run) -> None:
    ready.publish("acme/base", gain=11)
    files = {"__init__.py": b"from kernels import get_kernel_dep\nbase = get_kernel_dep('acme/base')\n"}
    ready.publish("acme/top", files=files, needs="acme/base")
    ran = slipstream("kernels", "lock", "acme/top", "--yes", "--json")
    assert {k["repo"] for k in ran.json["kernels"]} == {"acme/top", "acme/base"}
    assert open_it("acme/top").base.scale(2) == 22  # type: ignore[attr-defined]


def test_other_builds_are_pinned_without_their_large_files(ready: World, slipstream: Run) -> None:
    """A native build for another machine: the Hub's hash of its library is pinned, and nothing of 3 MB is fetched."""
    library = bytes(range(256)) * 12_000
    native = ready.build(files={"__init__.py": b"", "_ops.abi3.so": library})
    mine = ready.build()
    tree = {f"build/{VARIANT}/{n}": d for n, d in mine.items()}
    tree |= {f"build/torch29-cxx11-cu128-aarch64-linux/{n}": d for n, d in native.items()}
    ready.hub.commit(REPO, tree, "v1")
    ran = slipstream("kernels", "lock", REPO, "--yes")
    assert ran.code == 0 and re.search(r"aarch64-linux .* native", ran.out)
    build = json.loads((ready.work / "kernels.lock").read_text())["kernels"][REPO]["builds"]
    name = "torch29-cxx11-cu128-aarch64-linux"
    assert build[name]["files"]["_ops.abi3.so"] == [len(library), hashlib.sha256(library).hexdigest()]
    assert not [a for a in ready.hub.asked if a.endswith(".so")]
    states = {k["variant"]: k["state"] for k in slipstream("kernels", "verify", "--json").json["kernels"]}
    assert states == {VARIANT: "verified", name: "not here; compared when it is fetched"}


def test_audit_of_a_loaded_model(world: World, slipstream: Run, model: str) -> None:
    bom, report = world.work / "bom.json", world.work / "report.json"
    ran = slipstream("kernels", "audit", "--model", model, "--cyclonedx", bom, "--output", report)
    assert ran.code == 0, ran.err
    code = json.loads(report.read_text())["code"]
    assert {"package", "system"} <= {p["kind"] for p in code}
    torch = next(p for p in code if p["name"] == "libtorch_cpu.so")
    assert torch["origin"].startswith("torch ") and torch["matches"] is True
    assert torch["sha256"] == hashlib.sha256(Path(torch["path"]).read_bytes()).hexdigest()
    assert json.loads(bom.read_text())["specVersion"] == "1.6"
    assert len(json.loads(bom.read_text())["components"]) == len(code)
    assert "libtorch_cpu.so" in ran.out
    assert slipstream("kernels", "audit", "--device", "cpu").code == 2  # an option for a model that is not named
