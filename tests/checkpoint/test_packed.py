"""Packed weights of safetensors: as gpt-oss is published, as compressed-tensors writes them, and every way to spoil them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.checkpoint.open import Checkpoint, open_checkpoint
from slipstream.checkpoint.packed import gather
from slipstream.checkpoint.support import refuse_quantized
from slipstream.checkpoint.tensors import DENSE, TensorInfo
from slipstream.errors import CheckpointError
from slipstream.ops.formats import decode

PUBLISHED = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
    ],
}  # fmt: skip
PATH = Path("/somewhere/model")


def infos(**tensors: tuple[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    """Headers without a file; "__" stands for a dot."""
    names = {n.replace("__", "."): v for n, v in tensors.items()}
    return {
        n: TensorInfo(n, dtype, shape, math.prod(shape) * DENSE[dtype][0], PATH / f"{i}.safetensors", 1000 * i)
        for i, (n, (dtype, shape)) in enumerate(names.items())
    }


def group(bits: int = 4, **changes: Any) -> dict[str, Any]:
    """One of config_groups as the library writes it."""
    own = {"num_bits": 4, "strategy": "group", "group_size": 64} if bits == 4 else {}
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "group_size": None, "symmetric": True} | own
    weights |= {"dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax"}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    for name, value in changes.items():
        (weights if name in weights or name == "scale_dtype" else scheme)[name] = value
    return scheme


def said(*groups: dict[str, Any], format: str = "pack-quantized", **changes: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors."""
    return {
        "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {f"group_{i}": g for i, g in enumerate(groups or (group(),))}, "kv_cache_scheme": None,
        "global_compression_ratio": None, "sparsity_config": {}, "transform_config": {}, "version": "0.20.0", **changes,
    }  # fmt: skip


INT4 = {"a__weight_packed": ("I32", (3, 24)), "a__weight_scale": ("BF16", (3, 3)), "a__weight_shape": ("I64", (2,))}
INT8 = {"b__weight": ("I8", (5, 7)), "b__weight_scale": ("BF16", (5, 1))}
MXFP4 = {"c__weight_packed": ("U8", (7, 48)), "c__weight_scale": ("U8", (7, 3))}
EXPERTS = {"x_proj_blocks": ("U8", (3, 5, 2, 16)), "x_proj_scales": ("U8", (3, 5, 2))}
OTHERS = {"norm__weight": ("BF16", (11,)), "x_proj_bias": ("BF16", (3, 5))}
ALL = said(
    group(format="pack-quantized"),
    group(8, format="int-quantized"),
    group(type="float", group_size=32, scale_dtype="torch.uint8", format="mxfp4-pack-quantized"),
    format="mixed-precision",
)


def test_all_formats_of_compressed_tensors_in_one_file() -> None:
    tensors = infos(**OTHERS, **INT4, **INT8, **MXFP4)
    got = gather(tensors, {"quantization_config": ALL}, PATH)
    assert list(got) == ["norm.weight", "x_proj_bias", "a.weight", "b.weight", "c.weight"]
    assert all(name == t.name for name, t in got.items())
    assert {n: (t.dtype, t.format, t.shape) for n, t in got.items()} == {
        "norm.weight": ("BF16", "dense", (11,)),
        "x_proj_bias": ("BF16", "dense", (3, 5)),
        "a.weight": ("int4", "int4", (3, 192)),
        "b.weight": ("int8", "int8", (5, 7)),
        "c.weight": ("mxfp4", "mxfp4", (7, 96)),
    }
    for name, data in (("a", "a.weight_packed"), ("b", "b.weight"), ("c", "c.weight_packed")):
        t = got[f"{name}.weight"]
        assert t.is_quantized and t.parts == (tensors[data], tensors[f"{name}.weight_scale"])
        assert t.nbytes == sum(p.nbytes for p in t.parts)
        assert (t.file, t.offset) == (tensors[data].file, tensors[data].offset)
    assert not got["norm.weight"].is_quantized and got["norm.weight"].parts == ()


