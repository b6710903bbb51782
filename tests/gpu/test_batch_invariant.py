"""batch_invariant on a CUDA device: every op's rows, and whole models. Run with: pytest -m gpu tests/gpu/test_batch_invariant.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import LLM
from slipstream.ops import moe
from slipstream.ops.activation.reference import activation
from slipstream.ops.choose import Case, choose
from tests.engine.test_batch_invariant import VARIANTS, alone, same, together
from tests.gpu.test_quantized import written
from tests.ops.test_batch_invariant import check
from tests.ops.test_triton import invariant
from tests.parity.test_mxfp4 import publish

pytestmark = pytest.mark.gpu
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, float32": ("llama", {"dtype": "float32"}),
    "llama, bfloat16": ("llama", {"dtype": "bfloat16"}),
    "gpt-oss, mxfp4, bfloat16": ("gpt_oss", {"dtype": "bfloat16"}),
    "qwen3_moe, int4, bfloat16": ("qwen3_moe", {"dtype": "bfloat16", "quantization": "int4"}),
    "gemma2, int8, float16": ("gemma2", {"dtype": "float16", "quantization": "int8"}),
}


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("format", ["dense", "mxfp4", "int8", "int4-32", "Q4_0", "Q4_1", "Q8_0"])
def test_linear(format: str, dtype: torch.dtype) -> None:
    for rows, width in ((75, 96), (2049, 1440)):
        assert invariant(format, dtype, "cuda", rows, width) < {F32: 1e-5, BF16: 1e-2, F16: 2e-3}[dtype]


@pytest.mark.parametrize("width", [1, 33, 60])
def test_dense_of_any_width(width: int) -> None:
    assert invariant("dense", BF16, "cuda", 67, width) < 1e-2


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_what_torch_does_a_number_at_a_time(dtype: torch.dtype) -> None:
    case = Case("cuda", str(dtype)[6:], (9, 0), {"batch_invariant": True})
    experts = choose("moe", moe.IMPLS, case).fn.experts
    x = 3 * torch.randn(70, 2 * 1537, device="cuda").to(dtype)
    check(torch.tanh, x)
    ids = torch.stack([torch.randperm(7)[:3] for _ in range(70)]).cuda()

    def some(x: torch.Tensor) -> torch.Tensor:  # a column says which token it is
        at = x[:, -1].long()
        shares = torch.linspace(0.1, 0.9, 210, device="cuda").view(70, 3)[at]
        return experts(
            x[:, :60],
            ids[at],
            shares,
            lambda x, e: x.repeat(1, 2) * (e + 1),
            lambda x, e: x - e,
            activation,
            kind="silu",
        )

    check(some, torch.cat((x[:, :60], torch.arange(70, device="cuda")[:, None].to(dtype)), 1))


@pytest.mark.parametrize("name", CASES)
def test_a_model(tmp_path: Path, name: str) -> None:
    kind, options = CASES[name]
    folder = written(kind, tmp_path / kind)
    if kind == "gpt_oss":
        publish(folder)

    def load(
        **more: Any,
    ) -> LLM:  # eager: steps that are replayed, or know their tokens late, have no logits to look at
        seen = {"enforce_eager": True, "async_scheduling": False}
        asked = {
            "batch_invariant": True,
            "kv_cache_memory_bytes": 8 << 20,
            "max_model_len": 140,
            **seen,
            **options,
            **more,
        }
        return LLM(folder, device="cuda", **asked)

    want = alone(load())
    assert len(want) > 100 and all(x.isfinite().all() for x in want.values())
    for variant in ("together", "in chunks of 7, pages of 3", "nothing is kept"):
        llm = load(**VARIANTS[variant])
        same(want, together(llm))
        same(want, together(llm, lambda all: all[::-1]))
