"""The Hub part of sources, with the real client against a small server on the loopback address."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from slipstream.errors import CheckpointError
from slipstream.sources import hub as hub_module
from slipstream.sources import pull, resolve
from tests.sources.hub_server import COMMIT, REPO, Hub, serve

WEIGHTS = bytes(range(256)) * 5000


def index(*names: str) -> bytes:
    return json.dumps({"weight_map": {f"w{i}": name for i, name in enumerate(names)}}).encode()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(
        {
            "config.json": b'{"model_type": "llama"}',
            "tokenizer.json": b"{}",
            "model.safetensors": WEIGHTS,
            "consolidated.safetensors": b"the same again",
            "original/model.safetensors": b"another format",
            "pytorch_model.bin": b"pickle",
            "modeling_tiny.py": b"raise SystemExit",
            "README.md": b"# tiny",
        }
    )
    with serve(server):
        monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path / "home"))
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield server


def test_only_weights_and_text_are_fetched(hub: Hub) -> None:
    seen: list[tuple[str, int, int | None]] = []
    pulled = pull(REPO, progress=lambda *args: seen.append(args))
    wanted = {"config.json", "tokenizer.json", "model.safetensors"}
    assert hub.fetched() == wanted == set(pulled.files)
    assert {p.name for p in pulled.path.rglob("*") if p.is_file()} == wanted
    assert (pulled.path / "model.safetensors").read_bytes() == WEIGHTS
    assert pulled.files["model.safetensors"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert pulled.status == "downloaded" and pulled.verified
    total = sum(len(hub.files[n]) for n in wanted)
    assert pulled.bytes == total
    assert (f"downloading {REPO}", total, total) in seen


def test_without_weights_only_text_is_fetched_and_the_model_is_not_there_yet(hub: Hub) -> None:
    folder = resolve(REPO, weights=False)
    assert hub.fetched() == {"config.json", "tokenizer.json"} == {p.name for p in folder.iterdir()}
    assert hub_module.all_recorded() == []
    whole = resolve(REPO)
    assert (whole / "model.safetensors").read_bytes() == WEIGHTS
    hub.asked.clear()
    assert resolve(REPO, weights=False) == whole and hub.asked == []


def test_text_is_verified_too(hub: Hub) -> None:
    hub.damaged["config.json"] = b'{"model_type": "llamb"}'
    with pytest.raises(CheckpointError, match="config.json came damaged"):
        resolve(REPO, weights=False)


def test_what_was_pulled_opens_without_asking_the_hub(hub: Hub) -> None:
    folder = pull(REPO).path
    hub.asked.clear()
    assert resolve(REPO) == folder == resolve(f"{REPO}@main")
    assert hub.asked == []
    again = pull(REPO)
    assert again.status == "already there" and hub.fetched() == set()


def test_a_new_commit_is_taken_by_pull_alone(hub: Hub) -> None:
    old = pull(REPO).path
    hub.commit, hub.files["model.safetensors"] = "d" * 40, b"new"
    assert resolve(REPO) == old
    pulled = pull(REPO)
    assert pulled.status == "downloaded" and pulled.path != old and resolve(REPO) == pulled.path
    assert (pulled.path / "model.safetensors").read_bytes() == b"new"


def test_shards_are_those_of_the_index(hub: Hub) -> None:
    del hub.files["model.safetensors"]
    shards = {"model-00001-of-00002.safetensors": b"one", "model-00002-of-00002.safetensors": b"two"}
    hub.files |= shards | {"model.safetensors.index.json": index(*shards)}
    assert set(pull(REPO).files) == {"config.json", "tokenizer.json", "model.safetensors.index.json", *shards}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (index("model-1.safetensors", "../../etc/passwd"), "names 2 files that are not there"),
        (b"[]", "is not an index of weights"),
        (b"{", "is not an index of weights"),
        (b'{"weight_map": 3}', "is not an index of weights"),
        (b"[" * 100_000, "is not an index of weights"),
    ],
)
def test_a_broken_index(hub: Hub, content: bytes, message: str) -> None:
    hub.files["model.safetensors.index.json"] = content
    with pytest.raises(CheckpointError, match=message):
        pull(REPO)


def test_a_listing_that_leaves_its_folder(hub: Hub) -> None:
    hub.files["../evil.json"] = b"{}"
    with pytest.raises(CheckpointError, match="outside its own folder"):
        pull(REPO)


def test_one_gguf_when_asked_for(hub: Hub) -> None:
    hub.files |= {"tiny-Q8_0.gguf": b"eight bits", "tiny-Q4_0.gguf": b"four bits"}
    pulled = pull(f"{REPO}:tiny-Q8_0.gguf")
    assert pulled.path.read_bytes() == b"eight bits" and hub.fetched() == {"tiny-Q8_0.gguf"}
    assert pulled.sha256 == hashlib.sha256(b"eight bits").hexdigest()
    assert resolve(f"{REPO}:tiny-Q8_0.gguf") == pulled.path
    with pytest.raises(CheckpointError, match="it has tiny-Q4_0.gguf, tiny-Q8_0.gguf"):
        pull(f"{REPO}:nope.gguf")
    hub.files = {name: data for name, data in hub.files.items() if name.endswith(".gguf")}
    hub.commit = "e" * 40
    with pytest.raises(CheckpointError, match=f"Name one of them: {REPO}:tiny-Q4_0.gguf"):
        pull(REPO)


def test_pickles_are_never_loaded(hub: Hub) -> None:
    hub.files = {"pytorch_model.bin": b"pickle", "config.json": b"{}"}
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model.bin\)"):
        pull(REPO)
    assert hub.fetched() == set()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_flipped_bit_is_found_and_not_kept(hub: Hub, name: str) -> None:
    data = bytearray(hub.files[name])
    data[len(data) // 2] ^= 1
    hub.damaged[name] = bytes(data)
    with pytest.raises(CheckpointError, match=f"{name} came damaged"):
        pull(REPO)
    with pytest.raises(CheckpointError, match="not on this machine yet"):
        resolve(REPO, download=False)
    hub.damaged.clear()
    assert pull(REPO).status == "downloaded"
    assert (resolve(REPO) / name).read_bytes() == hub.files[name]


def test_a_short_answer_is_an_error_and_the_next_pull_mends_it(hub: Hub) -> None:
    hub.damaged["model.safetensors"] = WEIGHTS[:1000]
    with pytest.raises(CheckpointError):
        pull(REPO)
    hub.damaged.clear()
    assert (pull(REPO).path / "model.safetensors").read_bytes() == WEIGHTS


def test_damage_on_the_disk(hub: Hub) -> None:
    weights = pull(REPO).path / "model.safetensors"
    blob = weights.resolve()
    blob.write_bytes(WEIGHTS[:-1] + b"\1")
    assert pull(REPO).status == "already there"  # the quick look sees sizes only
    assert pull(REPO, verify=True).status == "downloaded"
    assert weights.read_bytes() == WEIGHTS
    weights.resolve().write_bytes(WEIGHTS[:-1])
    with pytest.raises(CheckpointError, match="not on this machine yet"):
        resolve(REPO, download=False)


def test_force_downloads_again(hub: Hub) -> None:
    pull(REPO)
    hub.asked.clear()
    assert pull(REPO, force=True).status == "downloaded"
    assert "model.safetensors" in hub.fetched()
    hub.gated = True
    with pytest.raises(CheckpointError, match="is gated"):
        pull(REPO, force=True)
    assert (resolve(REPO, download=False) / "model.safetensors").read_bytes() == WEIGHTS


def test_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE forbids"):
        pull(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = pull(REPO).path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert pull(REPO).path == folder and pull(REPO, verify=True).verified
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        pull(REPO, force=True)
    hub_module._record_path(hub_module.HubModel(REPO)).unlink()  # as if another program had fetched it
    left = pull(f"{REPO}@{COMMIT}")
    assert left.path == folder and not left.verified
    (folder / "model.safetensors").resolve().write_bytes(b"")
    assert hub.asked == []


def test_gated(hub: Hub) -> None:
    hub.gated = True
    with pytest.raises(CheckpointError, match=f"is gated. Ask for access at {hub.url}/{REPO}"):
        pull(REPO)


def test_no_such_model_or_revision(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="neither a folder here nor a model that the Hub shows you"):
        pull("acme/missing")
    with pytest.raises(CheckpointError, match="has no revision 'v9'"):
        pull(REPO, revision="v9")
    with pytest.raises(CheckpointError, match="names one revision"):
        pull(f"{REPO}@v1", revision="v9")


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="no answer from http://127.0.0.1:9"):
        pull(REPO)


def test_a_damaged_record_is_no_record(hub: Hub) -> None:
    pull(REPO)
    record = hub_module._record_path(hub_module.HubModel(REPO))
    for content in (
        "",
        "[]",
        "{}",
        '{"commit": 1, "folder": "/", "files": {"a": 3}}',
        '{"commit":"","folder":"/","files":{}}',
    ):
        record.write_text(content)
        with pytest.raises(CheckpointError, match="not on this machine yet"):
            resolve(REPO, download=False)
    assert pull(REPO).status == "downloaded"
