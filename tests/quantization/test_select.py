"""Which tensors are converted, by name and shape alone."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from slipstream import ConfigError, quantize
from slipstream.quantization.select import Selection

L = "model.layers.7."
TAKEN = [
    (L + "self_attn.q_proj.weight", (96, 64)),
    (L + "self_attn.qkv_proj.weight", (96, 64)),
    (L + "self_attn.o_proj.weight", (64, 96)),
    (L + "mlp.gate_up_proj.weight", (128, 64)),
    (L + "mlp.down_proj.weight", (64, 32)),
    (L + "mlp.experts.11.up_proj.weight", (32, 64)),
    (L + "block_sparse_moe.experts.1.w1.weight", (32, 64)),
    (L + "mlp.experts.gate_up_proj", (5, 64, 32)),
    (L + "mlp.experts.down_proj_blocks", (5, 64, 32)),
    ("language_model.model.layers.0.mlp.up_proj.weight", (32, 64)),
    ("model.language_model.layers.0.mlp.up_proj.weight", (32, 64)),
]
NEVER = [
    ("model.embed_tokens.weight", (97, 64)),
    ("lm_head.weight", (97, 64)),
    ("model.norm.weight", (64,)),
    (L + "input_layernorm.weight", (64,)),
    (L + "self_attn.q_norm.weight", (32,)),
    (L + "self_attn.q_proj.bias", (96,)),
    (L + "self_attn.sinks", (6,)),
    (L + "mlp.gate.weight", (5, 64)),
    (L + "mlp.router.weight", (5, 64)),
    (L + "mlp.router.bias", (5,)),
    (L + "block_sparse_moe.gate.weight", (5, 64)),
    (L + "mlp.experts.gate_up_proj_bias", (5, 64)),
    (L + "mlp.experts.0.up_proj.bias", (64,)),
    ("model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight", (64, 64)),
    (L + "mlp.up_proj.weight", (0, 64)),
    (L + "mlp.down_proj.weight", (64, 0)),
    ("model.layers.x.self_attn.q_proj.weight", (96, 64)),
]


@pytest.mark.parametrize("format", ["mxfp4", "int8", "int4"])
def test_linear_layers_of_the_decoder_and_nothing_else(format: str) -> None:
    by_default, named = Selection(format, "llama"), Selection(format, "llama", modules=("*",))
    for selection in (by_default, named):
        assert [name for name, shape in TAKEN + NEVER if selection.takes(name, shape)] == [name for name, _ in TAKEN]


def test_gpt_oss_to_mxfp4_takes_the_experts_alone() -> None:
    experts = [name for name, _ in TAKEN if ".experts." in name]
    assert [n for n, s in TAKEN if Selection("mxfp4", "gpt_oss").takes(n, s)] == experts
    assert [n for n, s in TAKEN if Selection("int8", "gpt_oss").takes(n, s)] == [n for n, _ in TAKEN]
    attention = Selection("mxfp4", "gpt_oss", modules=("*.self_attn.*",))
    assert [n for n, s in TAKEN if attention.takes(n, s)] == [n for n, _ in TAKEN[:3]]


def test_patterns() -> None:
    selection = Selection("int8", "llama", modules=("*.mlp.*", "*q_proj"), skip=("*.experts.*",))
    assert [n for n, s in TAKEN if selection.takes(n, s)] == [TAKEN[i][0] for i in (0, 3, 4, 9, 10)]


def test_a_matrix_has_two_dims_and_a_stack_three() -> None:
    assert not Selection("int8", "llama").takes(L + "mlp.up_proj.weight", (3, 32, 64))
    assert not Selection("int8", "llama").takes(L + "mlp.experts.gate_up_proj", (32, 64))


def shapes(*widths: int) -> dict[str, tuple[int, ...]]:
    return {f"model.layers.{i}.mlp.up_proj.weight": (7, width) for i, width in enumerate(widths)}


@pytest.mark.parametrize(
    ("format", "widths", "asked", "group"),
    [
        ("int4", (256, 128), None, 128), ("int4", (256, 192), None, 64), ("int4", (256, 96), None, 32),
        ("int4", (256, 192), 32, 32), ("int8", (4, 36), None, 0), ("mxfp4", (96, 32), None, 0),
    ],
)  # fmt: skip
def test_one_group_for_the_model(format: str, widths: tuple[int, ...], asked: int | None, group: int) -> None:
    assert Selection(format, "llama", group_size=asked).check(shapes(*widths)) == group


def test_the_rows_of_floats_in_a_stack_are_its_columns() -> None:
    stack = {"model.layers.0.mlp.experts.gate_up_proj": (5, 64, 33)}
    assert Selection("mxfp4", "gpt_oss").check(stack) == 0
    blocks = {"model.layers.0.mlp.experts.gate_up_proj_blocks": (5, 64, 33)}
    with pytest.raises(ConfigError, match="multiple of 32"):
        Selection("mxfp4", "gpt_oss").check(blocks)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "fp8"}, "to: must be one of mxfp4, int8, int4"),
        ({"modules": "mlp"}, "modules: must be a list"),
        ({"skip": ("",)}, "skip: must be a list"),
        ({"group_size": 64}, "only int4 has groups"),
        ({"format": "int4", "group_size": 16}, "group_size: must be one of 32, 64, 128"),
        ({"modules": ("*.mpl.*",)}, r"modules: '\*.mpl.\*' matches none.*there is model.layers.0.mlp.up_proj"),
        ({"skip": ("mlp.up_proj",)}, r"skip: 'mlp.up_proj' matches none.*'\*mlp.up_proj\*' would"),
        ({"skip": ("model.*",)}, "nothing is left"),
        ({}, r"2 modules do not have: model.layers.1.mlp.up_proj \(48\), .*--skip '\*.up_proj'"),
        ({"format": "int4", "group_size": 128}, r"multiple of 128 weights, which 3 modules"),
    ],
)
def test_what_cannot_be_asked(changes: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Selection(**{"format": "mxfp4", "model_type": "llama", **changes}).check(shapes(64, 48, 33))


@pytest.mark.parametrize("option", ["modules", "skip"])
@pytest.mark.parametrize("given", ["*.mlp.*", None, 5])
def test_patterns_are_a_list(option: str, given: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{option}: must be a list of patterns .* got {re.escape(repr(given))}"):
        quantize("no/model", "out", **{option: given})


def test_it_needs_no_torch() -> None:
    code = "import slipstream.quantization.select, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
