"""gpt-oss in MXFP4 as published, against transformers with the same weights dequantized by transformers itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from slipstream import LLM, SamplingParams
from slipstream.ops.formats import encode
from tests.parity.test_architectures import all_logits
from tests.parity.tiny import NEW_TOKENS, PROMPT_LENGTHS, TINY, save

# Pairwise different, and multiples of 32 where blocks run along them. 160 / 32 is odd.
SIZES = {"hidden_size": 160, "intermediate_size": 96, "vocab_size": 97}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mxfp4") / "gpt_oss"
    kind, changes = TINY["gpt_oss"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY, "gpt_oss", (kind, changes | SIZES))
        save("gpt_oss", path)
    publish(path)
    return path


def publish(path: Path) -> None:
    """Turns a gpt-oss folder of transformers into what OpenAI publishes: experts in blocks, (experts, out, in / 32, 16)."""
    tensors = load_file(path / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        weight = encode(tensors.pop(name).transpose(1, 2).contiguous(), "mxfp4")
        assert weight.scales is not None
        tensors |= {f"{name}_blocks": weight.data, f"{name}_scales": weight.scales}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (path / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> transformers.GptOssForCausalLM:
    return (
        transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=transformers.Mxfp4Config(dequantize=True),
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
        )
        .float()
        .eval()
    )  # its dequantization leaves bfloat16, in which MXFP4 is exact


@torch.no_grad()
@pytest.mark.parametrize("quantization", ["auto", "dequantize"])
@pytest.mark.parametrize("linear", [None, "unpacked", "reference"])
def test_logits_and_greedy_tokens(
    folder: Path, theirs: transformers.GptOssForCausalLM, quantization: str, linear: str | None
) -> None:
    if quantization == "dequantize" and linear == "unpacked":
        pytest.skip("it takes packed weights only")
    torch.manual_seed(5)
    prompts = [torch.randint(SIZES["vocab_size"], (1, n)) for n in PROMPT_LENGTHS]
    llm = LLM(
        folder, dtype="float32", kv_cache_memory_bytes=8 << 20, max_model_len=128, quantization=quantization,
        linear_implementation=linear,
    )  # fmt: skip
    formats = {i.held for i in llm.plan.loads if len(i.shape) == 3}
    assert formats == ({"mxfp4"} if quantization == "auto" else {"dense"})
    for mine, prompt in zip(all_logits(llm, [p[0].tolist() for p in prompts]), prompts, strict=True):
        want = theirs(prompt).logits[0]
        assert want.abs().max() > 1
        torch.testing.assert_close(mine, want, rtol=0, atol=1e-4)
    params = SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    outputs = llm.generate([p[0].tolist() for p in prompts], params)
    answers = [
        theirs.generate(
            p, attention_mask=torch.ones_like(p), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1
        )
        for p in prompts
    ]
    assert [o.outputs[0].token_ids for o in outputs] == [
        a[0, p.shape[1] :].tolist() for a, p in zip(answers, prompts, strict=True)
    ]
