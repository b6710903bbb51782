"""Files that we write: opened by the safetensors library and by our own reader, the same bytes every time; manifests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from slipstream.checkpoint.manifest import NAME, check_sizes, read_manifest, verify
from slipstream.checkpoint.safetensors import read_folder, read_header
from slipstream.checkpoint.save import Entry, file_bytes, header, layout, shard_names, write_index, write_shard
from slipstream.checkpoint.tensors import DENSE, read_dense
from slipstream.errors import CheckpointError

DTYPES = {"I64": torch.int64, "I32": torch.int32, "F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8}


def tensor(entry: Entry, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (entry.nbytes,), dtype=torch.uint8, generator=draw)
    return raw.view(DTYPES[entry.dtype]).view(entry.shape)


def raw(t: torch.Tensor) -> memoryview:
    return memoryview(t.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


SIZES = st.lists(st.integers(0, 7), max_size=3).map(tuple)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), SIZES), min_size=1, max_size=9), st.randoms())
def test_any_tensors_in_any_order(tmp_path_factory: pytest.TempPathFactory, kinds: list, random: object) -> None:
    entries = [Entry(f"t{i}.weight", dtype, shape) for i, (dtype, shape) in enumerate(kinds)]
    tensors = {e.name: tensor(e, i) for i, e in enumerate(entries)}
    order = list(tensors)
    random.shuffle(order)  # type: ignore[attr-defined]
    pieces = [(n, part) for n in order for part in (raw(tensors[n])[:3], raw(tensors[n])[3:])]
    path = tmp_path_factory.mktemp("save") / "model.safetensors"
    digest = write_shard(path, entries, pieces)
    written = path.read_bytes()
    assert digest == hashlib.sha256(written).hexdigest()
    assert len(written) == file_bytes(entries)
    assert write_shard(path, entries, [(n, raw(t)) for n, t in tensors.items()]) == digest
    infos = read_header(path)
    with safe_open(path, "pt") as theirs:
        assert set(theirs.keys()) == set(tensors) == set(infos)
        for e in entries:
            assert infos[e.name].offset % DENSE[e.dtype][0] == 0
            for read in (theirs.get_tensor(e.name), read_dense(infos[e.name])):
                assert read.dtype == DTYPES[e.dtype] and read.shape == e.shape
                assert bytes(raw(read)) == bytes(raw(tensors[e.name]))


def test_even_sizes_keep_their_order_and_stand_at_multiples_of_8() -> None:
    entries = [
        Entry("a", "U8", (3, 32)),
        Entry("odd", "BF16", (5,)),
        Entry("b", "BF16", (12,)),
        Entry("c", "I64", (2,)),
    ]
    assert [e.name for e in layout(entries)] == ["a", "b", "c", "odd"]
    assert len(header(layout(entries))) % 8 == 0


def test_pieces_that_do_not_make_the_tensors_are_our_own_bug(tmp_path: Path) -> None:
    entries = [Entry("a", "U8", (16,)), Entry("b", "U8", (8,))]
    for pieces in ([("a", b"x" * 16)], [("a", b"x" * 9), ("b", b"y" * 8)], [("a", b"x" * 17), ("b", b"y" * 8)]):
        with pytest.raises(AssertionError):
            write_shard(tmp_path / "x", entries, pieces)


def write_two(folder: Path) -> list[str]:
    names = shard_names(2)
    shards = {n: [Entry(f"{i}.weight", "F32", (5, 3 + i))] for i, n in enumerate(names)}
    listed = {}
    for i, (name, entries) in enumerate(shards.items()):
        digest = write_shard(folder / name, entries, [(entries[0].name, raw(tensor(entries[0], i)))])
        listed[name] = {"bytes": (folder / name).stat().st_size, "sha256": digest}
    write_index(folder, shards)
    (folder / NAME).write_text(json.dumps({"version": 1, "shards": listed}))
    return names


def test_an_index_for_several(tmp_path: Path) -> None:
    names = write_two(tmp_path)
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert {n: t.file.name for n, t in read_folder(tmp_path).items()} == {"0.weight": names[0], "1.weight": names[1]}
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == 4 * 35
    check_sizes(tmp_path, names)
    verify(tmp_path)


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    names = write_two(tmp_path)
    whole = (tmp_path / names[1]).read_bytes()
    for at in (9, len(whole) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[at] ^= 16
        (tmp_path / names[1]).write_bytes(damaged)
        check_sizes(tmp_path, names)
        with pytest.raises(CheckpointError, match=f"{names[1]}: is damaged"):
            verify(tmp_path)
    (tmp_path / names[1]).write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=f"{names[1]}: has {len(whole) - 1:,} bytes"):
        check_sizes(tmp_path, names)


def test_a_folder_without_a_manifest_is_not_checked(tmp_path: Path) -> None:
    names = write_two(tmp_path)
    (tmp_path / NAME).unlink()
    assert read_manifest(tmp_path) is None
    check_sizes(tmp_path, names)
    verify(tmp_path)


GOOD = {"bytes": 3, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "JSON object"),
        ("{", "not valid JSON"),
        ({"version": 2, "shards": {"a.safetensors": GOOD}}, "version '2'"),
        ({"version": 1}, "no list of shards"),
        ({"version": 1, "shards": {}}, "no list of shards"),
        ({"version": 1, "shards": {"../a.safetensors": GOOD}}, "is not the name"),
        ({"version": 1, "shards": {"/etc/a.safetensors": GOOD}}, "is not the name"),
        ({"version": 1, "shards": {"config.json": GOOD}}, "is not the name"),
        ({"version": 1, "shards": {"a.safetensors": 3}}, "bytes and sha256"),
        ({"version": 1, "shards": {"a.safetensors": GOOD | {"bytes": True}}}, "bytes and sha256"),
        ({"version": 1, "shards": {"a.safetensors": GOOD | {"sha256": "0" * 63}}}, "bytes and sha256"),
    ],
)
def test_a_damaged_manifest(tmp_path: Path, content: object, said: str) -> None:
    (tmp_path / NAME).write_text(content if isinstance(content, str) else json.dumps(content))
    for check in (verify, lambda folder: check_sizes(folder, [])):
        with pytest.raises(CheckpointError, match=said):
            check(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda shards, names: shards.pop(names[0]), "does not list model-00001"),
        (lambda shards, names: shards.update({"b.safetensors": GOOD}), "lists b.safetensors"),
    ],
)
def test_a_manifest_of_other_shards(tmp_path: Path, change: Callable[..., None], said: str) -> None:
    names = write_two(tmp_path)
    content = json.loads((tmp_path / NAME).read_text())
    change(content["shards"], names)
    (tmp_path / NAME).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=said):
        check_sizes(tmp_path, names)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    names = write_two(tmp_path / "in")
    (tmp_path / "in" / names[0]).rename(tmp_path / "outside")
    (tmp_path / "in" / names[0]).symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="leaves the folder"):
        verify(tmp_path / "in")
