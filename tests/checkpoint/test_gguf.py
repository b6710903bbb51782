"""GGUF headers and blocks against the gguf library, which wrote the files."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from slipstream.checkpoint.gguf import _TYPES, MAX_HEADER, read_gguf
from slipstream.checkpoint.open import open_checkpoint
from slipstream.checkpoint.tensors import read_dense, read_rows
from slipstream.errors import CheckpointError
from slipstream.ops.formats.blocks import BLOCKS, dequantize_rows

TENSORS = {"first": np.arange(6, dtype=np.float32).reshape(2, 3), "second": np.ones((3, 5, 4), np.float16)}


def write(path: Path, fill: Callable[[gguf.GGUFWriter], Any] = lambda w: None, alignment: int | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    fill(writer)
    for name, value in TENSORS.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_types_agree_with_the_library() -> None:
    for number, (name, size, nbytes) in _TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == name and gguf.GGML_QUANT_SIZES[kind] == (size, nbytes)


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_dequantized_bit_for_bit_as_the_library_does(kind: str) -> None:
    number, size, nbytes = BLOCKS[kind]
    rows = np.random.default_rng(number).integers(0, 256, (7, 6 * nbytes), dtype=np.uint8)  # all bit patterns
    ours = dequantize_rows(torch.from_numpy(rows), kind, torch.float32).numpy()
    with np.errstate(all="ignore"):
        theirs = gguf.dequantize(rows, gguf.GGMLQuantizationType[kind])
    assert ours.shape == theirs.shape == (7, 6 * size)
    np.testing.assert_array_equal(ours, theirs)
    half = dequantize_rows(torch.from_numpy(rows), kind, torch.bfloat16)
    torch.testing.assert_close(half, torch.from_numpy(theirs).bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_K"])
def test_many_rows_are_turned_in_chunks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randint(0, 100, (11, 2 * BLOCKS[kind][2]), dtype=torch.uint8)
    whole = dequantize_rows(rows, kind, torch.float32)
    monkeypatch.setattr("slipstream.ops.formats.blocks.CHUNK", 3 * whole.shape[1])
    torch.testing.assert_close(dequantize_rows(rows, kind, torch.float32), whole, rtol=0, atol=0, equal_nan=True)


def test_metadata_of_every_type(tmp_path: Path) -> None:
    kinds = gguf.GGUFValueType
    scalars = {
        "UINT8": 255, "INT8": -128, "UINT16": 65535, "INT16": -2, "UINT32": 2**32 - 1, "INT32": -3, "UINT64": 2**64 - 1,
        "INT64": -(2**63), "FLOAT32": 0.1, "FLOAT64": 0.1, "BOOL": True, "STRING": "né",
    }  # fmt: skip
    arrays = {"strings": ["a", "", "日本"], "ints": [1, -2, 3], "floats": [0.5, 2.0], "bools": [True, False]}

    def fill(w: gguf.GGUFWriter) -> None:
        for name, value in scalars.items():
            w.add_key_value(f"x.{name}", value, kinds[name])
        for name, values in arrays.items():
            w.add_array(f"x.{name}", values)

    found = read_gguf(write(tmp_path / "a.gguf", fill)).metadata
    want = scalars | {"FLOAT32": float(np.float32(0.1))}
    assert {k: found[f"x.{k}"] for k in want} == want
    assert {k: found[f"x.{k}"] for k in arrays} == arrays
    assert all(type(b) is bool for b in found["x.bools"]) and found["x.strings"] is found["x.strings"]
    assert found.get("absent") is None and len(found) == len(dict(found)) == len(want) + len(arrays) + 1


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_tensors_where_the_library_put_them(tmp_path: Path, alignment: int | None) -> None:
    found = read_gguf(write(tmp_path / "a.gguf", alignment=alignment)).tensors
    assert list(found) == list(TENSORS)
    for name, value in TENSORS.items():
        assert found[name].shape == value.shape and found[name].nbytes == value.nbytes
        np.testing.assert_array_equal(read_dense(found[name]).numpy(), value)


def test_version_2_is_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf")
    raw = bytearray(path.read_bytes())
    raw[4] = 2
    path.write_bytes(raw)
    assert list(read_gguf(path).tensors) == list(TENSORS)


def put(at: int, form: str, *values: Any) -> Callable[[bytearray], None]:
    return lambda raw: struct.pack_into(form, raw, at, *values)


def after(mark: bytes, skip: int, form: str, value: Any) -> Callable[[bytearray], None]:
    return lambda raw: struct.pack_into(form, raw, raw.index(mark) + len(mark) + skip, value)


# A tensor's entry: name, dims u32, sizes u64 each (innermost first), type u32, offset u64.
FAULTS: list[tuple[str, Callable[[bytearray], Any], str]] = [
    ("magic", put(0, "4s", b"GGML"), "does not start with GGUF"),
    ("version 1", put(4, "<I", 1), "version 1"),
    ("big endian", put(4, ">I", 3), "big-endian"),
    ("2**63 tensors", put(8, "<Q", 2**63), "claims"),
    ("2**64 - 1 keys", put(16, "<Q", 2**64 - 1), "claims"),
    ("one key more", put(16, "<Q", 100), "truncated|type|twice|name"),
    ("one tensor more", put(8, "<Q", 3), "name|dimensions|truncated"),
    ("key of 2**64 - 1 bytes", put(24, "<Q", 2**64 - 1), "truncated"),
    ("unknown value type", after(b"general.architecture", 0, "<I", 99), "unknown type 99"),
    ("string of 2**40 bytes", after(b"general.architecture", 4, "<Q", 2**40), "truncated"),
    ("not UTF-8", after(b"general.architecture", 12, "4s", b"\xff\xfe\xfd\xfc"), "UTF-8"),
    ("array of 2**60 values", after(b"x.strings", 8, "<Q", 2**60), "3,000,000"),
    ("array of 2,999,990 values", after(b"x.strings", 8, "<Q", 2_999_990), "truncated"),
    ("nested array", after(b"x.strings", 4, "<I", 9), "nested"),
    ("array string of 2**62 bytes", after(b"x.strings", 16, "<Q", 2**62), "truncated"),
    ("five dimensions", after(b"first", 0, "<I", 5), "5 dimensions"),
    ("no dimensions", after(b"first", 0, "<I", 0), "0 dimensions"),
    ("2**32 - 1 dimensions", after(b"first", 0, "<I", 2**32 - 1), "dimensions"),
    ("dimension of 2**61", after(b"first", 4, "<Q", 2**61), "gap|truncated|overlaps"),
    ("dimension of 0", after(b"first", 4, "<Q", 0), "does not divide"),
    ("type 4", after(b"first", 20, "<I", 4), "has the type 4"),
    ("blocks that do not divide", after(b"first", 20, "<I", 8), "does not divide"),
    ("offset not aligned", after(b"second", 32, "<Q", 33), "gap"),
    ("offset of the tensor before", after(b"second", 32, "<Q", 0), "overlaps"),
    ("offset of 2**63", after(b"second", 32, "<Q", 2**63), "gap"),
    ("same key twice", lambda raw: raw.__setitem__(slice(None), raw.replace(b"x.twice_b", b"x.twice_a")), "twice"),
    ("data cut", lambda raw: raw.__delitem__(slice(-40, None)), "truncated"),
    ("header cut", lambda raw: raw.__delitem__(slice(100, None)), "truncated"),
    ("20 bytes", lambda raw: raw.__delitem__(slice(20, None)), "too few"),
    ("empty", lambda raw: raw.clear(), "too few"),
]  # fmt: skip


def fill_for_faults(w: gguf.GGUFWriter) -> None:
    w.add_array("x.strings", ["one", "two"])
    w.add_uint32("x.twice_a", 1)
    w.add_uint32("x.twice_b", 2)


@pytest.mark.parametrize(("spoil", "message"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_faults(tmp_path: Path, spoil: Callable[[bytearray], Any], message: str) -> None:
    path = write(tmp_path / "a.gguf", fill_for_faults)
    raw = bytearray(path.read_bytes())
    spoil(raw)
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        read_gguf(path)


@pytest.mark.parametrize("value", [0, 3, 4, 33, 2**31])
def test_alignment_must_be_a_sane_power_of_two(tmp_path: Path, value: int) -> None:
    path = write(tmp_path / "a.gguf", lambda w: w.add_uint32("general.alignment", value))
    with pytest.raises(CheckpointError, match="alignment"):
        read_gguf(path)


def test_a_header_over_the_cap(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    key = b"x.padding"
    with path.open("wb") as f:
        f.write(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + struct.pack("<IQ", 8, MAX_HEADER))
        f.truncate(MAX_HEADER + 1000)  # sparse
    with pytest.raises(CheckpointError, match="header of over"):
        read_gguf(path)


def test_strings_that_are_not_utf8_fail_when_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", lambda w: w.add_array("x.strings", ["abcd", "two"]))
    path.write_bytes(path.read_bytes().replace(b"abcd", b"\xff\xff\xff\xff"))
    with pytest.raises(CheckpointError, match=r"x\.strings.*UTF-8"):
        read_gguf(path).metadata["x.strings"]


def test_splits_are_refused_by_name_and_by_content(tmp_path: Path) -> None:
    part = write(tmp_path / "m-00001-of-00003.gguf")
    with pytest.raises(CheckpointError, match="llama-gguf-split --merge"):
        open_checkpoint(part)
    write(tmp_path / "m-00002-of-00003.gguf")
    with pytest.raises(CheckpointError, match="llama-gguf-split --merge"):
        open_checkpoint(tmp_path)
    part.rename(tmp_path / "renamed.gguf")
    inside = write(tmp_path / "b.gguf", lambda w: w.add_uint16("split.count", 3))
    with pytest.raises(CheckpointError, match="llama-gguf-split --merge"):
        open_checkpoint(inside)


def test_folder_with_two_files(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        write(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"2 GGUF files; name one"):
        open_checkpoint(tmp_path)


def test_rows_of_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(4, 3, 64)).astype(np.float32)
    packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q4_0)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("q", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    info = read_gguf(tmp_path / "a.gguf").tensors["q"]
    assert (info.dtype, info.shape) == ("Q4_0", (4, 3, 64))
    np.testing.assert_array_equal(read_rows(info).numpy(), packed.reshape(12, 36))


def test_opening_imports_neither_torch_nor_gguf(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from slipstream.checkpoint.gguf import read_gguf;"
        "import slipstream.checkpoint.open; read_gguf(Path(sys.argv[1]));"
        "print(sorted({'torch', 'gguf', 'numpy'} & set(sys.modules)))"
    )
    path = write(tmp_path / "a.gguf")
    out = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
