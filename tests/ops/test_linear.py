"""Linear layers: every implementation and format against a product in float64 of the numbers that the weight stands for."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slipstream.errors import KernelError
from slipstream.ops import linear, native
from slipstream.ops.choose import Case, choose
from slipstream.ops.formats import Weight, decode, encode
from slipstream.ops.formats.blocks import BLOCKS
from slipstream.ops.linear import blocks, int8, unpacked
from tests.checkpoint.blocks import super_blocks

IMPLS = {impl.name: impl for impl in linear.IMPLS}
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {
    F32: 2e-6,
    BF16: 6e-3,
    F16: 8e-4,
}  # of the norm: sums in float32; results and scales rounded to 8 or 11 bits
IN_C = ("mxfp4", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
SUPER = ("Q4_K", "Q5_K", "Q6_K")
MADE = ("mxfp4", "int8", "int4-32", "int4-64", "int4-128")  # int4 with its group
RUNS = (
    *(("blocks", format, dtype) for format in IN_C for dtype in (F32, BF16)),
    *(("int4pack", format, BF16) for format in ("int4-32", "int4-64", "int4-128", "Q4_0", "Q4_1", "Q8_0")),
    ("int8pack", "int8", BF16),
    *(("unpacked", format, dtype) for format in MADE for dtype in (F32, BF16, F16)),
    *(("reference", format, dtype) for format in ("dense", *MADE, *IN_C[1:], "IQ4_XS") for dtype in (F32, BF16)),
    ("torch", "dense", F32),
    ("torch", "dense", BF16),
    ("onednn", "dense", BF16),
)


def _case(dtype: torch.dtype, format: str, out: int = 192, width: int = 256, **facts: Any) -> Case:
    facts = {"format": format.partition("-")[0], "in_features": width, "out_features": out, **facts}
    return Case("cpu", str(dtype).removeprefix("torch."), None, facts)


def _load(name: str, case: Case) -> Any:
    why = IMPLS[name].reject(case)
    if why is not None:  # no compiler, or a processor without bfloat16
        pytest.skip(f"{name}: {why}")
    return IMPLS[name].load()


def _weight(format: str, out: int, width: int, seed: int = 0) -> Weight:
    values = np.random.default_rng(seed).normal(size=(out, width)).astype(np.float32)
    if format == "dense":
        return Weight(format, torch.from_numpy(values), (out, width))
    if format in MADE:
        name, _, group = format.partition("-")
        return encode(torch.from_numpy(values), name, int(group or 0))
    if BLOCKS.get(format, (0, 0))[1] == 256:  # which the gguf library only decodes
        return Weight(format, torch.from_numpy(super_blocks(format, out, width, seed)), (out, width))
    gguf = pytest.importorskip("gguf")
    data = gguf.quantize(values, gguf.GGMLQuantizationType[format])
    return Weight(format, torch.from_numpy(data.copy()), (out, width))


def _numbers(weight: Weight, dtype: torch.dtype) -> Tensor:
    if weight.format == "dense":
        return weight.data.to(dtype).double()
    if weight.scales is None:
        gguf = pytest.importorskip("gguf")
        values = gguf.dequantize(weight.data.numpy(), gguf.GGMLQuantizationType[weight.format])
        return torch.from_numpy(values.copy()).double()
    return decode(weight, torch.float64)


def _check(kernel: Any, weight: Weight, dtype: torch.dtype, tokens: int, bias: bool) -> None:
    torch.manual_seed(tokens)
    out, width = weight.shape
    x, b = torch.randn(tokens, width).to(dtype), torch.randn(out).to(dtype)
    packed = kernel.prepare(weight, dtype)
    assert all(isinstance(part, Tensor) for part in packed)
    got = kernel(x, packed, b if bias else None)
    want = x.double() @ _numbers(weight, dtype).T + (b.double() if bias else 0)
    assert got.dtype == dtype and got.shape == (tokens, out)
    assert (got.double() - want).norm() < TOLERANCE[dtype] * want.norm()
    worst = (got.double() - want).abs().max() / want.abs().max()  # one wrong row must not hide in the norm
    assert worst < 4 * TOLERANCE[dtype]


@pytest.mark.parametrize(("tokens", "bias"), [(1, False), (2, True), (5, False), (17, True), (35, False)])
@pytest.mark.parametrize(("name", "format", "dtype"), RUNS)
def test_product(name: str, format: str, dtype: torch.dtype, tokens: int, bias: bool) -> None:
    _check(_load(name, _case(dtype, format)), _weight(format, 192, 256), dtype, tokens, bias)


@pytest.mark.parametrize("tokens", [1, 3, 7, 18])
@pytest.mark.parametrize(
    ("name", "format", "dtype"), [run for run in RUNS if run[0] in ("blocks", "int8pack", "unpacked")]
)
def test_odd_sizes_and_small_slices(
    name: str, format: str, dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (blocks, int8, unpacked):
        monkeypatch.setattr(module, "SLICE", 5 * 384)
    out, width = 67, {"int4-128": 384, "int4-64": 192, **dict.fromkeys(SUPER, 768)}.get(format, 96)
    _check(_load(name, _case(dtype, format, out, width)), _weight(format, out, width), dtype, tokens, True)


@pytest.mark.parametrize("width", [1, 33])
def test_int8_rows_may_have_any_size(width: int) -> None:
    assert choose("linear", linear.IMPLS, _case(BF16, "int8", 3, width)).name == "unpacked"
    _check(_load("unpacked", _case(BF16, "int8", 3, width)), _weight("int8", 3, width), BF16, 2, True)


@pytest.mark.parametrize(("name", "dtype"), [("blocks", F32), ("blocks", BF16), ("unpacked", F32)])
def test_every_code_and_every_scale_of_mxfp4_is_exact(name: str, dtype: torch.dtype) -> None:
    kernel = _load(name, _case(dtype, "mxfp4", 256, 32))
    codes = torch.arange(16, dtype=torch.uint8)
    data = (codes[::2] | codes[1::2] << 4).repeat(2).expand(256, 1, 16).contiguous()
    weight = Weight("mxfp4", data, (256, 32), torch.arange(256, dtype=torch.uint8)[:, None])
    packed = kernel.prepare(weight, dtype)
    want = decode(weight, dtype).T
    for x in torch.eye(32, dtype=dtype).split(8):  # NaN scales make NaN of zeros; infinite products none
        got = kernel(x, packed, None)
        if name == "unpacked":  # multiplies 0 by numbers that are infinite already
            want[:, 253:], got[:, 253:] = torch.nan, torch.nan
        torch.testing.assert_close(got, want[: len(x)], rtol=0, atol=0, equal_nan=True)
        want = want[len(x) :]


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize(("name", "format", "dtype"), [run for run in RUNS if run[1] not in ("dense", "IQ4_XS")])
def test_a_scale_that_is_no_number_is_seen_in_its_row_only(
    name: str, format: str, dtype: torch.dtype, tokens: int
) -> None:
    kernel, weight = _load(name, _case(dtype, format)), _weight(format, 192, 256)
    if weight.scales is None:
        at = 208 if format == "Q6_K" else 0
        weight.data[5].view(-1)[at : at + 2] = torch.tensor([0xFF, 0x7F])  # a float16 that is NaN
    else:
        weight.scales[5, -1] = 255 if format == "mxfp4" else torch.nan
    out = kernel(torch.randn(tokens, 256).to(dtype), kernel.prepare(weight, dtype), None)
    assert out[:, 5].isnan().all()
    assert out[:, :5].isfinite().all() and out[:, 6:].isfinite().all()


def _levels() -> list[str]:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        flags = ""
    needed = {"x86-64": (), "x86-64-v3": ("avx2", "f16c", "fma"), "x86-64-v4": ("avx512f", "avx512bw", "avx512vl")}
    return [level for level, names in needed.items() if all(f" {name} " in flags for name in names)]


@pytest.fixture(scope="module", params=_levels())
def older(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The C kernel as an older processor runs it."""
    return ctypes.CDLL(str(compiled("blocks", request.param, tmp_path_factory.mktemp("native"))))


