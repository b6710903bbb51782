"""Linear layers: every implementation against float64, blocks against what the gguf library makes of them."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch

from slipstream.ops import linear
from slipstream.ops.choose import Case
from slipstream.ops.formats import Weight

IN, OUT = 96, 128
IMPLS = {impl.name: impl for impl in linear.IMPLS}
F32, BF16 = torch.float32, torch.bfloat16
FORMATS = ("Q4_0", "Q4_1", "Q8_0")


def _case(dtype: torch.dtype, format: str = "dense", **facts: Any) -> Case:
    facts = {"format": format, "in_features": IN, "out_features": OUT, **facts}
    return Case("cpu", str(dtype).removeprefix("torch."), None, facts)


def _load(name: str, case: Case) -> Any:
    why = IMPLS[name].reject(case)
    if why is not None:  # no compiler, or a processor without bfloat16
        pytest.skip(f"{name}: {why}")
    return IMPLS[name].load()


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize(
    ("name", "dtype"), [("torch", F32), ("torch", BF16), ("reference", F32), ("reference", BF16), ("onednn", BF16)]
)
def test_dense(name: str, dtype: torch.dtype, tokens: int, bias: bool) -> None:
    kernel = _load(name, _case(dtype))
    torch.manual_seed(0)
    weight, x, b = torch.randn(OUT, IN), torch.randn(tokens, IN).to(dtype), torch.randn(OUT).to(dtype)
    packed = kernel.prepare(Weight("dense", weight, (OUT, IN)), dtype)
    got = kernel(x, packed, b if bias else None)
    want = x.double() @ weight.to(dtype).double().T + (b.double() if bias else 0)
    assert got.dtype == dtype and got.shape == (tokens, OUT)
    tolerance = 1e-5 if dtype == F32 else 1e-2
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * 4)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("tokens", [1, 7, 33])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("name", "dtype"), [("blocks", F32), ("blocks", BF16), ("int4pack", BF16)])
def test_blocks(name: str, format: str, dtype: torch.dtype, tokens: int, bias: bool) -> None:
    kernel = _load(name, _case(dtype, format))
    rng = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType[format]
    data = gguf.quantize(rng.normal(size=(OUT, IN)).astype(np.float32), kind)
    weight = torch.from_numpy(gguf.dequantize(data, kind).copy())
    torch.manual_seed(1)
    x, b = torch.randn(tokens, IN).to(dtype), torch.randn(OUT).to(dtype)
    packed = kernel.prepare(Weight(format, torch.from_numpy(data.copy()), (OUT, IN)), dtype)
    got = kernel(x, packed, b if bias else None)
    want = x.double() @ weight.double().T + (b.double() if bias else 0)
    assert got.dtype == dtype and got.shape == (tokens, OUT)
    error = (got.double() - want).norm() / want.norm()
    # In bfloat16 scales, inputs or the result are rounded to 8 bits; a wrong code or scale is far off.
    assert error < (2e-6 if dtype == F32 else 6e-3)


@pytest.mark.parametrize("name", IMPLS)
def test_formats_and_dtypes_that_are_not_taken_are_refused_with_a_reason(name: str) -> None:
    assert IMPLS[name].reject(_case(BF16, "Q6_K"))
    if name in ("onednn", "int4pack"):
        assert "float32" in str(IMPLS[name].reject(_case(F32, "dense" if name == "onednn" else "Q4_0")))
