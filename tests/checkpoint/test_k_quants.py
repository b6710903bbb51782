"""A GGUF mixed as llama.cpp's Q4_K_M is: it loads, and runs, as its blocks are."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from slipstream import LLM, SamplingParams
from slipstream.ops import native
from tests.checkpoint.blocks import super_blocks
from tests.parity.test_architectures import all_logits

HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, LAYERS = 256, 512, 301, 4, 2, 2
SHAPES = {
    "attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN // 2, HIDDEN), "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER),
}  # fmt: skip


@pytest.fixture(scope="module", params=["Q4_K", "Q5_K"])
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Values, half of the down projections and the embedding, which is the head too, in Q6_K; all else in `param`."""
    writer = gguf.GGUFWriter(path := tmp_path_factory.mktemp("k") / "tiny.gguf", "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["t", "1", "t1", *(f"<{i}>" for i in range(3, VOCAB))])
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges(["t 1"])

    def put(name: str, format: str, out: int, width: int, size: float) -> None:
        data = super_blocks(format, out, width, sum(name.encode()), size)
        if format != "Q6_K":  # offsets that leave about as many numbers below zero as above
            data.reshape(out, -1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[format]][1])[..., 2:4] = (
                np.frombuffer(np.float16(size * (7 if format == "Q4_K" else 15)).tobytes(), np.uint8)
            )
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[format])

    put("token_embd.weight", "Q6_K", VOCAB, HIDDEN, 4e-4)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for i in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.linspace(0.5, 1.5, HIDDEN, dtype=np.float32))
        for name, (out, width) in SHAPES.items():
            six = name == "attn_v" or (name == "ffn_down" and i == 1)
            put(f"blk.{i}.{name}.weight", "Q6_K" if six else request.param, out, width, 4e-5 if six else 2e-4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("lengths", [(5, 2), (37, 11)])  # so few tokens are multiplied by the blocks; so many, unpacked
def test_logits_are_those_of_the_dequantized(mixed: Path, lengths: tuple[int, int]) -> None:
    if isinstance(why := native.build("blocks"), str):
        pytest.skip(why)
    options = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "kv_cache_memory_bytes": 4 << 20}
    kept, widened = (LLM(mixed, **options, quantization=q) for q in ("auto", "dequantize"))
    formats = {item.to: item.formats for item in kept.plan.loads}
    main = next(f for f in ("Q4_K", "Q5_K") if f in str(formats))
    assert set(formats["embed.weight"]) == set(formats["head.weight"]) == {"Q6_K"}
    assert formats["layers.0.attention.qkv.weight"] == (main, main, "Q6_K")
    assert {c.name for c in kept.plan.choices if c.op in (f"linear[{main}]", "linear[Q6_K]")} == {"blocks"}
    assert "widened" not in str(kept.plan.why) and kept.plan.weights_bytes < 0.25 * widened.plan.weights_bytes
    draw = np.random.default_rng(sum(lengths))
    prompts = [draw.integers(3, VOCAB, n).tolist() for n in lengths]
    for mine, want in zip(all_logits(kept, prompts), all_logits(widened, prompts), strict=True):
        assert 0.3 < want.std() < 30 and mine.shape == (len(mine), VOCAB)
        torch.testing.assert_close(mine, want, rtol=0, atol=1e-4)


def test_it_writes_tokens_in_bfloat16(mixed: Path) -> None:
    if isinstance(why := native.build("blocks"), str):
        pytest.skip(why)
    llm = LLM(mixed, device="cpu", max_model_len=64, kv_cache_memory_bytes=4 << 20)
    assert llm.plan.dtype is torch.bfloat16
    ((answer,),) = (
        o.outputs for o in llm.generate([[5, 9]], SamplingParams(temperature=0, max_new_tokens=9, ignore_eos=True))
    )
    assert len(answer.token_ids) == 9 and answer.finish_reason == "length"
