"""safetensors folders: what is read equals what the safetensors library wrote, and every fault has its own error."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from slipstream.checkpoint.open import Checkpoint, open_checkpoint
from slipstream.errors import CheckpointError

CONFIG = {"model_type": "llama", "auto_map": {"AutoModel": "evil.Model"}}


def pack(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(begin: int = 0, end: int = 24, shape: Any = (2, 3), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(CONFIG))
    return made


@pytest.fixture
def sharded(folder: Path) -> Path:
    for i, name in enumerate(("a", "b"), 1):
        save_file({name: torch.full((2, 3), float(i))}, folder / f"model-{i:05}-of-00002.safetensors")
    write_index(folder, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_every_dtype_reads_as_the_library_wrote_it(folder: Path) -> None:
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    dtypes += [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu]
    dtypes += [torch.uint16, torch.uint32, torch.uint64]
    torch.manual_seed(0)
    wrote = {str(d): (torch.rand(5, 7) * 100).to(d) for d in dtypes} | {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
    }
    save_file(wrote, folder / "model.safetensors", metadata={"format": "pt"})
    opened = open_checkpoint(folder)
    assert opened.kind == "safetensors" and opened.config == CONFIG and opened.generation_config == {}
    assert opened.tensors.keys() == wrote.keys()
    assert opened.total_bytes == sum(t.nbytes for t in wrote.values())
    for name, value in wrote.items():
        read = opened.read(name)
        assert read.dtype == value.dtype and read.shape == value.shape
        assert bytes(read.reshape(-1).view(torch.uint8)) == bytes(value.reshape(-1).view(torch.uint8)), name
    half = opened.dequantize("torch.float32", torch.bfloat16)
    assert torch.equal(half, wrote["torch.float32"].bfloat16())


def test_shards_and_generation_config(sharded: Path) -> None:
    (sharded / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    (sharded / "consolidated.safetensors").write_bytes(b"another spelling of the same model, as mistralai publishes")
    opened = open_checkpoint(sharded)
    assert [opened.read(n)[0, 0].item() for n in ("a", "b")] == [1.0, 2.0]
    assert opened.generation_config == {"eos_token_id": [2, 5]}


def test_a_single_file_may_have_any_name(folder: Path) -> None:
    save_file({"a": torch.ones(2)}, folder / "tiny.safetensors")
    assert open_checkpoint(folder).read("a").tolist() == [1.0, 1.0]


HEADER_FAULTS: list[tuple[str, bytes, str]] = [
    ("empty file", b"", "truncated"),
    ("short length", b"\1\0\0", "truncated"),
    ("header past the end", pack({"a": entry()}, bytes(24), length=10_000), "truncated"),
    ("length of 2**64 - 1", b"\xff" * 8 + bytes(99), "truncated"),
    ("not an object", pack(b"[1, 2]  "), "not a safetensors file"),
    ("pickle", b"\x80\x02}q\x00." * 9, "truncated"),
    ("truncated JSON", pack(b'{"a": '), "not valid JSON"),
    ("not UTF-8", pack(b'{"\xff\xfe": 1}'), "not valid JSON"),
    ("same tensor twice", pack(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}'), "twice"),
    ("field twice", pack(b'{"a":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}'), "twice"),
    ("NaN", pack(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}'), "NaN"),
    ("number of 5000 digits", pack(b'{"a":' + b"9" * 5000 + b"}"), "not valid JSON"),
    ("nested 40 deep", pack(b'{"a":' * 40 + b"1" + b"}" * 40), "nothing else"),
    ("nested 40 deep as dtype", pack({"a": entry(dtype=json.loads("[" * 40 + "]" * 40))}), "no string"),
    ("6,000,000 values", pack(b'{"a":[' + b"1," * 6_000_000 + b"1]}"), "far more values"),
    ("nested 100000 deep", pack(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "not valid JSON"),
    ("overlap", pack({"a": entry(), "b": entry(12, 36)}, bytes(36)), "overlaps"),
    ("same range twice", pack({"a": entry(), "b": entry()}, bytes(24)), "overlaps"),
    ("gap", pack({"a": entry(), "b": entry(32, 56)}, bytes(56)), "gap"),
    ("gap at the start", pack({"a": entry(8, 32)}, bytes(32)), "gap"),
    ("data cut short", pack({"a": entry()}, bytes(20)), "truncated"),
    ("data left over", pack({"a": entry()}, bytes(25)), "belong to no tensor"),
    ("no tensors but data", pack({}, bytes(4)), "belong to no tensor"),
    ("unknown dtype", pack({"a": entry(dtype="F33")}, bytes(24)), "dtype 'F33'; known"),
    ("dtype a list", pack({"a": entry(dtype=["F32"])}, bytes(24)), "dtype"),
    ("wrong dtype for the bytes", pack({"a": entry(dtype="F16")}, bytes(24)), "needs 12 bytes"),
    ("begin after end", pack({"a": entry(24, 0)}, bytes(24)), "needs 24 bytes"),
    ("negative dimension", pack({"a": entry(shape=[-2, -3])}, bytes(24)), "shape"),
    ("float dimension", pack({"a": entry(shape=[2.0, 3])}, bytes(24)), "shape"),
    ("bool dimension", pack({"a": entry(0, 12, [True, 3])}, bytes(12)), "shape"),
    ("dimension of 2**64", pack({"a": entry(0, 0, [2**64, 0])}), "shape"),
    ("product wraps to 0", pack({"a": entry(0, 0, [2**62, 4])}), "needs"),
    ("nine dimensions", pack({"a": entry(0, 4, [1] * 9)}, bytes(4)), "shape"),
    ("shape a string", pack({"a": entry(shape="23")}, bytes(24)), "shape"),
    ("negative offset", pack({"a": entry(-24, 0)}, bytes(24)), "data_offsets"),
    ("three offsets", pack({"a": {**entry(), "data_offsets": [0, 24, 24]}}, bytes(24)), "data_offsets"),
    ("unknown field", pack({"a": {**entry(), "strides": [3, 1]}}, bytes(24)), "nothing else"),
    ("field missing", pack({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "nothing else"),
    ("entry a number", pack({"a": 3}), "nothing else"),
    ("metadata not strings", pack({"__metadata__": {"a": 1}}), "__metadata__"),
    ("metadata with half a surrogate pair", pack(b'{"__metadata__":{"a":"\\ud800"}}'), "__metadata__"),
    ("metadata a list", pack({"__metadata__": []}), "__metadata__"),
    ("empty name", pack({"": entry()}, bytes(24)), "cannot be the name"),
    ("control character in a name", pack({"a\x1b[2J": entry()}, bytes(24)), "cannot be the name"),
    ("half a surrogate pair in a name", pack(b'{"\\ud800":' + json.dumps(entry()).encode() + b"}", bytes(24)), "name"),
]


@pytest.mark.parametrize(("file", "message"), [f[1:] for f in HEADER_FAULTS], ids=[f[0] for f in HEADER_FAULTS])
def test_header_faults(folder: Path, file: bytes, message: str) -> None:
    (folder / "model.safetensors").write_bytes(file)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_a_header_of_100_mb_is_refused_before_it_is_read(folder: Path) -> None:
    length = 100 << 20
    with (folder / "model.safetensors").open("wb") as f:
        f.write(length.to_bytes(8, "little") + b'{"a":')
        f.truncate(8 + length)  # sparse
    start = time.process_time()
    with pytest.raises(CheckpointError, match="104,857,600 bytes"):
        open_checkpoint(folder)
    assert time.process_time() - start < 0.1


def test_more_tensors_than_any_model_has(folder: Path) -> None:
    empty = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    many = b"{" + b",".join(b'"%d":%s' % (i, empty) for i in range(200_200)) + b"}"
    (folder / "model.safetensors").write_bytes(pack(many))
    with pytest.raises(CheckpointError, match="200,000 tensors"):
        open_checkpoint(folder)


def change_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        write_index(folder, change(weight_map))

    return apply


def _link_out(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / "model-00002-of-00002.safetensors").rename(outside)
    (folder / "model-00002-of-00002.safetensors").symlink_to(outside)


FIRST = "model-00001-of-00002.safetensors"
FOLDER_FAULTS: list[tuple[str, Callable[[Path], Any], str]] = [
    (
        "parent folder",
        change_index(lambda m: m | {"b": "../model/model-00002-of-00002.safetensors"}),
        "plain file name",
    ),
    ("absolute path", change_index(lambda m: m | {"b": "/etc/x.safetensors"}), "plain file name"),
    ("backslash", change_index(lambda m: m | {"b": "..\\x.safetensors"}), "plain file name"),
    ("NUL", change_index(lambda m: m | {"b": "x\0.safetensors"}), "plain file name"),
    ("subfolder", change_index(lambda m: m | {"b": "sub/x.safetensors"}), "plain file name"),
    ("file not a string", change_index(lambda m: m | {"b": 7}), "must be in a .safetensors file"),
    ("pickle", change_index(lambda m: m | {"b": "pytorch_model.bin"}), "must be in a .safetensors file"),
    ("file missing", change_index(lambda m: m | {"b": FIRST, "c": "other.safetensors"}), "is missing"),
    ("tensor missing", change_index(lambda m: m | {"c": FIRST}), "lacks 'c'"),
    ("tensor surplus", change_index(lambda m: {"b": m["b"], "c": m["a"]}), "holds 'a'"),
    ("tensor in the other file", change_index(lambda m: {"a": m["b"], "b": m["a"]}), "holds '[ab]'"),
    ("a whole shard not named", change_index(lambda m: {"a": m["a"]}), "two saves are mixed"),
    ("no weight_map", lambda f: (f / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
    ("weight_map a list", change_index(lambda m: list(m)), "no weight_map"),
    ("weight_map empty", change_index(lambda m: {}), "no weight_map"),
    ("shard gone", lambda f: (f / FIRST).unlink(), "is missing"),
    ("shard links out", _link_out, "link that leaves"),
    ("index gone", lambda f: (f / "model.safetensors.index.json").unlink(), "but no model.safetensors.index.json"),
    ("old single file beside shards", lambda f: (f / "model.safetensors").write_bytes(b""), "two saves are mixed"),
    ("config gone", lambda f: (f / "config.json").unlink(), "no config.json"),
    ("config a list", lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    ("config key twice", lambda f: (f / "config.json").write_text('{"a": 1, "a": 2}'), "twice"),
    ("config nested", lambda f: (f / "config.json").write_text('{"a":' * 40 + "1" + "}" * 40), "deeper"),
    ("config too large", lambda f: (f / "config.json").write_text('{"a": "' + "x" * (17 << 20) + '"}'), "bytes"),
    (
        "config links out",
        lambda f: [(f / "config.json").unlink(), (f / "config.json").symlink_to("/etc/passwd")],
        "link",
    ),
    ("generation config broken", lambda f: (f / "generation_config.json").write_text("{"), "not valid JSON"),
]


@pytest.mark.parametrize(("spoil", "message"), [f[1:] for f in FOLDER_FAULTS], ids=[f[0] for f in FOLDER_FAULTS])
def test_folder_faults(sharded: Path, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(sharded)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(sharded)


def test_two_single_files_are_ambiguous(folder: Path) -> None:
    for name in "ab":
        save_file({name: torch.ones(2)}, folder / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="2 safetensors files"):
        open_checkpoint(folder)


def hub_cache(root: Path) -> tuple[Path, Path]:
    """models--x/snapshots/<rev>/... of links into models--x/blobs, as huggingface_hub lays it out."""
    blobs, snapshot = root / "models--x" / "blobs", root / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / ("c" * 40)).write_text(json.dumps(CONFIG))
    save_file({"a": torch.ones(2)}, blobs / ("d" * 64))
    (snapshot / "config.json").symlink_to("../../blobs/" + "c" * 40)
    (snapshot / "model.safetensors").symlink_to("../../blobs/" + "d" * 64)
    return blobs, snapshot


def test_the_hub_cache_may_link_to_its_own_blobs(tmp_path: Path) -> None:
    _, snapshot = hub_cache(tmp_path)
    assert open_checkpoint(snapshot).read("a").tolist() == [1.0, 1.0]


@pytest.mark.parametrize("target", ["blobs/not-a-hash", "refs/dddddddddddddddddddddddddddddddddddddddd", "../secret"])
def test_the_hub_cache_may_link_nowhere_else(tmp_path: Path, target: str) -> None:
    blobs, snapshot = hub_cache(tmp_path)
    outside = snapshot / "../.." / target
    outside.parent.mkdir(exist_ok=True)
    (blobs / ("d" * 64)).rename(outside)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../" + target)
    with pytest.raises(CheckpointError, match="link that leaves"):
        open_checkpoint(snapshot)


def test_a_blob_that_is_a_link_itself_is_followed_to_its_end(tmp_path: Path) -> None:
    blobs, snapshot = hub_cache(tmp_path)
    (blobs / ("d" * 64)).rename(tmp_path / "secret")
    (blobs / ("d" * 64)).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="link that leaves"):
        open_checkpoint(snapshot)


def test_pickles_are_named_and_never_opened(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, file):
        with pytest.raises(CheckpointError, match=r"pickle.*never opens.*safetensors"):
            open_checkpoint(path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="neither safetensors nor GGUF"):
        open_checkpoint(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CheckpointError, match="cannot be read|no such file"):
        open_checkpoint(tmp_path / "loop")


def opened(folder: Path) -> Checkpoint:
    save_file({"a": torch.ones(4, 8)}, folder / "model.safetensors")
    return open_checkpoint(folder)


def test_wrong_reads(folder: Path) -> None:
    checkpoint = opened(folder)
    with pytest.raises(CheckpointError, match="no tensor b"):
        checkpoint.read("b")


def test_a_file_cut_after_opening(folder: Path) -> None:
    checkpoint = opened(folder)
    with (folder / "model.safetensors").open("r+b") as f:
        f.truncate(checkpoint.tensors["a"].offset + 100)
    with pytest.raises(CheckpointError, match="cut short"):
        checkpoint.read("a")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read("a")
