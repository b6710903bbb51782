"""What `quantize` writes: transformers opens it and agrees with us, and a model quantized while it loads answers alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from slipstream import LLM, quantize
from slipstream.ops.formats import MADE
from tests.parity.test_architectures import all_logits
from tests.parity.tiny import PROMPT_LENGTHS, TINY, save

# Rows of a multiple of 32, and pairwise different.
SIZES = {
    "hidden_size": 192,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "num_attention_heads": 6,
    "head_dim": 32,
}
NAMES = ("llama-biases-tied", "gemma3_text", "qwen3_moe", "mixtral", "phi3", "gpt_oss")
OPTIONS = {"dtype": "float32", "kv_cache_memory_bytes": 8 << 20, "max_model_len": 128}


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / request.param
    kind, changes = TINY[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY, request.param, (kind, changes | SIZES))
        save(request.param, path)
    return path


@pytest.fixture(scope="module")
def prompts() -> list[torch.Tensor]:
    torch.manual_seed(3)
    return [torch.randint(97, (1, n)) for n in PROMPT_LENGTHS]


def logits(path: Path, prompts: list[torch.Tensor], **options: str) -> list[torch.Tensor]:
    llm = LLM(path, **OPTIONS, **options)
    assert "widened" not in str(llm.plan.why) or "quantization" in options
    return all_logits(llm, [p[0].tolist() for p in prompts])


@torch.no_grad()
@pytest.mark.parametrize("to", MADE)
def test_transformers_agrees(folder: Path, to: str, prompts: list[torch.Tensor], tmp_path: Path) -> None:
    """On gpt-oss it knows MXFP4 experts alone, and of other experts it rounds integers times scales to bfloat16; these are
    held against our own dequantized weights here, and its own weights in tests/quantization."""
    report = quantize(folder, tmp_path / to, to=to)
    assert report.bytes_after < report.bytes_before and report.parameters_covered > 0.5 * report.parameters
    mine = logits(tmp_path / to, prompts)
    assert min(x.abs().max() for x in mine) > 1
    if folder.name in ("gpt_oss", "qwen3_moe", "mixtral") and to != "mxfp4":
        theirs = logits(tmp_path / to, prompts, quantization="dequantize")
    else:
        kind = transformers.Mxfp4Config if "gpt_oss" in folder.name else transformers.CompressedTensorsConfig
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / to, quantization_config=kind(dequantize=True), dtype=torch.float32, attn_implementation="eager",
            experts_implementation="eager",
        )  # fmt: skip
        torch.nn.Module.float(model.eval())  # it leaves experts in bfloat16
        theirs = [model(p).logits[0] for p in prompts]
    for got, want in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("to", MADE)
def test_quantized_while_loading_is_the_same(
    folder: Path, to: str, prompts: list[torch.Tensor], tmp_path: Path
) -> None:
    quantize(folder, tmp_path / to, to=to)
    for got, want in zip(logits(folder, prompts, quantization=to), logits(tmp_path / to, prompts), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
