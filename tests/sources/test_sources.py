"""Names, and models that are already on the disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from slipstream.errors import CheckpointError
from slipstream.sources import cache_root, pull, resolve
from slipstream.sources.hub import HubModel

DIGEST = hashlib.sha256(b"weights").hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "notes.md").write_bytes(b"not part of the model")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2", "no model has this name. Did you mean smollm2-135m-instruct?"),
        ("smolm2-135-instruct", "Did you mean smollm2-135m-instruct?"),
        ("qqq", "Known names are smollm2-135m-instruct."),
        ("./nowhere", "no such folder or file"),
        ("/nowhere/at/all", "no such folder or file"),
        ("models/x.safetensors", "no such folder or file"),
        ("a/../b", "no such folder or file"),
        ("", "'': no model has this name"),
        ("  ", "'  ': no model has this name"),
        ("a\0b", "no model has this name"),
        ("x" * 300, "no model has this name"),
        ("x" * 5000, "no model has this name"),
        ("~nobody/x", "no such folder or file"),
    ],
)
def test_names_that_are_none(name: str, message: str) -> None:
    for ask in (resolve, pull):
        with pytest.raises(CheckpointError) as caught:
            ask(name)
        assert message in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name", HubModel("org/name")),
        ("org/na.me-1@v1.0", HubModel("org/na.me-1", "v1.0")),
        ("org/name@refs/pr/3", HubModel("org/name", "refs/pr/3")),
        ("org/name:x-Q4_K_M.gguf", HubModel("org/name", "main", "x-Q4_K_M.gguf")),
        ("org/name@v1:sub/x.gguf", HubModel("org/name", "v1", "sub/x.gguf")),
        ("org/name:pickle.bin", None),
        ("org/name:../x.gguf", None),
        ("org/a/b", None),
        ("name", None),
    ],
)
def test_hub_names(name: str, expected: HubModel | None) -> None:
    assert HubModel.parse(name) == expected
    if expected:
        assert str(expected) == name


def test_a_path_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("smollm2-135m-instruct", "org/name"):
        Path(name).mkdir(parents=True)
        assert resolve(name) == Path(name)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.gguf").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/x.gguf") == tmp_path / "x.gguf"


def test_where_models_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLIPSTREAM_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/ada")
    assert cache_root() == Path("/home/ada/.cache/slipstream")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert cache_root() == Path("/var/cache/slipstream")
    monkeypatch.setenv("SLIPSTREAM_HOME", "~/models")
    assert cache_root() == Path("/home/ada/models")


def test_a_folder_without_a_list_is_hashed(folder: Path) -> None:
    pulled = pull(folder)
    assert pulled.files == {"model.safetensors": DIGEST, "config.json": hashlib.sha256(b"{}").hexdigest()}
    assert (pulled.path, pulled.bytes, pulled.status, pulled.verified) == (folder, 9, "local", False)


def test_a_folder_is_held_against_its_list(folder: Path) -> None:
    (folder / "SHA256SUMS").write_text(f"{DIGEST}  model.safetensors\n")
    assert pull(str(folder)).verified
    (folder / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        pull(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors is missing, though it is listed"):
        pull(folder)


def test_a_file_is_held_against_its_list(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"weights")
    assert pull(file).sha256 == DIGEST and not pull(file).verified
    (tmp_path / "m.gguf.sha256").write_text(f"{DIGEST} *m.gguf\n")
    assert pull(file).verified
    (tmp_path / "m.gguf.sha256").write_text(f"{'0' * 64}  m.gguf\n")
    with pytest.raises(CheckpointError, match=f"its SHA-256 is {DIGEST}, listed is 0000"):
        pull(file)


@pytest.mark.parametrize("line", ["../x", "/etc/passwd", "a/../../x"])
def test_a_list_that_leaves_its_folder(folder: Path, line: str) -> None:
    (folder / "SHA256SUMS").write_text(f"{DIGEST}  {line}\n")
    with pytest.raises(CheckpointError, match="SHA256SUMS: line 1 is not"):
        pull(folder)


def test_a_list_that_is_none(folder: Path) -> None:
    (folder / "SHA256SUMS").write_bytes(b"\xff\xfe not a list\n")
    with pytest.raises(CheckpointError, match="SHA256SUMS: line 1 is not"):
        pull(folder)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no model"):
        pull(tmp_path)


def test_only_the_hub_has_revisions(folder: Path) -> None:
    for name in (str(folder), "smollm2-135m-instruct"):
        with pytest.raises(CheckpointError, match="has no revision 'v1'"):
            pull(name, revision="v1")


def test_no_pickle_is_hashed_as_a_model(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="holds no model"):
        pull(tmp_path)


def test_shapes_are_known_where_weights_are_not_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gpt-oss-20b", "GPT-OSS-120B", "llama-3.1-8b", "qwen3-30b-a3b"):
        folder = resolve(name, weights=False)
        assert folder.name == name.lower() and [p.name for p in folder.iterdir()] == ["config.json"]
        for ask in (resolve, pull):
            with pytest.raises(
                CheckpointError, match=f"{name}: only the shapes .*--weights random.*; the whole of it is "
            ):
                ask(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt-oss-20b").mkdir()
    assert resolve("gpt-oss-20b", weights=False) == Path("gpt-oss-20b")  # a path goes before a name here too
