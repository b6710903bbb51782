"""Products by packed weights on a CUDA device against float64. Run with: pytest -m gpu tests/gpu/test_formats.py"""

from __future__ import annotations

from itertools import product as product_of

import pytest
import torch

pytest.importorskip("triton")

from slipstream.ops.choose import Case, choose
from slipstream.ops.formats import Weight, decode
from slipstream.ops.linear import IMPLS
from slipstream.ops.linear.triton import Triton
from slipstream.ops.linear.triton_few import Few
from tests.ops.test_triton import FORMATS, all_codes_and_scales, error, few, make, one_bad_block, product, slabs

pytestmark = pytest.mark.gpu
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# The result is rounded to 8 or 11 bits; a wrong code, scale or row is far off.
TOLERANCE = {F32: 1e-5, BF16: 6e-3, F16: 1e-3}


# float16 runs the kernels of float32. Each case is a compilation of half a second.
@pytest.mark.parametrize(
    ("dtype", "tokens"), [*product_of((F32, BF16), (1, 2, 3, 16, 17, 100, 513)), *product_of((F16,), (1, 17))], ids=str
)
@pytest.mark.parametrize("format", FORMATS)
def test_odd_sizes(format: str, dtype: torch.dtype, tokens: int) -> None:
    assert error(format, tokens, dtype, "cuda") < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("dtype", "tokens"), [*product_of((BF16,), (1, 4, 16, 65, 513)), *product_of((F32,), (1, 65))], ids=str
)
@pytest.mark.parametrize("rows", [5760, 2880])
@pytest.mark.parametrize("format", ["mxfp4", "int8", "int4-64", "Q4_1"])
def test_the_shapes_of_gpt_oss(format: str, rows: int, dtype: torch.dtype, tokens: int) -> None:
    assert error(format, tokens, dtype, "cuda", rows=rows, width=2880) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_every_code_with_every_scale_is_exact(dtype: torch.dtype) -> None:
    all_codes_and_scales(dtype, "cuda")


def test_a_nan_scale_reaches_its_row_and_no_other() -> None:
    one_bad_block("cuda")


@pytest.mark.parametrize("tokens", [1, 3])
def test_more_than_two_billion_weights(tokens: int) -> None:
    rows, width = 800_003, 2880
    data = torch.zeros(rows, width, dtype=torch.int8, device="cuda")
    data[-1] = torch.arange(width, device="cuda") % 5 - 2
    scales = torch.ones(rows, 1, dtype=BF16, device="cuda")
    x = torch.randn(tokens, width, device="cuda")
    found = product(x, Triton().prepare(Weight("int8", data, (rows, width), scales), F32), None)
    assert not found[:, :-1].any()
    torch.testing.assert_close(found[:, -1].double(), x.double() @ data[-1].double(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 16, 17, 33, 64, 65, 129, 700])
def test_mxfp4_as_slabs(tokens: int) -> None:
    for rows, width in ((2048, 4096), (5120, 2048), (16, 32), (48, 2880)):
        assert slabs(tokens, BF16, "cuda", rows, width) < TOLERANCE[BF16], (rows, width)


def test_the_same_numbers_twice() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 2880, device="cuda").bfloat16()
    data = torch.randint(0, 256, (5760, 90, 16), dtype=torch.uint8, device="cuda")
    scales = torch.randint(118, 123, (5760, 90), dtype=torch.uint8, device="cuda")
    packed = Triton().prepare(Weight("mxfp4", data, (5760, 2880), scales), BF16)
    first = Triton()(x, packed, None)
    assert all(torch.equal(Triton()(x, packed, None), first) for _ in range(3))


@pytest.mark.parametrize("tokens", [128, 256, 2048])
@pytest.mark.parametrize("format", FORMATS)
def test_no_step_runs_into_the_next(format: str, tokens: int) -> None:
    """A race of the pipelined product showed in some runs only, at these sizes."""
    weight = make(format, (5760, 3072), "cuda")
    packed = Triton().prepare(weight, BF16)
    x = torch.randn(tokens, 3072, device="cuda").bfloat16()
    want = x.double() @ decode(weight, F32).double().T
    for _ in range(20):
        off = (Triton()(x, packed, None).double() - want).abs().max() / want.abs().max()
        assert off < TOLERANCE[BF16]


def test_it_is_what_is_chosen() -> None:
    facts = {"format": "mxfp4", "in_features": 96, "out_features": 40}
    case = Case("cuda", "bfloat16", torch.cuda.get_device_capability(), facts)
    assert choose("linear", IMPLS, case).name == "triton"


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(
    ("rows", "width"), [(5120, 2880), (2880, 4096), (83, 1104), (1, 16), (4099, 14336)], ids=lambda n: str(n)
)
def test_few_tokens_by_floats(rows: int, width: int, dtype: torch.dtype) -> None:
    for tokens in (1, 2, 9, 17, 32):  # cuBLAS, which takes more, is less exact
        assert few(tokens, dtype, "cuda", rows, width) < TOLERANCE[dtype]


def test_more_than_two_billion_floats() -> None:
    rows, width = 800_003, 2880
    weight = torch.zeros(rows, width, dtype=BF16, device="cuda")
    weight[-1] = torch.arange(width, device="cuda") % 5 - 2
    for tokens in (1, 3):
        x = torch.randn(tokens, width, device="cuda").bfloat16()
        found = product(x, (weight,), None, Few())
        assert not found[:, :-1].any()
        torch.testing.assert_close(found[:, -1].double(), x.double() @ weight[-1].double(), rtol=6e-3, atol=0.1)


def test_few_tokens_are_ours_and_many_are_not() -> None:
    facts = {"format": "dense", "in_features": 96, "out_features": 40}
    case = Case("cuda", "bfloat16", torch.cuda.get_device_capability(), facts)
    assert choose("linear", IMPLS, case).name == "triton_few"
    facts["batch_invariant"] = True
    assert choose("linear", IMPLS, case).name == "triton_dense_invariant"
