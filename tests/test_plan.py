"""The plan: what it predicts is what is held, and what it decides it can explain."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slipstream import LLM, SamplingParams
from slipstream.cache.budget import choose_page_size
from slipstream.cache.spec import CacheGroup
from slipstream.checkpoint.open import open_checkpoint
from slipstream.config import EngineConfig
from slipstream.errors import CapacityError, ConfigError, KernelError
from slipstream.ops.formats import Weight
from slipstream.plan import Plan, make_plan
from slipstream.plan.weights import held_bytes
from tests.engine import tiny


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("hybrid"), tiny.HYBRID)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("tied"), tiny.LLAMA | {"tie_word_embeddings": True})


def plan(folder: Path, **options: Any) -> Plan:
    return make_plan(EngineConfig(**{"device": "cpu", **options}), open_checkpoint(folder))


def held_by(model: nn.Module) -> int:
    """Bytes of all memory that the modules reach: parameters and whatever kernels made of them, each piece once."""
    seen: dict[int, int] = {}

    def look(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            size = value.numel() * value.element_size()
            if value.layout is torch._mkldnn:  # type: ignore[attr-defined]
                seen[id(value)] = size
            else:
                seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (tuple, list)):
            for v in value:
                look(v)
        elif isinstance(value, Weight):
            look((value.data, value.scales))

    for module in model.modules():
        for value in (*vars(module).values(), *module._parameters.values(), *module._buffers.values()):
            look(value)
    return sum(seen.values())


# Bytes.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["hybrid", "tied"])
def test_dense_bytes_are_those_held(request: pytest.FixtureRequest, name: str, dtype: str) -> None:
    llm = LLM(request.getfixturevalue(name), device="cpu", dtype=dtype, kv_cache_memory_bytes=300_000, max_model_len=99)
    assert llm.engine.runner.storage.nbytes == llm.plan.kv_bytes <= 300_000
    assert llm.plan.weights_bytes == pytest.approx(held_by(llm.plan.model), rel=0.01)


def test_tied_weights_are_counted_once(tied: Path, tmp_path: Path) -> None:
    apart = plan(tiny.write(tmp_path, tiny.LLAMA), dtype="float32", max_model_len=64)
    together = plan(tied, dtype="float32", max_model_len=64)
    assert apart.weights_bytes - together.weights_bytes == 131 * 32 * 4


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16", "quantization": "dequantize"}, {"dtype": "float32"}])
def test_gguf_bytes_are_those_held(smollm2: Path, options: dict[str, Any]) -> None:
    llm = LLM(smollm2, device="cpu", max_model_len=64, kv_cache_memory_bytes=16 << 20, **options)
    assert llm.engine.runner.storage.nbytes == llm.plan.kv_bytes <= 16 << 20
    assert llm.plan.weights_bytes == pytest.approx(held_by(llm.plan.model), rel=0.01)


def test_a_shared_weight_that_is_laid_out_anew_counts_twice(smollm2: Path) -> None:
    triton = pytest.importorskip("slipstream.ops.linear.triton", exc_type=ImportError)
    p = plan(smollm2, max_model_len=64)
    (head,) = (item for item in p.loads if item.shared)
    assert head.held == "Q8_0" and held_bytes(head, p.ops) == 0  # the C kernel takes the embedding's blocks
    assert held_bytes(head, dataclasses.replace(p.ops, linear=lambda *_: triton.Triton())) == head.sources[0].nbytes


def test_pages_use_what_they_are_given_but_no_more(hybrid: Path) -> None:
    for budget in (120_000, 777_777, 2_000_000):
        p = plan(hybrid, kv_cache_memory_bytes=budget, max_model_len=100, max_num_batched_tokens=32, page_size=16)
        page = [16 * g.bytes_per_token(4) for g in p.groups]
        assert budget - 2 * sum(page) < p.kv_bytes <= budget
        for g, n in zip(p.groups, p.num_pages, strict=True):
            assert n >= g.max_pages(100, 32, 16)


def test_no_more_pages_than_can_be_used(hybrid: Path) -> None:
    p = plan(hybrid, kv_cache_memory_bytes=1 << 40, max_model_len=100, max_num_seqs=3, page_size=8)
    full, sliding = p.groups
    assert p.num_pages[0] == 3 * full.max_pages(100, 2048, 8)
    assert p.num_pages[1] <= 3 * sliding.max_pages(100, 1, 8) + sliding.max_pages(100, 2048, 8)


def test_a_full_house_of_the_planned_size_never_preempts(hybrid: Path) -> None:
    """All that max_num_seqs requests of max_model_len can hold at once is what the largest plan reserves."""
    llm = LLM(
        hybrid, kv_cache_memory_bytes=1 << 30, max_model_len=60, max_num_seqs=4, page_size=4, max_num_batched_tokens=50
    )
    params = SamplingParams(temperature=0, max_new_tokens=20, ignore_eos=True)
    llm.generate([[5 + i] * 40 for i in range(9)], params)
    assert llm.engine.scheduler.counters.preemptions == 0


@pytest.mark.parametrize("without", [(), ("blocks",)])
def test_gguf_bytes_of_every_kernel(smollm2: Path, monkeypatch: pytest.MonkeyPatch, without: tuple[str, ...]) -> None:
    from slipstream.ops import linear

    monkeypatch.setattr(linear, "IMPLS", tuple(i for i in linear.IMPLS if i.name not in without))
    llm = LLM(smollm2, device="cpu", max_model_len=64, kv_cache_memory_bytes=16 << 20, dtype="bfloat16")
    assert not {c.name for c in llm.plan.choices} & set(without)
    assert llm.plan.weights_bytes == pytest.approx(held_by(llm.plan.model), rel=0.01)


# Capacity.


def test_a_length_that_does_not_fit_is_refused_with_numbers(hybrid: Path) -> None:
    with pytest.raises(CapacityError) as caught:
        plan(hybrid, max_model_len=500, kv_cache_memory_bytes=50_000)
    message = str(caught.value)
    assert "500" in message and "kv_cache_memory_bytes" in message and len(re.findall(r"\d", message)) > 6
    assert not re.search(r"\b0\.000 GiB", message), "numbers that say nothing: " + message


def test_the_default_length_shrinks_and_says_so(hybrid: Path) -> None:
    p = plan(hybrid, kv_cache_memory_bytes=100_000)
    assert 1 < p.max_model_len < 512 and p.kv_bytes <= 100_000
    assert str(p.max_model_len) in p.why["max_model_len"] and "512" in p.why["max_model_len"]
    with pytest.raises(CapacityError):
        plan(hybrid, kv_cache_memory_bytes=100_000, max_model_len=p.max_model_len + 1)
    assert plan(hybrid, kv_cache_memory_bytes=100_000, max_model_len=p.max_model_len).num_pages == p.num_pages
    assert plan(hybrid, kv_cache_memory_bytes=1 << 24).max_model_len == 512


def test_bytes_for_not_even_two_tokens(hybrid: Path) -> None:
    with pytest.raises(CapacityError, match="10 bytes for keys and values hold no two tokens"):
        plan(hybrid, kv_cache_memory_bytes=10)


def test_more_than_the_models_positions(hybrid: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_model_len: 513 .* 512"):
        plan(hybrid, max_model_len=513)


def test_a_model_larger_than_the_memory(hybrid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slipstream.hardware._available_memory", lambda: 1000)
    with pytest.raises(CapacityError, match="does not fit"):
        plan(hybrid)


# Choices.


def test_devices_that_are_not_there(hybrid: Path) -> None:
    with pytest.raises(ConfigError, match="device"):
        plan(hybrid, device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"cuda:3 .* no CUDA"):
            plan(hybrid, device="cuda:3")
        assert plan(hybrid, device="auto").device.type == "cpu"
        assert "CUDA" in plan(hybrid, device="auto").why["device"]
    if not torch.backends.mps.is_available():
        with pytest.raises(ConfigError, match="mps"):
            plan(hybrid, device="mps")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"linear_implementation": "onednn", "dtype": "float32"}, ("onednn", "float32")),
        ({"linear_implementation": "int4pack"}, ("int4pack", "dense")),
        ({"linear_implementation": "cutlass"}, ("cutlass", "torch")),
        ({"attn_implementation": "flash"}, ("flash", "sdpa", "reference")),
    ],
)
def test_forced_but_cannot_run(hybrid: Path, options: dict[str, Any], named: tuple[str, ...]) -> None:
    with pytest.raises(KernelError) as caught:
        plan(hybrid, **options)
    assert all(n in str(caught.value) for n in named), caught.value


def test_sdpa_cannot_be_forced_on_soft_capped_scores(tmp_path: Path) -> None:
    from slipstream.config import ModelConfig

    raw = tiny.BASE | {"model_type": "gemma2", "head_dim": 8, "attn_logit_softcapping": 30.0}
    config = ModelConfig.from_hf(raw)
    checkpoint = open_checkpoint(tiny.write(tmp_path, tiny.LLAMA))
    with pytest.raises(KernelError, match="soft-capping"):
        make_plan(EngineConfig(device="cpu", attn_implementation="sdpa"), checkpoint, config)


def test_a_forced_choice_is_taken_and_says_so(hybrid: Path) -> None:
    p = plan(hybrid, attn_implementation="reference", linear_implementation="reference", max_model_len=64)
    for op in ("attention", "linear[dense]"):
        (choice,) = (c for c in p.choices if c.op == op)
        assert (choice.name, choice.reason) == ("reference", "forced")
        assert all(why for _, why in choice.rejected)


def test_every_choice_says_why_each_other_one_lost(hybrid: Path) -> None:
    from slipstream.ops import activation, attention, attention_input, linear, norm, sampling

    p = plan(hybrid, max_model_len=64)
    homes = {"activation": activation, "attention": attention, "attention_input": attention_input, "linear": linear,
             "norm": norm, "sampling": sampling}  # fmt: skip
    assert {c.op.split("[")[0] for c in p.choices} == set(homes)
    for c in p.choices:
        every = {i.name for i in homes[c.op.split("[")[0]].IMPLS}
        assert {c.name, *(n for n, _ in c.rejected)} == every and c.name not in {n for n, _ in c.rejected}
        assert c.reason and all(len(why) > 5 for _, why in c.rejected)


@pytest.mark.parametrize(
    ("windows", "size"), [((None,), 16), ((None, 128), 16), ((4096,), 16), ((None, 64, 4096), 8), ((9,), 4)]
)
def test_pages_suit_the_windows(windows: tuple[int | None, ...], size: int) -> None:
    """A window's pages, wherever it begins in them, hold at most an eighth more than the window."""
    groups = [CacheGroup(w, (0,), 1, 16) for w in windows]
    why: dict[str, str] = {}
    assert choose_page_size(EngineConfig(), groups, why) == size and why["page_size"]
    for g in groups:
        if g.window is not None and size > 4:
            assert g.max_pages(10**6, 1, size) * size <= g.window * 9 / 8
    assert choose_page_size(EngineConfig(page_size=7), groups, why) == 7 and why["page_size"] == "asked for"


