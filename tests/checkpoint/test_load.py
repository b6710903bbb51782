"""From headers to a filled model: what fits, what is refused and how, and the same model from every format."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slipstream.checkpoint.load import load
from slipstream.checkpoint.open import open_checkpoint
from slipstream.checkpoint.tensors import TensorInfo
from slipstream.config import EngineConfig
from slipstream.errors import CheckpointError, KernelError
from slipstream.layers.linear import Embedding
from slipstream.ops.formats import encode
from slipstream.plan import Plan, make_plan
from slipstream.plan.weights import held_bytes
from slipstream.quantization.quantize import quantize
from tests.checkpoint.test_gguf_names import MODELS, build, to_gguf
from tests.engine.tiny import LLAMA, write
from tests.parity.tiny import save

ASKED = EngineConfig(dtype="float32", kv_cache_memory_bytes=1 << 22, max_model_len=32, quantization="dequantize")
Spoil = Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]


def plan_of(path: Path, **changes: Any) -> Plan:
    return make_plan(replace(ASKED, **changes), open_checkpoint(path))


def filled(path: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Every tensor of the loaded model, also those that an op has laid out."""
    plan = plan_of(path, **changes)
    load(plan.model, plan.loads, open_checkpoint(path), plan.device)
    found = dict(plan.model.named_parameters())
    for name, module in plan.model.named_modules():
        packed = [t for _, tensors in getattr(module, "parts", ()) for t in tensors]
        packed += [t for tensors in getattr(module, "packed", ()) for t in tensors]
        packed += [module.held.data] if isinstance(module, Embedding) else []  # type: ignore[union-attr]
        found |= {f"{name}.{i}": t for i, t in enumerate(packed)}
    return found


@pytest.fixture
def spoiled(tmp_path: Path) -> Callable[[str, Spoil], Path]:
    def make(name: str, spoil: Spoil) -> Path:
        save(name, tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        config = json.loads((tmp_path / "config.json").read_text())
        spoil(tensors, config)
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return make


@pytest.mark.parametrize("name", [n for n in MODELS if "27b" not in n and "longrope" not in n])
def test_gguf_makes_the_same_model_as_safetensors(name: str, tmp_path: Path) -> None:
    arch, config = build(name, tmp_path / "hf")
    path = to_gguf(arch, config, open_checkpoint(tmp_path / "hf"), tmp_path / "m.gguf", lambda w: None)
    want, got = filled(tmp_path / "hf"), filled(path)
    assert got.keys() == want.keys() and len(got) > 10
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=3e-7)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda t, c: t.pop("model.layers.1.mlp.up_proj.weight"), ["missing 1", "layers.1.mlp.up_proj.weight"]),
        (lambda t, c: t.pop("lm_head.weight"), ["missing 1", "lm_head.weight"]),
        (
            lambda t, c: t.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(96)}),
            ["left over 1", "q_proj.bias"],
        ),
        (lambda t, c: c.update(attention_bias=True), ["missing", "q_proj.bias"]),
        (lambda t, c: c.update(intermediate_size=45), ["up_proj.weight", "[90, 60]"]),
        (lambda t, c: c.update(num_attention_heads=4), ["q_proj.weight", "[96, 60]"]),
        (lambda t, c: t.update({"model.norm.weight": torch.ones(61)}), ["model.norm.weight", "[61]", "[60]"]),
        (lambda t, c: t.update({"model.norm.weight": torch.ones(60, dtype=torch.int8)}), ["model.norm.weight", "I8"]),
        (lambda t, c: c.update(num_hidden_layers=2), ["says 2 layers", "of 3"]),
        (lambda t, c: c.update(num_hidden_layers=4), ["says 4 layers", "of 3"]),
        (lambda t, c: c.update(model_type="qwen3"), ["missing 6", "q_norm.weight"]),
        (lambda t, c: c.update(model_type="olmo2"), ["left over 3", "input_layernorm"]),
        (lambda t, c: c.update(quantization_config={"quant_method": "gptq"}), ["'gptq'", "not supported"]),
    ],
)
def test_what_does_not_fit_is_named(spoiled: Callable[[str, Spoil], Path], spoil: Spoil, says: list[str]) -> None:
    path = spoiled("llama", spoil)
    with pytest.raises(CheckpointError) as e:
        plan_of(path)
    assert all(part in str(e.value) for part in [*says, str(path)]), str(e.value)


def test_a_tied_head_may_lie_in_the_file_but_must_be_the_embedding(spoiled: Callable[[str, Spoil], Path]) -> None:
    def repeat(t: dict[str, torch.Tensor], c: dict[str, Any]) -> None:
        assert "lm_head.weight" not in t
        t["lm_head.weight"] = t["model.embed_tokens.weight"].clone()

    def differ(t: dict[str, torch.Tensor], c: dict[str, Any]) -> None:
        repeat(t, c)
        t["lm_head.weight"][3, 5] += 1e-3

    path = spoiled("llama-biases-tied", repeat)
    model = filled(path)
    assert model["head.0"].data_ptr() == model["embed.0"].data_ptr()
    path = spoiled("llama-biases-tied", differ)
    with pytest.raises(CheckpointError, match="ties the head to the embedding, but lm_head.weight differs"):
        filled(path)


