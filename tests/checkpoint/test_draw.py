"""Random weights: the shapes, formats and bytes of the real checkpoint from its config.json alone, and numbers that work."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import LLM, SamplingParams
from slipstream.checkpoint.draw import draw
from slipstream.checkpoint.open import open_checkpoint, open_random
from slipstream.checkpoint.tensors import TensorInfo
from slipstream.config import EngineConfig
from slipstream.errors import CheckpointError, ConfigError
from slipstream.ops.formats import decode
from slipstream.plan import make_plan
from tests.checkpoint.test_transfer import folder_of, tensors_of
from tests.engine.tiny import LLAMA, write
from tests.parity.test_architectures import all_logits
from tests.parity.tiny import TINY

ASKED: dict[str, Any] = {"dtype": "float32", "kv_cache_memory_bytes": 1 << 22, "max_model_len": 64}
PROMPTS = [[7, 3, 90, 4, 4, 61], [11]]
PACKED = ["gpt_oss published", "gpt_oss made int8", "qwen3_moe made int4", "llama made mxfp4", "phi3 made int8"]


def bare(kind: str, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint, and a folder that has nothing of it but config.json."""
    real, _ = folder_of(kind, tmp_path / "real")
    (tmp_path / "bare").mkdir()
    shutil.copy(real / "config.json", tmp_path / "bare")
    return real, tmp_path / "bare"


@pytest.mark.parametrize("kind", [*TINY, *PACKED])
def test_as_the_real_one(kind: str, tmp_path: Path) -> None:
    real, folder = bare(kind, tmp_path)
    want = make_plan(EngineConfig(**ASKED), open_checkpoint(real))
    llm = LLM(folder, weights="random", **ASKED)
    assert llm.plan.weights_bytes == want.weights_bytes
    assert {i.to: (i.held, i.shape, i.shared) for i in llm.plan.loads} == {
        i.to: (i.held, i.shape, i.shared) for i in want.loads
    }
    assert "drawn with the seed 0" in llm.plan.why["random weights"]
    logits = torch.cat(all_logits(llm, PROMPTS))
    assert logits.isfinite().all() and logits.std() > 0.01 and logits.abs().max() < 1e3


@pytest.mark.parametrize("made", ["int4", "int8", "mxfp4"])
@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
def test_quantized_as_it_is_drawn(name: str, made: str, tmp_path: Path) -> None:
    real, _ = folder_of(f"{name} {made}", tmp_path)
    want = make_plan(EngineConfig(quantization=made, **ASKED), open_checkpoint(real))
    llm = LLM(real, weights="random", quantization=made, **ASKED)
    if name == "gpt_oss":
        assert llm.plan.weights_bytes == want.weights_bytes
    assert {i.held for i in llm.plan.loads} >= {made}
    assert torch.cat(all_logits(llm, PROMPTS)).isfinite().all()


def test_the_same_for_a_seed_and_another_for_another(tmp_path: Path) -> None:
    _, folder = bare("gpt_oss published", tmp_path)
    one, same, other = (
        tensors_of(LLM(folder, weights="random", seed=seed, **ASKED).plan.model) for seed in (None, 0, 1)
    )
    assert len(one) > 20
    differ = [n for n in one if not torch.equal(one[n], other[n])]
    assert all(torch.equal(one[n], same[n]) for n in one) and len(differ) > len(one) * 0.7


@pytest.mark.parametrize(
    ("format", "scales"), [("mxfp4", ((96, 15), "U8")), ("int8", ((96, 1), "BF16")), ("int4", ((96, 15), "BF16"))]
)
def test_packed_ones_are_as_large_as_floats(format: str, scales: tuple[tuple[int, ...], str]) -> None:
    """Of mean 0 and 1 / sqrt(in), within what a scale of a power of two allows, and codes of -8 to 7."""
    here = Path()
    parts = (TensorInfo("d", "U8", (1,), 1, here, 0), TensorInfo("s", scales[1], scales[0], 1, here, 0))
    infos = TensorInfo("w", format, (96, 480), 1, here, 0, parts=parts), TensorInfo("w", "F32", (96, 480), 1, here, 0)
    packed, floats = (decode(draw(i, seed=3, device=torch.device("cpu")), torch.float32) * 480**0.5 for i in infos)
    assert abs(floats.std() - 1) < 0.02 and 0.7 < packed.std() < 1.5
    assert abs(packed.mean()) < 0.12 * packed.std() and packed.isfinite().all()


def test_without_a_tokenizer_bytes_are_tokens(tmp_path: Path) -> None:
    _, folder = bare("llama", tmp_path)
    llm = LLM(folder, weights="random", **ASKED)
    params = SamplingParams(temperature=0, max_new_tokens=5, ignore_eos=True)
    (output,) = llm.generate([[5, 6, 7]], params)
    assert len(output.outputs[0].token_ids) == 5
    assert llm.tokenizer.encode("Aé\n") == list("Aé\n".encode())
    assert llm.tokenizer.decode("Aé\n".encode()) == "Aé\n"


def test_with_one_it_is_used_and_weights_are_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path, LLAMA)
    (folder / "model.safetensors").write_bytes(b"no header")
    llm = LLM(folder, weights="random", **ASKED)
    assert len(llm.generate("the", SamplingParams(max_new_tokens=3, ignore_eos=True)).outputs[0].token_ids) == 3
    assert "<s>" in llm.tokenizer.special_tokens.values()


def test_what_has_no_shapes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"m.gguf: random weights take their shapes from a folder with a config"):
        LLM(tmp_path / "m.gguf", weights="random")
    with pytest.raises(CheckpointError, match=r"config.json: is missing"):
        open_random(tmp_path)
    with pytest.raises(ConfigError, match="weights: must be one of checkpoint, random, got 'dummy'"):
        LLM(tmp_path, weights="dummy")