def compiled(name: str, level: str, folder: Path, strict: bool = False) -> Path:
    compiler = shutil.which("cc")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs a C compiler, and x86-64 to leave instructions out of")
    source, made = Path(native.__file__).with_name(f"{name}.c"), folder / f"{name}.so"
    flags = (*native.FLAGS, *(native.STRICT if strict else native.FAST), "-Wall", "-Wextra", "-Werror")
    words = [f"-march={level}" if flag == "-march=native" else flag for flag in flags]
    done = subprocess.run([compiler, *words, str(source), "-o", str(made), "-lm"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return made


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("format", IN_C)
def test_c_on_an_older_processor(
    older: ctypes.CDLL, format: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slipstream.ops.native.build", lambda name, strict: older)
    for tokens in (1, 6, 17):
        _check(blocks.Blocks(), _weight(format, 67, 768 if format in SUPER else 96), dtype, tokens, True)


def test_halves_of_an_older_processor_are_those_of_numpy(older: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slipstream.ops.native.build", lambda name, strict: older)
    data = torch.zeros(1 << 16, 34, dtype=torch.uint8)
    every = np.arange(1 << 16, dtype=np.uint16)
    data[:, :2], data[:, 2] = torch.from_numpy(every.view(np.uint8).reshape(-1, 2).copy()), 1
    kernel = blocks.Blocks()
    got = kernel(torch.eye(32)[:1], kernel.prepare(Weight("Q8_0", data, (1 << 16, 32)), F32), None)
    want = torch.from_numpy(every.view(np.float16).astype(np.float32))
    finite = want.isfinite()
    assert torch.equal(got[0, finite], want[finite]) and not got[0, ~finite].isfinite().any()


@pytest.mark.parametrize("format", ["int4-32", "int4-64", "int4-128", "Q4_0", "Q4_1", "Q8_0"])
def test_held_bytes(format: str) -> None:
    kernel, weight = _load("int4pack", _case(BF16, format)), _weight(format, 192, 256)
    held = sum(part.nbytes for part in kernel.prepare(weight, BF16))
    assert kernel.held_bytes(weight.format, weight.shape, BF16, weight.nbytes) == held
    assert kernel.held_bytes(weight.format, (3, *weight.shape), BF16, 3 * weight.nbytes) == 3 * held


@pytest.mark.parametrize("name", ["blocks", "int8pack", "unpacked"])
def test_what_is_held_is_what_arrived(name: str) -> None:
    format = "int8" if name == "int8pack" else "mxfp4"
    weight = _weight(format, 192, 256)
    held = _load(name, _case(BF16, format)).prepare(weight, BF16)
    assert held[0].data_ptr() == weight.data.data_ptr()
    assert sum(part.nbytes for part in held) <= weight.nbytes + 16


@pytest.mark.parametrize("name", [name for name in IMPLS if name != "reference"])
def test_formats_and_dtypes_that_are_not_taken_are_refused_with_a_reason(name: str) -> None:
    assert IMPLS[name].reject(_case(BF16, "IQ4_XS"))
    if name in ("onednn", "int4pack", "int8pack"):
        format = {"onednn": "dense", "int4pack": "Q4_0", "int8pack": "int8"}[name]
        assert "float32" in str(IMPLS[name].reject(_case(F32, format)))


def test_shapes_that_are_not_taken_are_refused_with_a_reason() -> None:
    for name, format, out, width, words in (
        ("int4pack", "int4", 96, 64, "out_features in multiples of 64"),
        ("int4pack", "int4", 64, 48, "in_features in multiples of 32"),
        ("int8pack", "int8", 64, 48, "in_features in multiples of 32"),
    ):
        assert words in str(IMPLS[name].reject(_case(BF16, format, out, width)))


def test_without_a_compiler_others_take_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "build", lambda name, strict: "there is no C compiler (cc) on this machine")
    for format, dtype, name in (("mxfp4", BF16, "unpacked"), ("mxfp4", F32, "unpacked"), ("Q4_1", BF16, "int4pack")):
        choice = choose("linear", linear.IMPLS, _case(dtype, format))
        assert choice.name == name
        assert ("blocks", "there is no C compiler (cc) on this machine") in choice.rejected
    for format, dtype in (("Q4_1", F32), *((format, dtype) for format in SUPER for dtype in (F32, BF16))):
        with pytest.raises(KernelError, match="there is no C compiler"):
            choose("linear", linear.IMPLS, _case(dtype, format))
        assert choose("linear", linear.IMPLS, _case(dtype, format), force="reference").name == "reference"


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("format", SUPER)
def test_every_bit_of_a_super_block_is_where_the_gguf_library_reads_it(format: str, dtype: torch.dtype) -> None:
    """One product a number: x is one column of the unit matrix after another. In bfloat16 one rounding stands between."""
    kernel, weight = _load("blocks", _case(dtype, format)), _weight(format, 9, 512, 3)
    packed, want = kernel.prepare(weight, dtype), _numbers(weight, F32).T
    for step in (3, 64):  # the blocks, then unpacked
        got = torch.cat([kernel(x, packed, None) for x in torch.eye(512, dtype=dtype).split(step)])
        torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=1e-6 if dtype == F32 else 1e-3)


@pytest.mark.parametrize("format", ["IQ4_XS", "Q3_K"])
def test_the_reference_takes_packed_weights_only_if_it_is_forced(format: str) -> None:
    with pytest.raises(KernelError, match="decoded at every call, so it runs only if it is forced"):
        choose("linear", linear.IMPLS, _case(BF16, format))
    assert choose("linear", linear.IMPLS, _case(BF16, format), force="reference").name == "reference"