def test_every_decision_has_a_reason(hybrid: Path) -> None:
    assert {"device", "dtype", "kv_cache", "max_model_len", "page_size"} <= set(plan(hybrid, max_model_len=64).why)


# Quantized weights.


def test_widening_is_named(smollm2: Path) -> None:
    p = plan(smollm2, quantization="dequantize", max_model_len=64)
    widened = {k: v for k, v in p.why.items() if "widened" in k}
    assert widened and all("quantization='dequantize'" in v for v in widened.values())
    assert {name.split(" widened")[0] for name in widened} == {i.arrived for i in p.loads if i.widened} >= {"Q4_1"}
    assert all(i.held == "dense" for i in p.loads)


@pytest.mark.parametrize("quantization", ["auto", "mxfp4", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_nothing_is_widened_unasked(smollm2: Path, quantization: str, dtype: str) -> None:
    p = plan(smollm2, quantization=quantization, dtype=dtype, max_model_len=64)
    assert "widened" not in json.dumps(p.to_dict())
    for item in p.loads:
        for held, source in zip(item.formats, item.sources, strict=True):
            assert held in (source.format, quantization)
            assert held != "dense" or not source.is_quantized
    assert p.weights_bytes < plan(smollm2, quantization="dequantize", max_model_len=64).weights_bytes


@pytest.mark.parametrize("made", ["mxfp4", "int8", "int4"])
def test_what_is_made_while_loading_is_counted_before(smollm2: Path, made: str) -> None:
    llm = LLM(smollm2, quantization=made, kv_cache_memory_bytes=1 << 24, max_model_len=64)
    assert llm.plan.weights_bytes == pytest.approx(held_by(llm.plan.model), rel=0.01)
    assert {i.held for i in llm.plan.loads if ".mlp." in i.to} == {made}
    assert "tensors are quantized as they load" in llm.plan.why["quantization"]


def test_what_cannot_run_says_what_widening_costs(hybrid: Path) -> None:
    """IQ4_XS has no kernel: an error with both sizes, and the way out that it names works. Headers are enough."""
    checkpoint = open_checkpoint(hybrid)
    name = "model.layers.0.self_attn.o_proj.weight"
    changed = dataclasses.replace(checkpoint.tensors[name], dtype="IQ4_XS", nbytes=136 << 20)
    checkpoint = dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, name: changed})
    with pytest.raises(
        KernelError,
        match=r"as IQ4_XS\. IQ4_XS: reference .*\. quantization='dequantize' would hold packed ones .* 0\.13 GiB",
    ):
        make_plan(EngineConfig(device="cpu", max_model_len=64), checkpoint)
    widened = make_plan(EngineConfig(device="cpu", max_model_len=64, quantization="dequantize"), checkpoint)
    assert "IQ4_XS widened to bfloat16" in widened.why


