"""Whole models with packed weights on a CUDA device: the same logits as on the CPU. Run with: pytest -m gpu tests/gpu"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import LLM
from slipstream.ops.formats import MADE
from tests.parity.test_architectures import all_logits
from tests.parity.test_mxfp4 import SIZES, publish
from tests.parity.tiny import TINY, save

pytestmark = pytest.mark.gpu
PROMPTS = [[7, 3, 90, 4, 4, 61], list(range(40)), [11]]


def written(name: str, folder: Path) -> Path:
    kind, changes = TINY[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            TINY, name, (kind, changes | SIZES | {"hidden_size": 192, "moe_intermediate_size": 64, "head_dim": 32})
        )
        save(name, folder)
    return folder


def logits(folder: Path, device: str, **options: Any) -> tuple[list[torch.Tensor], LLM]:
    llm = LLM(folder, device=device, kv_cache_memory_bytes=8 << 20, max_model_len=128, **options)
    return [x.float().cpu() for x in all_logits(llm, PROMPTS)], llm


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gpt_oss_as_published(tmp_path: Path, dtype: str) -> None:
    folder = written("gpt_oss", tmp_path / "gpt_oss")
    publish(folder)
    want, _ = logits(folder, "cpu", dtype="float32")
    got, llm = logits(folder, "cuda", dtype=dtype)
    assert {c.op: c.name for c in llm.plan.choices}["linear[mxfp4]"] == (
        "triton" if dtype == "float32" else "triton_slabs"
    )
    assert {i.held for i in llm.plan.loads if len(i.shape) == 3} == {"mxfp4"}
    if dtype == "float32":
        for mine, theirs in zip(got, want, strict=True):
            assert (mine - theirs).norm() / theirs.norm() < 1e-4
        return
    off = torch.cat([(a - b).norm(dim=-1) / b.norm(dim=-1) for a, b in zip(got, want, strict=True)])
    assert off.median() < 0.03 and (off > 0.08).float().mean() < 0.1, off  # few tokens go to another expert


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_quantized_while_loading(tmp_path: Path, name: str, made: str) -> None:
    folder = written(name, tmp_path / name)
    want, _ = logits(folder, "cpu", dtype="float32", quantization=made)
    got, llm = logits(folder, "cuda", dtype="float32", quantization=made)
    assert {c.op: c.name for c in llm.plan.choices}[f"linear[{made}]"] == "triton"
    for mine, theirs in zip(got, want, strict=True):
        assert (mine - theirs).norm() / theirs.norm() < 1e-4
