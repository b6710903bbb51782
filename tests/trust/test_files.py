"""kernels.lock and kernels-policy.toml: what is read is what was written, and nothing in them is skipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.errors import TrustError
from slipstream.trust import Build, File, Lock, Pin, Policy
from slipstream.trust.lock import bad_name, is_repo, tree_sha256
from slipstream.trust.signature import matches

HERE = Path("/project/kernels.lock")


def lock(*, folder: str = "/project/own/k") -> Lock:
    files = {"__init__.py": File(5, "ab" * 32), "a/b.so": File(0, "cd" * 32)}
    build = Build("torch-cpu", tree_sha256(files), files, "who", "says who")
    other = Build("torch29-cxx11-cu128-x86_64-linux", tree_sha256(files), files)
    pins = (
        Pin("acme/k", "0123456789" * 4, 7, {"torch-cpu": build, other.variant: other}, ("acme/needed",)),
        Pin(folder, None, None, {other.variant: other}),
    )
    return Lock({p.repo: p for p in pins}, HERE)


def test_a_lock_is_read_as_it_was_written() -> None:
    made = lock()
    assert Lock.parse(made.text().encode(), HERE) == made


def test_a_folder_below_the_lock_moves_with_it() -> None:
    moved = Path("/elsewhere/kernels.lock")
    assert "/elsewhere/own/k" in Lock.parse(lock().text().encode(), moved).pins
    assert "/other/k" in Lock.parse(lock(folder="/other/k").text().encode(), moved).pins


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_lock_is_refused_or_says_the_same(data: st.DataObject) -> None:
    """Whatever is written over it: a TrustError, or the tree's hash is still that of its files; never another exception."""
    raw = bytearray(lock().text().encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 9))] = data.draw(
            st.binary(max_size=6) | st.sampled_from([b'"', b"{", b"[", b"0"])
        )
    try:
        read = Lock.parse(bytes(raw), HERE)
    except TrustError as e:
        assert str(HERE) in str(e)
        return
    for pin in read.pins.values():
        assert is_repo(pin.repo) or pin.repo.startswith("/")
        for build in pin.builds.values():
            assert tree_sha256(build.files) == build.sha256 and not any(map(bad_name, build.files))


def test_one_folder_written_in_two_ways_is_two_entries_for_one() -> None:
    value = json.loads(lock().text())
    value["kernels"]["./other/../own/k"] = value["kernels"]["./own/k"]
    with pytest.raises(TrustError, match="says something twice.*/project/own/k"):
        Lock.parse(json.dumps(value).encode(), HERE)


def test_a_size_that_is_true_is_no_size() -> None:
    files = {"a": File(True, "ab" * 32)}
    made = Lock({"acme/k": Pin("acme/k", "0" * 40, 1, {"x": Build("x", tree_sha256(files), files)})}, HERE)
    with pytest.raises(TrustError, match=r"not \[bytes, SHA-256\]"):
        Lock.parse(made.text().replace("True", "true").encode(), HERE)


def test_no_two_trees_have_one_hash() -> None:
    """Sizes and names cannot run into each other."""
    a, b = File(1, "ab" * 32), File(11, "ab" * 32)
    trees = [{"x": a}, {"x": b}, {"1  x": a}, {"x": a, "y": a}, {"x": a, "y": b}, {"y": a, "x": b}, {}]
    assert len({tree_sha256(t) for t in trees}) == len(trees)
    assert tree_sha256({"x": a, "y": b}) == tree_sha256({"y": b, "x": a})


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("repo = ['acme/*']", "not known"),
        ("repos = 'acme/*'", "list of texts"),
        ("repos = ['acme']", "not org/name"),
        ("repos = ['*/*/*']", "not org/name"),
        ("require_signatures = 'yes'", "true or false"),
        ("endpoint = 3", "must be text"),
        ("[minimum_versions]\n'acme/k' = '2'", "not org/repo = number"),
        ("[minimum_versions]\nacme = 2", "not org/repo = number"),
        ("[[signers]]\nidentity = 'a'", "each needs issuer"),
        ("[[signers]]\nidentity = 'a'\nissuer = 'b'\nrepo = 'c'", "not known"),
        ("repos = [", "kernels-policy.toml"),
        ("\x00", "kernels-policy.toml"),
    ],
)
def test_a_rule_that_is_not_understood_is_not_skipped(text: str, cause: str) -> None:
    with pytest.raises(TrustError, match=cause):
        Policy.parse(text.encode(), Path("/p/kernels-policy.toml"))


