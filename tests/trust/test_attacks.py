"""200 attempts to run something that was not pinned. None is imported, and each ends in a TrustError that names its cause.

Every attempt begins with a control: the same kernel, pinned and untouched, is opened, and importing it does write the canary.
Then the attempt is made on the same machine, and there must be no canary.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import py_compile
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from slipstream.errors import TrustError
from slipstream.trust import Build, File, Lock, Pin, Policy
from slipstream.trust.lock import tree_sha256
from tests.trust.world import VARIANT, World, kernel

EACH = 10
Attempt = tuple[
    str, Callable[[], Policy], str
]  # what is asked for, under which policy, and the cause that must be named


class Stage:
    """One attempt's kernel, which is on the Hub or in a folder, and already opened once."""

    def __init__(self, world: World, number: int, seed: int) -> None:
        self.world, self.number, self.random = world, number, random.Random(seed)
        self.evil = f"from pathlib import Path\nPath({str(world.canary)!r}).write_text('evil {number}')\n".encode()
        self.repo = f"acme/scale-{self.random.randrange(16**6):x}"
        self.gain = self.random.randrange(2, 10**6)

    def from_hub(self, **more: object) -> Pin:
        self.world.publish(self.repo, gain=self.gain, **more)
        return self._control(self.pin(self.repo))

    def from_folder(self) -> Pin:
        return self._control(self.world.pin_local(self.world.local(self.repo.split("/")[1], gain=self.gain)))

    def pin(self, repo: str) -> Pin:
        """The entry that somebody writes who does not verify: right hashes, and no questions. test_pin.py has the other way."""
        version, commit = next(iter(self.world.hub.branches[repo].items()))
        sent = self.world.hub.commits[repo, commit]
        tree = {n.split("/", 2)[2]: File(len(d), hashlib.sha256(d).hexdigest()) for n, d in sent.items()}
        return Pin(repo, commit, int(version[1:]), {VARIANT: Build(VARIANT, tree_sha256(tree), tree)})

    def either(self) -> tuple[Pin, Path]:
        """A pin, and the folder that is read when it is opened."""
        pin = self.from_hub() if self.number % 2 else self.from_folder()
        build = pin.builds[VARIANT]
        return pin, self.stored(build) if self.number % 2 else Path(pin.repo, "build", VARIANT)

    def stored(self, build: Build) -> Path:
        return self.world.home / "kernels" / build.sha256

    def _control(self, pin: Pin) -> Pin:
        from slipstream.ops.hub import open_kernel
        from slipstream.trust.imports import forget, packages

        found = open_kernel(pin.repo, "cpu", self.world.policy(pin))
        assert self.world.canary.read_text() == "ran" and found.module.scale(2) == 2 * self.gain
        self.world.canary.unlink()
        for package in packages():
            forget(package)
        return pin

    def forget_store(self) -> None:
        shutil.rmtree(self.world.home / "kernels")

    def some_file(self, pin: Pin) -> str:
        return self.random.choice(sorted(n for n, f in pin.builds[VARIANT].files.items() if f.size))

    def flipped(self, data: bytes) -> bytes:
        at = self.random.randrange(len(data))
        return data[:at] + bytes([data[at] ^ (1 << self.random.randrange(8))]) + data[at + 1 :]


