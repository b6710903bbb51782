"""The Triton linear kernels without a GPU: run by Triton's interpreter in a process of its own (it must be asked for before
the kernels are imported; bfloat16 is wrong there, so float32 and float16 only), and compiled for Hopper."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slipstream.ops import linear
from slipstream.ops.choose import Case
from slipstream.ops.formats import Weight, decode, encode

pytest.importorskip("triton")

from slipstream.ops.linear import triton_slabs
from slipstream.ops.linear.triton import ROWS, STAGES, Triton, _tiles, _vector, tiles
from slipstream.ops.linear.triton_dense import TILE, TritonDense, _dense
from slipstream.ops.linear.triton_few import ONE, SOME, Few, _one, _some
from slipstream.ops.linear.triton_slabs import Slabs
from slipstream.ops.moe import Pairs
from tests.ops import interpreter

REJECT = next(impl.reject for impl in linear.IMPLS if impl.name == "triton")
FORMATS = ("mxfp4", "int8", "int4-32", "int4-64", "int4-128", "Q4_0", "Q4_1", "Q8_0")
TOKENS = (1, 3)
F32 = torch.float32


@cache
def make(name: str, shape: tuple[int, ...], device: str = "cpu") -> Weight:
    """Random numbers in a format; "int4-64" is int4 in groups of 64."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    format, _, group = name.partition("-")
    if format[0] != "Q":
        return encode(values.to(device), format, int(group or 0))
    *outer, width = shape
    heads = 2 if format == "Q4_1" else 1  # the scale, and the offset: numbers of float16 before the codes of a block
    size = 2 * heads + (32 if format == "Q8_0" else 16)
    random = torch.Generator().manual_seed(sum(shape) + size)
    blocks = torch.randint(256, (*outer, width // 32, size), generator=random, dtype=torch.uint8)
    numbers = (0.5 + torch.rand(*outer, width // 32, heads, generator=random)) / (100 if format == "Q8_0" else 8)
    blocks[..., : 2 * heads] = numbers.half().view(torch.uint8)
    return Weight(format, blocks.view(*outer, -1).to(device), shape)


def product(x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None, kernel: Any = None) -> Tensor:
    """What the kernel gives; what it allocates starts as NaN, and must be untouched beyond its ends."""
    buffers, empty = [], torch.empty

    def guarded(*size: int, dtype: torch.dtype, device: Any) -> Tensor:
        buffers.append(torch.full((int(np.prod(size)) + 2048,), torch.nan, dtype=dtype, device=device))
        return buffers[-1][1024:-1024].view(size)

    torch.empty = guarded  # type: ignore[assignment]
    try:
        found = (kernel or Triton())(x, packed, bias)
    finally:
        torch.empty = empty
    assert all(b[:1024].isnan().all() and b[-1024:].isnan().all() for b in buffers), "written out of bounds"
    return found


def inside_nan(x: Tensor) -> Tensor:
    """The same numbers as a view into NaN, so that what is read beyond a row shows."""
    return torch.cat((x, torch.full_like(x, torch.nan)), 1)[:, : x.shape[1]]


@pytest.mark.parametrize("name", FORMATS)
def test_what_it_says_it_holds_is_what_it_allocates(name: str) -> None:
    weight = make(name, (203, 256))
    theirs = {t.data_ptr() for t in (weight.data, weight.scales) if t is not None}
    made = [t for t in Triton().prepare(weight, F32) if t.data_ptr() not in theirs]
    said = Triton().held_bytes(weight.format, weight.shape, F32, weight.nbytes)
    assert said == (sum(t.nbytes for t in made) if made else None)


def error(name: str, tokens: int, dtype: torch.dtype, device: str = "cpu", rows: int = 203, width: int = 96) -> float:
    """The largest error relative to the largest result, one matrix out of a stack of three."""
    width = max(width, 1 if "-" not in name else 3 * int(name.split("-")[1]))
    stack = make(name, (3, rows, width), device)
    packed = tuple(t[1] for t in Triton().prepare(stack, dtype))
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, width, generator=generator).to(device, dtype)
    bias = torch.randn(rows, generator=generator).to(device, dtype) if tokens % 2 else None
    found = product(inside_nan(x), packed, bias)
    assert found.dtype == dtype and found.shape == (tokens, rows)
    wanted = x.double() @ decode(stack, F32)[1].double().T + (0 if bias is None else bias.double())
    return ((found.double() - wanted).abs().max() / wanted.abs().max()).item()


def all_codes_and_scales(dtype: torch.dtype, device: str = "cpu") -> None:
    """Each row has another scale byte and all 16 codes in both halves; a token picks a column. Exact, NaN where 255 is."""
    scales = torch.tensor([*range(253), 255], dtype=torch.uint8)  # 253 and 254 hold infinities
    codes = torch.arange(16, dtype=torch.uint8)
    data = (codes | codes.flip(0) << 4).expand(len(scales), 1, 16).contiguous()
    weight = Weight("mxfp4", data, (len(scales), 32), scales[:, None]).map(lambda t: t.to(device))
    packed = Triton().prepare(weight, dtype)
    columns = torch.eye(32, dtype=dtype, device=device)
    wanted = decode(weight, dtype).T
    torch.testing.assert_close(product(columns, packed, None), wanted, rtol=0, atol=0, equal_nan=True)
    for at in (0, 2, 14, 28):
        torch.testing.assert_close(
            product(columns[at : at + 2], packed, None), wanted[at : at + 2], rtol=0, atol=0, equal_nan=True
        )


def one_bad_block(device: str = "cpu") -> None:
    """A NaN scale reaches its row for every token, and no other."""
    weight = make("mxfp4", (200, 96), device).map(torch.clone)
    assert weight.scales is not None
    weight.scales[77, 2] = 255
    packed = Triton().prepare(weight, F32)
    for tokens in (1, 5):
        found = product(torch.randn(tokens, 96).to(device), packed, None).isnan()
        assert found[:, 77].all() and found.sum() == tokens


def tiles_of_bfloat16(tokens: int) -> float:
    """Tiles of several blocks, of which the last one's stand half beyond the input."""
    import slipstream.ops.linear.triton as module

    module.tiles, before = lambda tokens, dtype: tiles(tokens, torch.bfloat16), module.tiles
    try:
        return max(error(name, tokens, F32) for name in FORMATS)
    finally:
        module.tiles = before


def no_tokens() -> None:
    assert Triton()(torch.empty(0, 96), Triton().prepare(make("int8", (200, 96)), F32), None).shape == (0, 200)


def invariant(name: str, dtype: torch.dtype = F32, device: str = "cpu", rows: int = 75, width: int = 96) -> float:
    """Any number of tokens, anywhere among others, gives each of them the same bits. The largest relative error."""
    kernel: Any = TritonDense() if name == "dense" else Triton(invariant=True)
    weight = Weight(name, torch.randn(rows, width, device=device).to(dtype), (rows, width))
    weight = weight if name == "dense" else make(name, (rows, width), device)
    packed = kernel.prepare(weight, dtype)
    x, bias = torch.randn(70, width, device=device).to(dtype), torch.randn(rows, device=device).to(dtype)
    whole = kernel(inside_nan(x), packed, bias)
    for at, tokens in ((0, 1), (69, 1), (3, 2), (31, 5), (16, 33)):
        assert torch.equal(kernel(x[at : at + tokens], packed, bias), whole[at : at + tokens]), (at, tokens)
    want = x.double() @ decode(weight, F32).double().T + bias.double()
    return ((whole.double() - want).abs().max() / want.abs().max()).item()


def few(tokens: int, dtype: torch.dtype = F32, device: str = "cpu", rows: int = 83, width: int = 1104) -> float:
    """The largest relative error of the dense kernels for few tokens, with a weight that stands in NaN, and NaN at one
    place of it and of the tokens."""
    random = torch.Generator().manual_seed(tokens)
    held = torch.full((rows + 2, width), torch.nan, dtype=dtype, device=device)
    held[1:-1] = torch.randn(rows, width, generator=random).to(device, dtype)
    weight = Few().prepare(Weight("dense", held[1:-1], (rows, width)), dtype)
    assert weight[0].data_ptr() == held[1].data_ptr()
    x = torch.randn(tokens, width, generator=random).to(device, dtype)
    bias = torch.randn(rows, generator=random).to(device, dtype) if tokens % 2 else None
    found = product(inside_nan(x), weight, bias, Few())
    assert found.dtype == dtype and found.shape == (tokens, rows) and Few()(x[:0], weight, bias).shape == (0, rows)
    assert torch.equal(found, Few()(x, weight, bias))
    want = x.double() @ held[1:-1].double().T + (0 if bias is None else bias.double())
    bad_row = rows // 2
    held[1 + bad_row, 3] = x[-1, 7] = torch.nan
    bad = Few()(x, weight, bias).isnan()
    assert bad[-1].all() and bad[:, bad_row].all() and bad.sum() == rows + tokens - 1
    return ((found.double() - want).abs().max() / want.abs().max()).item()


def slabs(tokens: int, dtype: torch.dtype = F32, device: str = "cpu", rows: int = 80, width: int = 96) -> float:
    """The largest relative error of mxfp4 as slabs, in its own dtype and in float32."""
    weight = make("mxfp4", (rows, width), device).map(torch.clone)
    numbers = decode(weight, F32).double()
    packed = Slabs().prepare(weight, dtype)
    random = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, width, generator=random).to(device, dtype)
    bias = torch.randn(rows, generator=random).to(device, dtype) if tokens % 2 else None
    found, wide = product(inside_nan(x), packed, bias, Slabs()), Slabs().wide(x, packed)
    assert found.dtype == dtype and found.shape == wide.shape == (tokens, rows) and wide.dtype == F32
    assert Slabs()(x[:0], packed, bias).shape == (0, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_slabs, "MOST", max(1, tokens - 1))  # with numbers for more
        apart = Slabs()(x, packed, bias)
        assert ((apart - found).abs().max() <= 1e-2 * found.abs().max()) and apart.dtype == dtype
    want = x.double() @ numbers.T
    worst = [(wide.double() - want).abs().max() / want.abs().max()]
    want = want if bias is None else want + bias.double()
    left = Slabs().left(x, packed, bias)
    least = (
        1984 if tokens == 1 and dtype == torch.bfloat16 else 704
    )  # what one token in bfloat16 reads is shared out in warps
    assert isinstance(left, Pairs) == (tokens <= 8 and width >= least), "parts for the norm to add"
    left = left.sum() if isinstance(left, Pairs) else left
    assert left.dtype == dtype and left.shape == found.shape
    worst.append((left.double() - want).abs().max() / want.abs().max())
    return max(*worst, (found.double() - want).abs().max() / want.abs().max()).item()


def interpreted() -> dict[str, Callable[[], float | None]]:
    cases: dict[str, Callable[[], float | None]] = {
        f"{name}-{tokens}": lambda name=name, tokens=tokens: error(name, tokens, F32)  # type: ignore[misc]
        for name in FORMATS
        for tokens in TOKENS
    }
    cases["mxfp4-float16"] = lambda: error("mxfp4", 3, torch.float16) / 1e3
    cases["mxfp4-37"] = lambda: error("mxfp4", 37, F32)
    cases["parts"] = lambda: error("mxfp4", 3, F32, rows=72, width=288)  # several programs share a tile
    cases["few-tokens"], cases["many-tokens"] = lambda: tiles_of_bfloat16(5), lambda: tiles_of_bfloat16(67)
    for name in ("dense", "mxfp4", "int8", "Q4_1"):
        cases[f"invariant-{name}"] = lambda name=name: invariant(name)  # type: ignore[misc]
    for tokens in (1, 2, 3, 13, 32, 33):
        cases[f"few-{tokens}"] = lambda tokens=tokens: few(tokens)  # type: ignore[misc]
    for tokens in (1, 3, 37):
        cases[f"slabs-{tokens}"] = lambda tokens=tokens: slabs(tokens)  # type: ignore[misc]
    cases["slabs-parts"] = lambda: max(slabs(tokens, rows=32, width=704) for tokens in (1, 5))
    cases["few-narrow"] = lambda: max(few(1, rows=1, width=16), few(5, width=16))
    cases["codes"] = lambda: all_codes_and_scales(F32)
    cases["nan"] = one_bad_block
    cases["none"] = no_tokens
    return cases


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return interpreter.run(__file__)


@pytest.mark.parametrize("case", interpreted())
def test_the_kernels_in_the_interpreter_against_float64(results: dict[str, Any], case: str) -> None:
    found = results[case]
    assert found is None or (isinstance(found, float) and found < 1e-6), found


@pytest.mark.parametrize("format", FORMATS)
def test_no_format_takes_more_bytes_than_in_its_file_and_files_layouts_are_not_copied(format: str) -> None:
    weight = make(format, (3, 40, 384))
    packed = Triton().prepare(weight, torch.bfloat16)
    assert sum(t.nbytes for t in packed) == weight.nbytes
    assert all(t.is_contiguous() and t.shape[:2] == (3, 40) for t in packed)
    if weight.scales is not None:
        assert packed[0] is weight.data and packed[1] is weight.scales


def test_it_is_for_cuda_with_triton_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(device: str = "cuda", dtype: str = "bfloat16", capability: Any = (9, 0), **facts: Any) -> str | None:
        return REJECT(
            Case(device, dtype, capability, {"format": "mxfp4", "in_features": 96, "out_features": 40} | facts)
        )

    assert why() is None
    assert "CUDA" in str(why("cpu"))
    assert "float64" in str(why(dtype="float64"))
    assert "7.0" in str(why(capability=(7, 0)))
    assert "Q6_K" in str(why(format="Q6_K"))
    assert "32" in str(why(in_features=100))
    monkeypatch.setattr(linear, "find_spec", lambda name: None)
    assert "pip install triton" in str(why())


LAYOUTS = {  # FP4, BITS, SHARE, type of the scales
    "mxfp4": (True, 4, 1, "*u8"),
    "int8": (False, 8, 0, "*bf16"),
    "int4-64": (False, 4, 2, "*bf16"),
    "Q4_1": (False, 4, 1, "*fp16"),
}


@pytest.mark.parametrize("tokens", [1, 16, 2048])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_compiles_for_hopper(layout: str, tokens: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fp4, bits, share, scales = LAYOUTS[layout]
    constants: dict[str, Any] = {"FP4": fp4, "BITS": bits, "SHARE": share}
    types = {"x": "*bf16", "data": "*u8" if bits == 4 else "*i8", "scales": scales, "bias": "*bf16", "out": "*bf16"}
    if layout == "Q4_1":
        types["offsets"] = scales
    else:
        constants["offsets"] = None
    kernel, warps = (_vector, 4) if tokens == 1 else (_tiles, tiles(tokens, torch.bfloat16)[3])
    if tokens == 1:
        constants |= ROWS
    else:
        m, n, blocks, _ = tiles(tokens, torch.bfloat16)
        constants |= {"BLOCK_M": m, "BLOCK_N": n, "BLOCKS": blocks, "COMPUTE": tl.bfloat16}
    signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if a in types or a == "x_stride"}
    source = ASTSource(kernel, signature, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": STAGES})
    assert ("wgmma.mma_async" in made.asm["ptx"]) == (tokens > 1)
    assert "cp.async" in made.asm["ptx"]  # weights are fetched ahead
    assert "ftz" not in made.asm["ptx"]  # the scale 2^-127 and codes before their bias are subnormal
    assert made.metadata.shared <= 100 << 10  # two programs a multiprocessor


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_dense_compiles_for_hopper(dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes: dict[str, Any] = {k: v for k, v in TILE.items() if k.isupper()}
    pointers = ("x", "weight", "bias", "out")
    signature = {a: "constexpr" if a in sizes else f"*{dtype}" if a in pointers else "i32" for a in _dense.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(_dense.arg_names) if a in (*pointers, "width")}
    options = {k: v for k, v in TILE.items() if k not in sizes}
    made = triton.compile(
        ASTSource(_dense, signature, sizes, aligned), target=GPUTarget("cuda", 90, 32), options=options
    )
    ptx = made.asm["ptx"]
    assert ("wgmma.mma_async" in ptx) == (dtype != "fp32") and "tf32" not in ptx
    assert made.metadata.shared <= 100 << 10


@pytest.mark.parametrize("tokens", [1, 8, 16, 32])
def test_the_kernels_for_few_tokens_compile_for_hopper(
    tokens: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The one token's weights are read before the kernel waits for what came before it; nothing is spilled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, tile = (_one, ONE) if tokens == 1 else (_some, {"BLOCK_M": tokens, **SOME})
    sizes: dict[str, Any] = {k: v for k, v in tile.items() if k.isupper()} | {"CHAIN": True}
    pointers = ("x", "weight", "bias", "out")
    signature = {a: "constexpr" if a in sizes else "*bf16" if a in pointers else "i32" for a in kernel.arg_names}
    whole = (*pointers, "width", "num_rows", "x_stride")
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if a in whole}
    options = {k: v for k, v in tile.items() if k not in sizes}
    made = triton.compile(
        ASTSource(kernel, signature, sizes, aligned), target=GPUTarget("cuda", 90, 32), options=options
    )
    ptx = made.asm["ptx"]
    assert ".local" not in ptx and made.metadata.shared <= 100 << 10
    before, _, after = ptx.partition("griddepcontrol.wait")
    assert "griddepcontrol.launch_dependents" in after and "st.global" in after and "st.global" not in before
    if tokens == 1:
        assert before.count("ld.global.v4") == 8 * ONE["HELD"] and "mma" not in ptx
    else:
        assert "mma.sync.aligned.m16n8k16" in after and "cp.async" in after


if __name__ == "__main__":
    interpreter.main(interpreted())