@pytest.mark.parametrize("to", ["int4", "int8", "mxfp4"])
def test_a_tied_head_that_is_packed_must_have_the_same_scales_too(to: str, tmp_path: Path) -> None:
    write(tmp_path / "floats", LLAMA | {"tie_word_embeddings": True, "intermediate_size": 64})
    quantize(tmp_path / "floats", tmp_path / "packed", to=to)
    (tmp_path / "packed" / "slipstream.json").unlink()
    path = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.embed_tokens.weight"]
    for part in ("packed", "scale"):
        rows = tensors[f"model.layers.0.mlp.up_proj.weight_{part}"].repeat(3, 1)[:131]  # as wide
        tensors[f"model.embed_tokens.weight_{part}"], tensors[f"lm_head.weight_{part}"] = rows, rows.clone()
    if to != "mxfp4":
        tensors |= {f"{n}.weight_shape": torch.tensor([131, 32]) for n in ("model.embed_tokens", "lm_head")}
    save_file(tensors, path)
    filled(path.parent, quantization="auto")
    tensors["lm_head.weight_scale"][130] += 1
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="ties the head to the embedding, but lm_head.weight differs"):
        filled(path.parent, quantization="auto")


def test_what_is_no_matrix_is_not_widened_unasked(tmp_path: Path) -> None:
    """GGUF may hold a bias or a norm in blocks, though no converter writes that."""
    checkpoint = open_checkpoint(write(tmp_path, LLAMA))
    packed = TensorInfo("model.norm.weight", "MXFP4", (32,), 17, tmp_path / "blocks", 0)
    packed.file.write_bytes(bytes([128, *range(3, 19)]))
    checkpoint = replace(checkpoint, tensors=checkpoint.tensors | {packed.name: packed})
    with pytest.raises(KernelError, match=r"norm\.weight arrives as MXFP4, and only matrices are held packed"):
        make_plan(replace(ASKED, quantization="auto"), checkpoint)
    plan = make_plan(ASKED, checkpoint)
    load(plan.model, plan.loads, replace(checkpoint, kind="gguf"), plan.device)
    want = gguf.quants.dequantize(np.fromfile(packed.file, np.uint8), gguf.GGMLQuantizationType.MXFP4)
    assert plan.model.norm.weight.tolist() == want.tolist()


def test_what_arrived_packed_is_never_encoded_again(tmp_path: Path) -> None:
    """In one matrix (queries, keys, values): groups of two sizes, or packed ones beside floats that are to be packed."""
    write(tmp_path / "floats", LLAMA | {"hidden_size": 128, "intermediate_size": 160})
    quantize(tmp_path / "floats", tmp_path / "queries", to="int4", modules=["*.q_proj"], group_size=64)
    quantize(tmp_path / "queries", tmp_path / "all", to="int4", group_size=32)
    stem = "model.layers.2.self_attn."
    for name, quantization in (("all", "auto"), ("queries", "int4")):
        checkpoint = open_checkpoint(tmp_path / name)
        plan = plan_of(tmp_path / name, quantization=quantization, linear_implementation="reference")
        load(plan.model, plan.loads, checkpoint, plan.device)
        (_, (_, queries, scales)), (_, (_, others, _)) = plan.model.layers[2].attention.qkv.parts
        want = checkpoint.read_weight(f"{stem}q_proj.weight")
        assert torch.equal(queries, want.data) and torch.equal(scales, want.scales)
        floats = open_checkpoint(tmp_path / "floats")
        keys = encode(torch.cat([floats.read(f"{stem}{x}_proj.weight") for x in "kv"]), "int4", 32)
        assert torch.equal(others, keys.data)
        item = next(i for i in plan.loads if i.to == "layers.2.attention.qkv.weight")
        assert held_bytes(item, plan.ops) == want.nbytes + keys.nbytes


def test_only_the_vision_part_of_a_model_that_sees_is_left_out(spoiled: Callable[[str, Spoil], Path]) -> None:
    assert plan_of(spoiled("gemma3-vision", lambda t, c: None)).loads
    path = spoiled("gemma3-vision", lambda t, c: t.update({"audio_tower.weight": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"left over 1 \(audio_tower.weight\)"):
        plan_of(path)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "model."])
def test_the_text_part_under_every_prefix(spoiled: Callable[[str, Spoil], Path], prefix: str) -> None:
    def rename(t: dict[str, torch.Tensor], c: dict[str, Any]) -> None:
        for name in list(t):
            t[name.replace("language_model.model.", prefix).replace("vision_tower.", "model.vision_tower.")] = t.pop(
                name
            )

    got, want = filled(spoiled("gemma3-vision", rename)), filled(spoiled("gemma3-vision", lambda t, c: None))
    assert all(torch.equal(got[k], want[k]) for k in want) and got.keys() == want.keys()


@pytest.mark.parametrize(
    ("name", "change"), [("llama", {"num_hidden_layers": 4096}), ("mixtral", {"num_local_experts": 65536})]
)
def test_a_config_of_absurd_size_is_refused_at_once(
    spoiled: Callable[[str, Spoil], Path], name: str, change: dict[str, int]
) -> None:
    path = spoiled(name, lambda t, c: c.update(change))
    start = time.process_time()
    with pytest.raises(CheckpointError):
        plan_of(path)
    assert time.process_time() - start < 2