def write(path: Path, data: bytes) -> None:
    """As an attacker who is this user could: the read-only bit does not hold."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def unlisted(s: Stage) -> Attempt:
    s.from_hub()
    names = (
        "acme-kernels/k",
        "acm/e",
        "ACME/k",
        "acme.x/k",
        "acme_/k",
        "evil/acme",
        "acme-x/scale",
        "xacme/k",
        "a/acme",
        "acme2/k",
    )
    repo = names[s.number]
    s.world.publish(repo)
    pin = s.pin(repo)
    return repo, lambda: s.world.policy(pin), "does not list it"


def unpinned(s: Stage) -> Attempt:
    pin = s.from_hub()
    repo = f"{s.repo}-{s.number}"
    s.world.publish(repo, gain=s.number + 2)
    return (repo if s.number % 2 else f"{repo}:Doubled"), lambda: s.world.policy(pin), "is not in .*kernels.lock"


def byte_on_the_way(s: Stage) -> Attempt:
    pin = s.from_hub()
    s.forget_store()
    name = s.some_file(pin)
    path = f"build/{VARIANT}/{name}"
    s.world.hub.sent_instead[path] = s.flipped(s.world.hub.commits[s.repo, pin.revision or ""][path])
    return s.repo, lambda: s.world.policy(pin), f"{re.escape(name)} differs"


def byte_in_place(s: Stage) -> Attempt:
    pin, folder = s.either()
    name = s.some_file(pin)
    write(folder / name, s.flipped((folder / name).read_bytes()))
    return pin.repo, lambda: s.world.policy(pin), f"{re.escape(name)} differs"


def other_length(s: Stage) -> Attempt:
    pin, folder = s.either()
    name = s.some_file(pin)
    data = (folder / name).read_bytes()
    write(folder / name, data + s.evil if s.number % 3 else data[: s.random.randrange(len(data))])
    return pin.repo, lambda: s.world.policy(pin), f"{re.escape(name)} has not the {len(data):,} bytes"


def added_file(s: Stage) -> Attempt:
    pin, folder = s.either()
    name = (
        "extra.py", "layers/__init__.py", "parts/gain/__init__.py", "sitecustomize.py", "numpy.py", ".hidden.py",
        "parts/gain.cpython-311-x86_64-linux-gnu.so", "layers.abi3.so", "LICENSE", "a/b/c/d.py",
    )[s.number]  # fmt: skip
    write(folder / name, s.evil)
    return pin.repo, lambda: s.world.policy(pin), f"{re.escape(name)} was added"


def removed_file(s: Stage) -> Attempt:
    pin, folder = s.either()
    gone = s.random.sample(sorted(pin.builds[VARIANT].files), 1 + s.number % 3)
    for name in gone:
        (folder / name).unlink()
    return pin.repo, lambda: s.world.policy(pin), "is missing"


def bytecode(s: Stage) -> Attempt:
    pin, folder = s.either()
    module = ("__init__", "layers", "parts/__init__", "parts/gain")[s.number % 4]
    source, target = s.world.folder / f"evil-{s.number}.py", folder / f"{module}.py"
    source.write_bytes(s.evil)
    where = importlib.util.cache_from_source(str(target)) if s.number < 7 else str(target.with_suffix(".pyc"))
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH  # which Python would take without a look at the source
    py_compile.compile(str(source), where, invalidation_mode=mode, doraise=True)
    return pin.repo, lambda: s.world.policy(pin), "bytecode"


def link(s: Stage) -> Attempt:
    pin, folder = s.either()
    outside = s.world.folder / "outside"
    if s.number < 6:  # a link to the same content today, and to anything tomorrow
        name = s.some_file(pin)
        shutil.copytree(folder, outside)
        (folder / name).unlink()
        (folder / name).symlink_to(outside / name)
    elif s.number < 8:
        name = "parts"
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside)
    else:
        name = f"more-{s.number}"
        (folder / name).symlink_to("/etc/passwd")
    return pin.repo, lambda: s.world.policy(pin), f"{name} is a symbolic link"


def environment(s: Stage) -> Attempt:
    pin = s.from_hub()
    evil = s.world.local("evil", files={"__init__.py": s.evil})
    set_to = (
        ("LOCAL_KERNELS", f"{s.repo}={evil}"), ("LOCAL_KERNELS", f"acme/other={evil}"), ("LOCAL_KERNELS", "nonsense"),
        ("LOCAL_KERNELS", f"a/b=/x:{s.repo}={evil}/build"), ("KERNELS_CACHE", str(evil)), ("KERNELS_CACHE", "relative"),
        ("TRITON_KERNEL_OVERRIDE", "1"), ("TRITON_OVERRIDE_DIR", str(evil)), ("HF_ENDPOINT", "http://127.0.0.1:9"),
        ("HF_ENDPOINT", "https://huggingface.co.evil.invalid"),
    )  # fmt: skip
    name, value = set_to[s.number]
    if name == "HF_ENDPOINT":  # it matters only for what is not here yet
        s.forget_store()
    os.environ[name] = value
    return s.repo, lambda: s.world.policy(pin), f"{name} (is set|names)"


def rolled_back(s: Stage) -> Attempt:
    old = 1 + s.number
    pin = s.from_hub(version=old)
    if s.number % 2:
        text = s.world.policy_text(f'[minimum_versions]\n"{s.repo}" = {old + 1}\n')
        return s.repo, lambda: s.world.policy(pin, text=text), f"asks for {old + 1} at least"
    return s.repo, lambda: s.world.policy(pin, recorded={s.repo: old + 1 + s.number}), "rolled back"


def older_under_a_new_name(s: Stage) -> Attempt:
    """The files of an old version, pinned by someone as a newer one."""
    pin = s.from_hub(version=1)
    claimed = replace(pin, version=2 + s.number)
    text = s.world.policy_text(f'[minimum_versions]\n"{s.repo}" = 2\n')
    return s.repo, lambda: s.world.policy(claimed, text=text), f"says version 1, and the lock {2 + s.number}"


def wrong_signer(s: Stage) -> Attempt:
    from tests.trust.signing import ISSUER, SOURCE, WORKFLOW, Sigstore

    pin = s.from_hub(signed=True)
    base = WORKFLOW.split("@")[0]
    chosen = (
        {"identity": f"{base}@refs/heads/evil"}, {"identity": f"{base}@refs/pull/1/merge"}, {"identity": WORKFLOW + "2"},
        {"identity": WORKFLOW.replace("acme", "acne")}, {"issuer": "https://accounts.invalid"}, {"issuer": ISSUER + "/"},
        {"source": SOURCE + "-fork"}, {"source": "https://github.com/evil/kernels"}, None, None,
    )[s.number]  # fmt: skip
    repo = f"{s.repo}-by-another"
    files = kernel(s.world.canary, "evil", s.gain)
    files = s.world.build(files=files)
    by = s.world.sigstore if chosen is not None else Sigstore()
    files["metadata.json.sigstore"] = by.bundle(files["metadata.json"], **(chosen or {}))
    s.world.hub.commit(repo, {f"build/{VARIANT}/{n}": d for n, d in files.items()}, "v1")
    theirs = s.pin(repo)
    return repo, lambda: s.world.policy(pin, theirs), "is signed by" if chosen is not None else "signature is not valid"


def unsigned(s: Stage) -> Attempt:
    """Signatures are required, and there is none: never made, or taken away and pinned so."""
    pin = s.from_hub(signed=bool(s.number % 2))
    repo = f"{s.repo}-unsigned"
    files = s.world.build(gain=s.number + 2)
    s.world.hub.commit(repo, {f"build/{VARIANT}/{n}": d for n, d in files.items()}, "v1")
    theirs = s.pin(repo)
    text = s.world.policy_text("require_signatures = true")
    return repo, lambda: s.world.policy(pin, theirs, text=text), "is not signed"


def broken_signature(s: Stage) -> Attempt:
    """A bundle that is there must hold, even where the lock has its very bytes: damaged, of other metadata, or of other files."""
    pin = s.from_hub(signed=True)
    files = s.world.build(signed=True, gain=s.number + 2)
    cause = "signature is not valid"
    if s.number < 3:
        bundle = json.loads(files["metadata.json.sigstore"])
        if s.number == 0:
            del bundle["verificationMaterial"]["tlogEntries"]
        elif s.number == 1:
            bundle["messageSignature"]["signature"] = bundle["messageSignature"]["messageDigest"]["digest"]
        else:
            bundle["verificationMaterial"]["tlogEntries"][0]["integratedTime"] = "1"
        files["metadata.json.sigstore"] = json.dumps(bundle).encode()
    elif s.number < 6:
        other = s.world.build(signed=True, gain=s.number + 50)
        files["metadata.json.sigstore"] = other["metadata.json.sigstore"]
    else:
        name = sorted(n for n in files if not n.startswith("metadata"))[s.number - 6]
        files[name] = s.evil
        cause = f"signed are other files: {re.escape(name)}"
    repo = f"{s.repo}-broken"
    s.world.hub.commit(repo, {f"build/{VARIANT}/{n}": d for n, d in files.items()}, "v1")
    theirs = s.pin(repo)
    return repo, lambda: s.world.policy(pin, theirs), cause


def offline(s: Stage) -> Attempt:
    from huggingface_hub import constants

    pin = s.from_hub()
    folder = s.stored(pin.builds[VARIANT])
    cause = "HF_HUB_OFFLINE"
    if s.number < 3:
        s.forget_store()
    elif s.number < 6:  # another build under the pinned one's name
        shutil.rmtree(folder)
        other = s.world.build(files={"__init__.py": s.evil + b"#" * s.number})
        for name, data in other.items():
            write(folder / name, data)
        cause = "is missing"
    else:
        write(folder / "parts" / "gain.py", s.evil + b"#" * s.number)
        cause = "parts/gain.py has not"
    constants.HF_HUB_OFFLINE = True  # the fixture puts it back
    return s.repo, lambda: s.world.policy(pin), cause


def edited_lock(s: Stage) -> Attempt:
    pin = s.from_hub()
    lock = json.loads(Lock({pin.repo: pin}, s.world.work / "kernels.lock").text())
    entry = lock["kernels"][s.repo]
    build = entry["builds"][VARIANT]
    cause = "do not make up its sha256"
    match s.number:
        case 0:
            build["files"]["__init__.py"] = [len(s.evil), "ab" * 32]
        case 1:
            del build["files"]["layers.py"]
        case 2:
            build["files"]["../../../evil.py"], cause = [1, "ab" * 32], "leaves the folder"
        case 3:
            build["files"]["/etc/evil.py"], cause = [1, "ab" * 32], "leaves the folder"
        case 4:
            build["files"]["__pycache__/layers.cpython-311.pyc"], cause = [1, "ab" * 32], "bytecode"
        case 5:
            entry["revision"], cause = "main", "not a whole commit"
        case 6:
            entry["trust_remote_code"], cause = True, "unknown entries"
        case 7:
            lock["format"], cause = 2, "does not say"
        case 8:
            entry["builds"], cause = {}, "no builds"
        case 9:
            build["sha256"] = "0" * 64
    data = json.dumps(lock).encode()

    def policy() -> Policy:
        allowed = s.world.policy(pin)
        return allowed.with_lock(Lock.parse(data, s.world.work / "kernels.lock"), {})

    return s.repo, policy, cause


def foreign_folder(s: Stage) -> Attempt:
    """A folder that was downloaded brings a lock and a policy that allow its own code; nobody here accepted them."""
    s.from_hub()
    repo = f"acme/brought-{s.number}"
    s.world.publish(repo, text="evil")
    lock = Lock({repo: s.pin(repo)}, s.world.work / "kernels.lock")
    config = s.world.folder / "config" / "slipstream"
    lock_at = s.world.work if s.number % 3 != 1 else config
    policy_at = s.world.work if s.number % 3 != 2 else config
    for place in (lock_at, policy_at):
        place.mkdir(parents=True, exist_ok=True)
    (lock_at / "kernels.lock").write_text(lock.text())
    (policy_at / "kernels-policy.toml").write_text(s.world.policy_text(f"# {s.number}", sources='["hub"]'))
    return repo, Policy.find, "was not accepted on this machine"


def other_place(s: Stage) -> Attempt:
    """Folders that no policy lists, links to them, and a store that others could write to."""
    pin = s.either()[0] if s.number > 3 else s.from_folder()
    if s.number == 0:
        moved = s.world.folder / "elsewhere"
        shutil.copytree(pin.repo, moved)
        return str(moved), lambda: s.world.policy(s.world.pin_local(moved)), "none of the folders"
    if s.number < 3:
        real = Path(pin.repo, "build" if s.number == 1 else f"build/{VARIANT}")
        shutil.move(real, s.world.folder / "elsewhere")
        real.symlink_to(s.world.folder / "elsewhere")
        return pin.repo, lambda: s.world.policy(pin), "symbolic link"
    if s.number == 3:
        text = s.world.policy_text(sources='["hub"]')
        return pin.repo, lambda: s.world.policy(pin, text=text), "none of the folders"
    where = (s.stored(pin.builds[VARIANT]), s.world.home / "kernels", s.world.home)[s.number % 3]
    where.chmod(0o777 if s.number % 2 else 0o775)
    return pin.repo, lambda: s.world.policy(pin), "could be changed by another user"


def mixed(s: Stage) -> Attempt:
    """Two or three at once."""
    first, second = s.random.sample((byte_in_place, added_file, removed_file, bytecode, link, other_length), 2)
    name, policy, _ = first(s)
    pin = policy().pinned(name)
    folder = Path(pin.repo, "build", VARIANT) if pin.is_local else s.stored(pin.builds[VARIANT])
    write(folder / f"{second.__name__}.py", s.evil)
    if s.number % 2:
        write(folder / "__init__.py", s.evil)
    if s.number % 3 == 0:
        os.environ["LOCAL_KERNELS"] = f"{pin.repo}={folder}"
    return name, policy, "added|LOCAL_KERNELS|symbolic link|missing|differs"


KINDS = (
    unlisted, unpinned, byte_on_the_way, byte_in_place, other_length, added_file, removed_file, bytecode, link,
    environment, rolled_back, older_under_a_new_name, wrong_signer, unsigned, broken_signature, offline, edited_lock,
    foreign_folder, other_place, mixed,
)  # fmt: skip


def test_there_are_two_hundred() -> None:
    assert len(set(KINDS)) * EACH >= 200


@pytest.mark.parametrize("number", range(EACH))
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_nothing_unpinned_is_run(
    world: World, kind: Callable[[Stage], Attempt], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slipstream.ops.hub import open_kernel, opened

    for name in ("LOCAL_KERNELS", "KERNELS_CACHE", "TRITON_KERNEL_OVERRIDE", "TRITON_OVERRIDE_DIR", "HF_ENDPOINT"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
    asked, policy, cause = kind(Stage(world, number, seed=KINDS.index(kind) * EACH + number))
    assert not world.canary.exists()
    with pytest.raises(TrustError) as caught:
        open_kernel(asked, "cpu", policy())
    assert re.search(cause, str(caught.value)), str(caught.value)
    assert "slipstream kernels lock" in str(caught.value) or "chmod" in str(caught.value)
    assert not world.canary.exists() and not opened()
