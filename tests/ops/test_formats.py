"""How weights are held, against float64 oracles written here and against what other libraries make of the bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from slipstream.ops import formats
from slipstream.ops.formats import GROUPS, Weight, blocks, integers, mxfp4

INF = float("inf")
TINY = 2.0**-149  # the smallest float32
HUGE = torch.finfo(torch.float32).max
# OCP MX specification 1.0, table 5: sign, exponent (bias 1), mantissa
E2M1 = np.array([m / 2 if e == 0 else 2.0 ** (e - 1) * (1 + m / 2) for e in range(4) for m in range(2)])


def oracle_decode(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Codes (..., 32) and E8M0 bytes (...) to float64, by table 5 and section 5.4.1 of the specification."""
    values = np.where(codes & 8, -1.0, 1.0) * E2M1[codes & 7]
    return np.where(scales == 255, np.nan, np.ldexp(1.0, scales.astype(int) - 127))[..., None] * values


def oracle_encode(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float64 blocks (n, 32) to codes and scale bytes: the nearest of the eight values, by distance, ties to the even code."""
    size = np.abs(x)
    broken = ~np.isfinite(size).all(1)
    largest = np.where(broken, 0, size.max(1))
    exponent = np.floor(np.log2(largest, where=largest > 0, out=np.full(len(x), -1000.0)))
    # log2 may round up to the next whole number: the definition decides
    exponent -= np.ldexp(1.0, exponent.astype(int)) > np.where(largest > 0, largest, INF)
    scales = np.clip(exponent - 2 + 127, 0, 254).astype(int)
    ratio = np.where(broken[:, None], 0, np.ldexp(size, 127 - scales[:, None]))
    best, codes = np.full(x.shape, INF), np.zeros(x.shape, np.uint8)
    for code in (0, 2, 4, 6, 1, 3, 5, 7):  # even ones first: what is no nearer does not replace them
        distance = np.abs(ratio - E2M1[code])
        nearer = distance < best
        best[nearer], codes[nearer] = distance[nearer], code
    codes += np.signbit(x).astype(np.uint8) * 8
    return np.where(broken[:, None], 0, codes), np.where(broken, 255, scales)


def blocks_of_edges() -> np.ndarray:
    """Blocks whose largest value is a power of two or just beside it, with every midpoint of the codes and its neighbours."""
    middles = (E2M1[1:] + E2M1[:-1]) / 2
    marks = np.concatenate([E2M1, middles, [5.0, 7.0, 7.9999995]]).astype(np.float32)
    marks = np.concatenate([marks, np.nextafter(marks, np.float32(9)), np.nextafter(marks, np.float32(0))])
    found = []
    for exponent in (-149, -148, -140, -127, -126, -125, -124, -100, -3, -1, 0, 1, 60, 124, 125):
        for top in (4.0, 6.0, 7.9999995):
            for part in np.array_split(marks, 2):
                block = np.resize(np.concatenate([[top], part]), 32)
                with np.errstate(over="ignore", under="ignore"):
                    found += [np.ldexp(block, exponent), -np.ldexp(block, exponent)]
    special = [
        0.0,
        -0.0,
        TINY,
        -TINY,
        2 * TINY,
        3 * TINY,
        2.0**-126,
        2.0**-127,
        2.0**-128,
        HUGE,
        -HUGE,
        1.0,
        math.nan,
        INF,
        -INF,
    ]
    found += [np.full(32, v) for v in special]
    found += [np.resize([v, w], 32) for v in special for w in special]
    found += [np.resize([v, *[w] * 31], 32) for v in special for w in special]
    with np.errstate(over="ignore"):
        return np.array(found, np.float32).astype(np.float64)


def random_blocks(count: int, seed: int) -> Iterator[np.ndarray]:
    """Float32 numbers of every kind of size, a few thousand blocks at a time."""
    rng, step = np.random.default_rng(seed), 1 << 13
    for at in range(0, count, step):
        n = min(step, count - at)
        kind = at // step % 4
        if kind == 0:  # as weights are
            yield rng.standard_normal((n, 32), np.float32)
        elif kind == 1:  # any bits at all: NaN and infinities, every exponent
            yield rng.integers(0, 2**32, (n, 32), np.uint32).view(np.float32)
        elif kind == 2:  # sixteenths of a power of two: ties everywhere
            whole = rng.integers(-127, 128, (n, 32)).astype(np.float32)
            yield np.ldexp(whole, rng.integers(-150, 118, (n, 1)))
        else:  # near the smallest
            yield rng.integers(0, 2**26, (n, 32), np.uint32).view(np.float32) * rng.choice(np.float32([-1, 1]), (n, 32))


def unpacked(data: torch.Tensor) -> np.ndarray:
    return integers.unpack(data).numpy()


def same(encoded: tuple[torch.Tensor, torch.Tensor], x: np.ndarray) -> None:
    codes, scales = oracle_encode(x)
    np.testing.assert_array_equal(encoded[1].numpy().reshape(-1), scales)
    np.testing.assert_array_equal(unpacked(encoded[0]).reshape(-1, 32), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_code_with_every_scale(dtype: torch.dtype) -> None:
    codes = np.resize(np.arange(16, dtype=np.uint8), (256, 32))
    scales = np.arange(256, dtype=np.uint8)
    data = integers.pack(torch.from_numpy(codes))
    got = mxfp4.decode(data.view(2, 128, 16), torch.from_numpy(scales).view(2, 128), dtype)
    assert got.dtype == dtype and got.shape == (2, 128 * 32)
    want = torch.from_numpy(oracle_decode(codes, scales))
    torch.testing.assert_close(got.view(256, 32), want.float().to(dtype), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.view(256, 32)[:255].signbit(), torch.from_numpy(codes[:255] >= 8))
    if dtype == torch.float32:
        beyond = want.abs() >= 2.0**128
        assert torch.equal(got.view(256, 32).isinf(), beyond) and beyond.any(1).nonzero().view(-1).tolist() == [
            253,
            254,
        ]
        assert got.view(256, 32)[255].isnan().all()
        exact = want[:253] == got.view(256, 32)[:253].double()
        assert exact.all()  # nothing is lost in float32 below 2^128
    if dtype == torch.bfloat16:
        assert (want[:253] == got.view(256, 32)[:253].double()).all()  # nor in bfloat16


def test_halves_of_bytes_come_back() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(integers.pack(integers.unpack(every)), every)
    assert integers.unpack(torch.tensor([[0x3A, 0xF0]], dtype=torch.uint8)).tolist() == [[10, 3, 0, 15]]


def test_encoding_what_was_decoded_gives_the_bytes_back() -> None:
    """For every block that encoding can make: the largest code is 4 to 7 (4 to 6), or the scale is 0."""
    rng = torch.Generator().manual_seed(5)
    data = torch.randint(0, 256, (70_000, 16), dtype=torch.uint8, generator=rng)
    scales = torch.randint(0, 253, (70_000,), dtype=torch.uint8, generator=rng)
    made = (integers.unpack(data) & 7).amax(1) >= 6
    data[~made, 3] |= 0x60
    data[:100] = 0x80  # -0 and 0, whose scale is 0
    data[100:200] &= 0x33  # values below 2: only where nothing is smaller than the scale
    scales[:200] = 0
    got = mxfp4.encode(mxfp4.decode(data, scales, torch.float32))
    assert torch.equal(got[0].view(-1, 16), data) and torch.equal(got[1].view(-1), scales)
    for dtype in (torch.bfloat16, torch.float64):
        again = mxfp4.encode(mxfp4.decode(data, scales, dtype))
        assert torch.equal(again[0], got[0]) and torch.equal(again[1], got[1])


def test_encoding_the_edges() -> None:
    x = blocks_of_edges()
    same(mxfp4.encode(torch.from_numpy(x).float()), x)


def test_encoding_ten_million_numbers() -> None:
    with np.errstate(all="ignore"):
        for x in random_blocks(10_000_000 // 32, 11):
            same(mxfp4.encode(torch.from_numpy(x)), x.astype(np.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_encoding_other_floats(dtype: torch.dtype) -> None:
    with np.errstate(all="ignore"):
        for x in (*random_blocks(4 << 13, 12), blocks_of_edges()):
            given = torch.from_numpy(x).to(dtype)
            same(mxfp4.encode(given), given.float().double().numpy())


def test_float64_is_rounded_to_float32_first() -> None:
    x = torch.zeros(3, 32, dtype=torch.float64)
    x[0, 0], x[0, 1] = 4.0, 0.25 + 2.0**-40  # above a tie in float64, at it in float32
    x[1, 0] = 1e39
    x[2, 0] = 2.0**-151
    data, scales = mxfp4.encode(x)
    assert scales.view(-1).tolist() == [127, 255, 0]
    assert unpacked(data)[:, 0, :2].tolist() == [[6, 0], [0, 0], [0, 0]]


def test_the_edges_as_the_docstring_says() -> None:
    x = torch.zeros(9, 32)
    x[1, 4] = -0.0
    x[2] = HUGE
    x[3, :3] = torch.tensor([7.5, -7.9, 4.0])
    x[4, 7], x[4, 8] = math.nan, 3.0
    x[5, 7], x[6, 7] = INF, -INF
    x[7, :5] = torch.tensor([2.0**-128, 2.0**-129, 3 * 2.0**-129, TINY, -TINY])
    x[8, :2] = torch.tensor([2.0**-126, 2.0**-149])
    data, scales = mxfp4.encode(x)
    codes = torch.from_numpy(unpacked(data)).view(9, 32)
    assert scales.view(-1).tolist() == [0, 0, 252, 127, 255, 255, 255, 0, 0]
    assert codes[0].eq(0).all() and codes[1].tolist() == [0] * 4 + [8] + [0] * 27
    assert codes[2].eq(7).all() and codes[3, :3].tolist() == [7, 15, 6] and codes[4:7].eq(0).all()
    assert codes[7, :5].tolist() == [1, 0, 2, 0, 8] and codes[8, :2].tolist() == [4, 0]
    back = mxfp4.decode(data, scales, torch.float32).view(9, 32)
    assert back[4:7].isnan().all() and back[2].eq(6 * 2.0**125).all() and back[1, 4].signbit()


def test_rows_may_lie_apart_and_in_stacks() -> None:
    x = torch.randn(96, 5, 3, generator=torch.Generator().manual_seed(2)).permute(2, 1, 0)  # (3, 5, 96), not contiguous
    for format, group in (("mxfp4", 0), ("int8", 0), ("int4", 32)):
        got, want = formats.encode(x, format, group), formats.encode(x.contiguous(), format, group)
        assert got.scales is not None and want.scales is not None
        assert torch.equal(got.data, want.data) and torch.equal(got.scales, want.scales)
        assert (tuple(got.data.shape), tuple(got.scales.shape)) == formats.packed_shapes(format, (3, 5, 96), group)
        one = formats.encode(x[1, 2:4], format, group)
        assert torch.equal(one.data, got.data[1, 2:4])
        values = formats.decode(got, torch.bfloat16)
        assert values.shape == x.shape and values.dtype == torch.bfloat16
        assert got.nbytes == got.data.nbytes + got.scales.nbytes
        rows = formats.joined(torch.cat, [one, one], (4, 96))
        assert torch.equal(formats.decode(rows, torch.float32), formats.decode(one, torch.float32).repeat(2, 1))


def oracle_integers(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Float32 rows to codes and scales, as integers.py describes it, in float64 where that is exact."""
    high = 2 ** (bits - 1)
    largest = np.abs(x).max(1).astype(np.float64)
    scale = torch.from_numpy((largest / (high - 0.5)).astype(np.float32)).bfloat16().double().numpy()
    scale = np.where(largest == 0, 1.0, np.maximum(scale, 2.0**-126))
    scale = np.where(np.isfinite(largest), scale, np.nan)
    quotient = (x.astype(np.float64) / scale[:, None]).astype(np.float32)  # the same as a division in float32
    return np.nan_to_num(np.clip(np.rint(quotient), -high, high - 1)).astype(int), scale


def rows_of_integers(width: int) -> np.ndarray:
    rng = np.random.default_rng(width)
    x = rng.standard_normal((3000, width)).astype(np.float32) * np.exp2(rng.integers(-130, 120, (3000, 1))).astype(
        np.float32
    )
    x[1:7] = [[0.0], [-0.0], [TINY], [HUGE], [2.0**-126], [-1.0]]
    x[7, 3], x[8, 2], x[9, 1] = math.nan, INF, -INF
    x[10] = np.resize(np.arange(-128, 128) / 2, width)  # ties
    x[10, 0] = -127.5
    return x


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_int4(group: int, dtype: torch.dtype) -> None:
    given = torch.from_numpy(rows_of_integers(group)).view(600, 5 * group).to(dtype)
    weight = formats.encode(given, "int4", group)
    assert weight.scales is not None and weight.scales.dtype == torch.bfloat16 and weight.scales.shape == (600, 5)
    codes, scales = oracle_integers(given.float().numpy().reshape(-1, group), 4)
    np.testing.assert_array_equal(weight.scales.double().numpy().reshape(-1), scales)
    np.testing.assert_array_equal(unpacked(weight.data).reshape(-1, group).astype(int) - 8, codes)
    close(weight, given, codes, scales, 8)


@pytest.mark.parametrize("width", [1, 3, 77, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_int8(width: int, dtype: torch.dtype) -> None:
    given = torch.from_numpy(rows_of_integers(max(width, 4))[:400, -width:].copy()).to(dtype)
    weight = formats.encode(given, "int8")
    assert weight.scales is not None and weight.scales.dtype == torch.bfloat16 and weight.scales.shape == (400, 1)
    codes, scales = oracle_integers(given.float().numpy(), 8)
    np.testing.assert_array_equal(weight.scales.double().numpy().reshape(-1), scales)
    np.testing.assert_array_equal(weight.data.numpy(), codes)
    close(weight, given, codes, scales, 128)


def close(weight: Weight, given: torch.Tensor, codes: np.ndarray, scales: np.ndarray, high: int) -> None:
    """What comes back is code * scale exactly, and within half a step of what went in."""
    want = codes * scales[:, None]
    back = formats.decode(weight, torch.float32).double().numpy().reshape(want.shape)
    np.testing.assert_array_equal(back, want)
    x = given.float().numpy().reshape(want.shape).astype(np.float64)
    whole = np.isfinite(x).all(1)
    # A scale that was rounded down puts the largest (high - 1/2) steps or 1/256 more away, and codes end at high - 1.
    step = 0.5 + np.where(np.abs(codes[whole]) >= high - 1, 0.5 + high / 256, 1e-6)
    assert (np.abs(back - x)[whole] <= step * scales[whole, None]).all()
    assert np.isnan(back[~whole]).all() and (~whole).any() == bool(~np.isfinite(x).all())


def test_the_edges_of_integers_as_the_docstring_says() -> None:
    x = torch.zeros(6, 32)
    x[1, 5], x[2, 5], x[3, 5], x[4, 5] = math.nan, -INF, TINY, 2.0**-126
    x[5, :4] = torch.tensor([7.5, 0.5, 1.5, -7.5])  # the scale is 1 in int4: ties to even, and the ends of the codes
    weight = formats.encode(x, "int4", 32)
    assert weight.scales is not None
    scales = weight.scales.float().view(-1)
    assert scales[[0, 3, 4, 5]].tolist() == [1.0, 2.0**-126, 2.0**-126, 1.0] and scales[1:3].isnan().all()
    codes = integers.unpack(weight.data).int() - 8
    assert codes[:4].eq(0).all() and codes[4, 5] == 1 and codes[5, :4].tolist() == [7, 0, 2, -8]
    whole = formats.encode(x * 17, "int8")
    assert whole.scales is not None and whole.scales[[0, 3, 5], 0].tolist() == [1.0, 2.0**-126, 1.0]
    assert whole.scales[1:3].isnan().all() and whole.data[1:3].eq(0).all()
    assert whole.data[5, :4].tolist() == [127, 8, 26, -128]
    far = formats.encode(torch.full((1, 32), 1e39, dtype=torch.float64), "int8")
    assert far.scales is not None and far.scales.isnan().all()


@pytest.mark.parametrize(
    ("format", "width", "group", "says"),
    [
        ("mxfp4", 33, 0, "multiple of 32"),
        ("mxfp4", 0, 0, "multiple of 32"),
        ("int8", 0, 0, "not 0"),
        ("int4", 96, 64, "multiple of 64"),
        ("int4", 64, 0, "groups of 128, 64, 32"),
        ("int4", 64, 16, "not of 16"),
    ],
)
def test_sizes_that_do_not_fit(format: str, width: int, group: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        formats.encode(torch.zeros(3, width), format, group)


def test_no_rows_are_no_error() -> None:
    for format, group in (("mxfp4", 0), ("int8", 0), ("int4", 64)):
        weight = formats.encode(torch.zeros(0, 128), format, group)
        assert formats.decode(weight, torch.float32).shape == (0, 128)


def test_gguf_blocks_in_our_order() -> None:
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(8)
    rows = rng.integers(0, 256, (7, 5 * 17), np.uint8)
    rows[:, ::17] = rng.integers(0, 254, (7, 5))  # gguf knows no NaN, and halves 254 to stay finite
    data, scales = blocks.mxfp4_from_gguf(torch.from_numpy(rows))
    assert data.shape == (7, 5, 16) and scales.shape == (7, 5) and data.is_contiguous() and scales.is_contiguous()
    with np.errstate(over="ignore"):
        want = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.MXFP4)
    got = mxfp4.decode(data, scales, torch.float32).numpy()
    np.testing.assert_array_equal(got, want)
    codes = np.concatenate((rows.reshape(7, 5, 17)[..., 1:] & 15, rows.reshape(7, 5, 17)[..., 1:] >> 4), -1)
    np.testing.assert_array_equal(unpacked(data), codes)  # not only the values: -0 too


def scheme(format: str, group: int) -> Any:
    """What compressed-tensors calls our format, and its compressor."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = {
        "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
        "int8": {"num_bits": 8, "type": "int", "strategy": "channel"},
        "int4": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group},
    }[format]
    stored = {"mxfp4": "mxfp4-pack-quantized", "int8": "int-quantized", "int4": "pack-quantized"}[format]
    made = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights), format=stored)
    return made, BaseCompressor.get_value_from_registry(stored)


@pytest.mark.parametrize(("format", "group"), [("mxfp4", 0), ("int8", 0), ("int4", 32), ("int4", 64), ("int4", 128)])
def test_compressed_tensors_reads_our_bytes(format: str, group: int) -> None:
    made, library = scheme(format, group)
    x = torch.randn(13, 384, generator=torch.Generator().manual_seed(3)).bfloat16()
    weight = formats.encode(x, format, group)
    assert weight.scales is not None
    state = {"weight_scale": weight.scales.view(13, -1)}
    if format == "int8":
        state["weight"] = weight.data
    elif format == "int4":
        state |= {"weight_packed": weight.data.view(torch.int32), "weight_shape": torch.tensor([13, 384])}
    else:
        state["weight_packed"] = weight.data.view(13, -1)
    theirs = library.decompress(state, made)["weight"]
    assert torch.equal(theirs, formats.decode(weight, theirs.dtype))


@pytest.mark.parametrize(("format", "group"), [("mxfp4", 0), ("int8", 0), ("int4", 64)])
def test_compressed_tensors_makes_the_same_codes_of_our_scales(format: str, group: int) -> None:
    made, library = scheme(format, group)
    x = torch.randn(13, 384, generator=torch.Generator().manual_seed(4))
    weight = formats.encode(x, format, group)
    assert weight.scales is not None
    scales = mxfp4.scale_values(weight.scales) if format == "mxfp4" else weight.scales.float()
    state = library.compress({"weight": x, "weight_scale": scales.view(13, -1)}, made)
    data = state["weight" if format == "int8" else "weight_packed"]
    assert torch.equal(data.view(torch.uint8).view(-1), weight.data.view(torch.uint8).view(-1))