@pytest.mark.parametrize(
    ("pattern", "repo", "answer"),
    [
        ("acme/*", "acme/k", True), ("acme/*", "acme-evil/k", False), ("acme/*", "acme/k/l", False),
        ("*/norm", "b/norm", True), ("acme/k?", "acme/k2", True), ("acme/k", "acme/kk", False),
        ("Acme/*", "acme/k", False), ("*/*", "a/b", True),
    ],
)  # fmt: skip
def test_patterns(pattern: str, repo: str, answer: bool) -> None:
    assert matches(pattern, repo) is answer


def test_kernels_that_need_each_other() -> None:
    files = {"__init__.py": File(1, "ab" * 32)}
    builds = {"torch-cpu": Build("torch-cpu", tree_sha256(files), files)}
    needs = {
        "acme/a": ("acme/b",),
        "acme/b": ("acme/c",),
        "acme/c": ("acme/a",),
        "acme/d": ("acme/e", "acme/e"),
        "acme/e": (),
    }
    pins = {n: Pin(n, "0" * 40, 1, builds, needed) for n, needed in needs.items()}
    policy = Policy(Lock(pins), ("acme/*",), hub=True)
    assert "need each other" in (policy.why_not("acme/b") or "")
    assert policy.why_not("acme/d") is None
    without = Policy(Lock({n: p for n, p in pins.items() if n != "acme/e"}), ("acme/*",), hub=True)
    assert "it needs acme/e: it is not in" in (without.why_not("acme/d:Layer") or "")


def test_named_files_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrustError, match="no-such.lock cannot be read"):
        Policy.find("no-such.lock")
    with pytest.raises(TrustError, match="no-such.toml cannot be read"):
        Policy.find(None, "no-such.toml")


def test_where_they_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named, else of the working folder where they were accepted, else the user's own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    work, own = tmp_path / "work", tmp_path / "config" / "slipstream"
    for folder, version in ((work, 1), (own, 2), (tmp_path, 3)):
        folder.mkdir(parents=True, exist_ok=True)
        files = {"__init__.py": File(version, "ab" * 32)}
        pin = Pin("acme/k", "0" * 40, version, {"torch-cpu": Build("torch-cpu", tree_sha256(files), files)})
        (folder / "kernels.lock").write_text(Lock({"acme/k": pin}, folder / "kernels.lock").text())
        (folder / "kernels-policy.toml").write_text("repos = ['acme/*']")
    monkeypatch.chdir(work)
    named = Policy.find(str(tmp_path / "kernels.lock"), str(tmp_path / "kernels-policy.toml"))
    assert named.pinned("acme/k").version == 3
    with pytest.raises(TrustError, match="not accepted"):
        Policy.find().pinned("acme/k")
    from slipstream.trust import record

    policy = work / "kernels-policy.toml"
    record.accept(Lock.parse((work / "kernels.lock").read_bytes(), work / "kernels.lock"), policy, policy.read_bytes())
    assert Policy.find().pinned("acme/k").version == 1
    for name in ("kernels.lock", "kernels-policy.toml"):
        (work / name).unlink()
    assert Policy.find().pinned("acme/k:Layer").version == 2
    kept = json.loads(record.record_path().read_text())
    assert kept["versions"] == {str(work / "kernels.lock"): {"acme/k": 1}}
    record.record_path().write_text("{}")
    with pytest.raises(TrustError, match="is damaged"):
        Policy.find()