def test_int8_packed_beside_int4() -> None:
    """Both are I32; the scales tell which is which."""
    int8 = {"b__weight_packed": ("I32", (5, 7)), "b__weight_scale": ("BF16", (5, 1)), "b__weight_shape": ("I64", (2,))}
    config = said(group(), group(8, format="pack-quantized"))
    got = gather(infos(**INT4, **int8), {"quantization_config": config}, PATH)
    assert {n: (t.format, t.shape) for n, t in got.items()} == {
        "a.weight": ("int4", (3, 192)), "b.weight": ("int8", (5, 28)),
    }  # fmt: skip


def test_gpt_oss_as_published(tmp_path: Path) -> None:
    """Names, dtypes and shapes of gpt-oss-20b; a file with a hole in the place of its gigabytes."""
    layer = "model.layers.1."
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "lm_head.weight": ("BF16", (201088, 2880)),
        f"{layer}mlp.experts.down_proj_bias": ("BF16", (32, 2880)),
        f"{layer}mlp.experts.down_proj_blocks": ("U8", (32, 2880, 90, 16)),
        f"{layer}mlp.experts.down_proj_scales": ("U8", (32, 2880, 90)),
        f"{layer}mlp.experts.gate_up_proj_bias": ("BF16", (32, 5760)),
        f"{layer}mlp.experts.gate_up_proj_blocks": ("U8", (32, 5760, 90, 16)),
        f"{layer}mlp.experts.gate_up_proj_scales": ("U8", (32, 5760, 90)),
        f"{layer}mlp.router.weight": ("BF16", (32, 2880)),
        f"{layer}self_attn.sinks": ("BF16", (64,)),
    }
    at, header = 0, {}
    for name, (dtype, shape) in shapes.items():
        size = math.prod(shape) * DENSE[dtype][0]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + at)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_oss", "quantization_config": PUBLISHED}))
    found = open_checkpoint(tmp_path)
    refuse_quantized(found, "mxfp4")
    assert len(found.tensors) == 7 and found.total_bytes == at
    up, down = (found.tensors[f"{layer}mlp.experts.{n}_proj_blocks"] for n in ("gate_up", "down"))
    assert (up.dtype, up.shape, up.nbytes) == ("mxfp4", (32, 5760, 2880), 32 * 5760 * 90 * 17)
    assert (down.dtype, down.shape, down.nbytes) == ("mxfp4", (32, 2880, 2880), 32 * 2880 * 90 * 17)


def test_nothing_packed_is_left_alone() -> None:
    tensors = infos(**OTHERS, b__weight=("I8", (5, 7)))
    assert gather(tensors, {}, PATH) == gather(tensors, {"quantization_config": None}, PATH) == tensors


@pytest.mark.parametrize("part", [*INT4, "b__weight_scale", *MXFP4, *EXPERTS])
def test_parts_without_a_config(part: str) -> None:
    tensors = infos(**{**INT4, **INT8, **MXFP4, **EXPERTS})
    name = part.replace("__", ".")
    with pytest.raises(CheckpointError, match="no quantization_config") as e:
        gather({name: tensors[name]}, {}, PATH)
    assert repr(name) in str(e.value)


@pytest.mark.parametrize("config", [PUBLISHED, ALL])
def test_a_config_without_parts(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="no tensor is packed"):
        gather(infos(**OTHERS), {"quantization_config": config}, PATH)