def test_what_cannot_be_made_is_an_error(hybrid: Path) -> None:
    with pytest.raises(ConfigError, match="multiple of 32"):  # rows of 60
        plan(hybrid, quantization="mxfp4", max_model_len=64)
    with pytest.raises(
        ConfigError, match="quantization: must be one of auto, dequantize, mxfp4, int8, int4, got 'none'"
    ):
        plan(hybrid, quantization="none")


# As plain values.


@pytest.mark.parametrize("name", ["hybrid", "tied"])
def test_to_dict_is_json(request: pytest.FixtureRequest, name: str) -> None:
    p = plan(request.getfixturevalue(name), max_model_len=64, kv_cache_memory_bytes=500_000)
    d = json.loads(json.dumps(p.to_dict()))
    assert d["bytes"]["total"] == d["bytes"]["weights"] + d["bytes"]["kv_cache"] + d["bytes"]["workspace"]
    assert d["bytes"]["kv_cache"] == sum(g["bytes"] for g in d["cache_groups"]) == p.kv_bytes
    assert d["bytes"]["weights"] == sum(w["bytes"] for w in d["weights"])
    assert sum(w["parameters"] for w in d["weights"]) == len(p.loads)
    assert [g["pages"] for g in d["cache_groups"]] == list(p.num_pages)
    assert d["why"] == p.why and d["dtype"] == "float32"


def test_a_plan_takes_no_memory(hybrid: Path) -> None:
    assert all(x.is_meta for x in plan(hybrid, max_model_len=64).model.parameters())


def test_a_forced_linear_goes_wherever_it_can_and_is_an_error_where_it_never_can(smollm2: Path) -> None:
    checkpoint = open_checkpoint(smollm2)
    plan = make_plan(EngineConfig(linear_implementation="int4pack"), checkpoint)
    assert {c.name for c in plan.choices if c.op.startswith("linear")} == {"int4pack"}
    with pytest.raises(KernelError, match="nosuch"):
        make_plan(EngineConfig(linear_implementation="nosuch"), checkpoint)
    with pytest.raises(KernelError, match="'onednn' can run none of the weights"):
        make_plan(EngineConfig(linear_implementation="onednn"), checkpoint)


@pytest.mark.parametrize("device", ["auto:3", "cpu:x", "cuda:abc", "cuda:", "tpu", ""])
def test_a_device_that_is_no_device(device: str) -> None:
    with pytest.raises(ConfigError, match="device"):
        EngineConfig(device=device)