Change = tuple[str, tuple[str, tuple[int, ...]] | None]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("a__weight_scale", None), "lacks its scales 'a.weight_scale'"),
        (("b__weight_scale", None), "lacks its scales 'b.weight_scale'"),
        (("c__weight_scale", None), "lacks its scales 'c.weight_scale'"),
        (("a__weight_packed", None), "'a.weight_scale' is part of no whole packed weight"),
        (("b__weight", None), "'b.weight_scale' is part of no whole packed weight"),
        (("c__weight_packed", None), "'c.weight_scale' is part of no whole packed weight"),
        (("a__weight_shape", None), "lacks its '.weight_shape'"),
        (("a__weight_shape", ("I32", (2,))), "lacks its '.weight_shape'"),
        (("a__weight_shape", ("I64", (3,))), "lacks its '.weight_shape'"),
        (("d__weight_shape", ("I64", (2,))), "'d.weight_shape' is part of no whole packed weight"),
        (("x_proj_blocks", ("U8", (3, 5, 2, 16))), "'x_proj_blocks' is part of no whole packed weight"),
        (("a__weight_scale", ("F16", (3, 3))), "'a.weight_scale' is F16, and scales of int4 must be BF16"),
        (("b__weight_scale", ("F32", (5, 1))), "'b.weight_scale' is F32, and scales of int8 must be BF16"),
        (("c__weight_scale", ("BF16", (7, 3))), "'c.weight_scale' is BF16, and scales of mxfp4 must be U8"),
        (("a__weight_scale", ("BF16", (3, 4))), r"[3, 4] does not fit 'a.weight_packed', [3, 24] I32"),
        (("a__weight_scale", ("BF16", (3, 6))), "with a scale for 64 weights of a row"),  # groups of 32
        (("a__weight_scale", ("BF16", (2, 3))), "does not fit"),
        (("a__weight_scale", ("BF16", (3,))), "does not fit"),
        (("a__weight_scale", ("BF16", (3, 3, 1))), "does not fit"),
        (("a__weight_scale", ("BF16", ())), "does not fit"),
        (("a__weight_packed", ("I32", (3, 25))), "does not fit"),
        (("b__weight_scale", ("BF16", (5, 7))), "with a scale for all weights of a row"),
        (("b__weight_scale", ("BF16", (5,))), "does not fit"),
        (("c__weight_scale", ("U8", (7, 6))), "with a scale for 32 weights"),
        (("c__weight_packed", ("U8", (7, 47))), "does not fit"),
        (("a__weight_packed", ("I32", (72,))), "is no weight in int4"),
        (("a__weight_packed", ("I32", (3, 0))), "is no weight in int4"),
        (("c__weight_packed", ("U8", (0, 48))), "is no weight in mxfp4"),
        (("c__weight_packed", ("U8", (7, 3, 16))), "is no weight in mxfp4"),
        (("b__weight", ("I8", (35,))), "is no weight in int8"),
        (("b__weight", ("U8", (5, 7))), "'b.weight_scale' is part of no whole packed weight"),
        (("a__weight_packed", ("I64", (3, 24))), "'a.weight_packed' is I64, which is not what quantization_config"),
        (("a__weight", ("BF16", (3, 192))), "'a.weight' is there twice"),
        (("a__weight_zero_point", ("I32", (1, 3))), "'a.weight_zero_point' means codes that are not symmetric"),
        (("a__weight_g_idx", ("I32", (192,))), "'a.weight_g_idx' means columns in the order of activations"),
        (("c__weight_global_scale", ("F32", (1,))), "a second scale, of the scales (NVFP4)"),
        (("c__input_global_scale", ("F32", (1,))), "quantized activations, which is not supported; take the model"),
    ],
)
def test_parts_that_do_not_fit(change: Change, says: str) -> None:
    parts: dict[str, Any] = {**INT4, **INT8, **MXFP4, change[0]: change[1]}
    tensors = infos(**OTHERS, **{n: v for n, v in parts.items() if v is not None})
    with pytest.raises(CheckpointError) as e:
        gather(tensors, {"quantization_config": ALL}, PATH)
    assert says in str(e.value) and str(PATH) in str(e.value), str(e.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("x_proj_scales", None), "lacks its scales 'x_proj_scales'"),
        (("y_proj_scales", ("U8", (3, 5, 2))), "'y_proj_scales' is part of no whole packed weight"),
        (("x_proj_scales", ("U8", (3, 5, 3))), "does not fit"),
        (("x_proj_scales", ("BF16", (3, 5, 2))), "must be U8"),
        (("x_proj_blocks", ("U8", (3, 5, 16, 2))), "is no weight in mxfp4"),
        (("x_proj_blocks", ("U8", (5, 2, 16))), "is no weight in mxfp4"),
        (("x_proj_blocks", ("U8", (3, 5, 0, 16))), "is no weight in mxfp4"),
        (("x_proj_blocks", ("I8", (3, 5, 2, 16))), "'x_proj_blocks' is I8"),
        (("c__weight_packed", ("U8", (7, 48))), "'c.weight_packed' is part of no whole packed weight"),
    ],
)
def test_experts_that_do_not_fit(change: Change, says: str) -> None:
    parts: dict[str, Any] = {**EXPERTS, change[0]: change[1]}
    with pytest.raises(CheckpointError) as e:
        gather(infos(**{n: v for n, v in parts.items() if v is not None}), {"quantization_config": PUBLISHED}, PATH)
    assert says in str(e.value)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            "quantized by 'gptq', which is not supported; take the model in bfloat16",
        ),
        ({"quant_method": "awq"}, "'awq'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
        ({"quant_method": "fp8"}, "'fp8'"),
        (said(format="float-quantized"), "config_groups.group_0.format 'float-quantized' is not supported"),
        (said(format="mixed-precision"), "config_groups.group_0.format 'mixed-precision'"),
        (said(group(format="nvfp4-pack-quantized")), "'nvfp4-pack-quantized'"),
        (said(group(input_activations={"num_bits": 8})), "input_activations"),
        (said(group(output_activations={"num_bits": 8})), "output_activations"),
        (said(group(num_bits=5)), "weights.num_bits '5' is not supported"),
        (said(group(num_bits=8)), "weights.strategy 'group'"),  # int8 in groups
        (said(group(type="float")), "weights.type 'float'"),
        (said(group(symmetric=False)), "weights.symmetric 'False'"),
        (said(group(dynamic=True)), "weights.dynamic"),
        (said(group(group_size=16)), "weights.group_size '16'"),
        (said(group(group_size=64.0)), "weights.group_size"),
        (said(group(strategy="channel")), "weights.strategy 'channel'"),
        (said(group(actorder="group")), "weights.actorder 'group'"),
        (said(group(block_structure=[128, 128])), "weights.block_structure"),
        (said(group(8, strategy="tensor"), format="int-quantized"), "weights.strategy 'tensor'"),
        (said(group(8, group_size=128), format="int-quantized"), "weights.group_size '128'"),
        (said(group(type="float", group_size=16), format="mxfp4-pack-quantized"), "weights.group_size '16'"),
        (said(group(), group(format="float-quantized")), "group_1.format"),
        (said(quantization_status="frozen"), "quantization_status 'frozen'"),
        (said(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (said(transform_config={"config_groups": {}}), "transform_config"),
        (said(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
        (said(moe_sparsity_config={"a": 1}), "moe_sparsity_config"),
    ],
)
def test_what_is_quantized_in_other_ways_can_be_looked_at_but_not_run(config: dict[str, Any], says: str) -> None:
    tensors = infos(**OTHERS, **INT4, q__qweight=("I32", (3, 4)), e__weight_scale_inv=("F32", (3, 4)))
    assert gather(tensors, {"quantization_config": config}, PATH) == tensors
    found = Checkpoint(PATH, "safetensors", {"quantization_config": config}, tensors)
    with pytest.raises(CheckpointError, match="or a GGUF of it") as e:
        refuse_quantized(found, config["quant_method"])
    assert says in str(e.value) and str(PATH) in str(e.value)


@pytest.mark.parametrize(
    "config",
    [
        said(),
        said(group(actorder="weight")),
        said(group(format="pack-quantized"), format="anything"),
        said(group(group_size=32), group(group_size=64), group(group_size=128)),
        said(sparsity_config={"format": "dense", "global_sparsity": 0.1}, ignore=None, quantization_status=None),
    ],
)
def test_what_changes_nothing_is_let_through(config: dict[str, Any]) -> None:
    assert list(gather(infos(**INT4), {"quantization_config": config}, PATH)) == ["a.weight"]
    refuse_quantized(Checkpoint(PATH, "safetensors", {"quantization_config": config}, {}), "compressed-tensors")


@pytest.mark.parametrize(
    "config",
    [
        {}, [], "mxfp4", 4, {"quant_method": 4}, {"quant_method": ["mxfp4"]}, PUBLISHED | {"modules_to_not_convert": "x"},
        PUBLISHED | {"modules_to_not_convert": [1]}, said(ignore=[None]), said() | {"config_groups": {}},
        said() | {"config_groups": []}, said() | {"config_groups": {"W4A16": ["Linear"]}}, said(group(weights=None)),
        said(group(weights=[])),
    ],
)  # fmt: skip
def test_a_malformed_config(config: Any) -> None:
    with pytest.raises(CheckpointError, match="config.json: .* must be"):
        gather(infos(**INT4), {"quantization_config": config}, PATH)


def test_messages_stay_short() -> None:
    long: list[Any] = ["x" * 100_000, {"x" * 100_000: 1}, ["y"] * 50_000]
    configs: list[Any] = [{"quant_method": long[0]}, *long[1:], said() | {"config_groups": {long[0]: 1}}]
    for value in long:
        configs += [said(group(group_size=value)), said(group(format=value)), said(group(actorder=value))]
        configs += [said(kv_cache_scheme=value), said(ignore=value if isinstance(value, str) else [value])]
    for config in configs:
        with pytest.raises(CheckpointError) as e:
            gather(infos(**INT4), {"quantization_config": config}, PATH)
            refuse_quantized(Checkpoint(PATH, "safetensors", {"quantization_config": config}, {}), "x")
        assert len(str(e.value)) < 1000


KINDS: dict[str, tuple[dict[str, Any], str | None]] = {
    "int4": ({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}, None),
    "int8": ({"num_bits": 8, "type": "int", "strategy": "channel"}, None),
    "int8-unpacked": ({"num_bits": 8, "type": "int", "strategy": "channel"}, "int-quantized"),
    "mxfp4": (
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
        None,
    ),
}


@pytest.mark.parametrize("format", KINDS)
def test_a_model_that_compressed_tensors_packed(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its names, its shapes, and its numbers to the last bit."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    from tests.parity import tiny

    sizes = {"hidden_size": 160, "intermediate_size": 96, "num_attention_heads": 4}  # rows of 160, 96 and 64
    monkeypatch.setitem(tiny.TINY, "llama-packed", ("Llama", sizes))
    weights, stored = KINDS[format]
    model = tiny.save("llama-packed", tmp_path).bfloat16()
    plain = open_checkpoint(tmp_path)
    config = QuantizationConfig(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]
    )
    apply_quantization_config(model, config)
    linears = {n: m for n, m in model.named_modules() if hasattr(m, "quantization_scheme")}
    for m in linears.values():
        groups = m.weight.detach().view(len(m.weight), -1, weights.get("group_size", m.weight.shape[1]))
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), m.quantization_scheme.weights)
        m.weight_scale.data.copy_(scale)
    library = ModelCompressor.from_pretrained_model(model, stored)
    library.compress_model(model)
    model.save_pretrained(tmp_path)
    library.update_config(tmp_path)

    found = open_checkpoint(tmp_path)
    refuse_quantized(found, "compressed-tensors")
    assert {n: t.shape for n, t in found.tensors.items()} == {n: t.shape for n, t in plain.tensors.items()}
    assert {n for n, t in found.tensors.items() if t.is_quantized} == {f"{n}.weight" for n in linears}
    assert len(linears) == 21
    library.decompress_model(model)
    for name, m in linears.items():
        weight = found.read_weight(f"{name}.weight")
        assert weight.format == format.removesuffix("-unpacked")
        assert torch.equal(decode(weight, torch.bfloat16), m.weight)


def test_experts_as_transformers_reads_them(tmp_path: Path) -> None:
    """transformers' own reading of blocks and scales gives the same numbers; its experts are (experts, in, out)."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    from safetensors.torch import save_file

    rng = torch.Generator().manual_seed(6)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8, generator=rng)
    scales = torch.randint(100, 150, (3, 10, 2), dtype=torch.uint8, generator=rng)
    save_file({"gate_up_proj_blocks": blocks, "gate_up_proj_scales": scales}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": PUBLISHED}))
    weight = open_checkpoint(tmp_path).read_weight("gate_up_proj_blocks")
    assert weight.shape == (3, 10, 64) and torch.equal(weight.data, blocks)
    theirs = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    assert torch.equal(theirs.transpose(1, 2), decode(weight, torch.bfloat16))
