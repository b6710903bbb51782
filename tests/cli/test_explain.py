"""`explain --tensor-parallel-size`: what it says of ranks is what they have, and what they say to each other in a step."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from slipstream.checkpoint.load import load
from slipstream.checkpoint.open import open_checkpoint
from slipstream.config import EngineConfig
from slipstream.engine import warm
from slipstream.engine.runner import Runner
from slipstream.parallel.collectives import Together, gather_into
from slipstream.parallel.shares import Ranks
from slipstream.plan import Plan, make_plan
from tests.cli.conftest import Run
from tests.parity.tiny import TINY, save

WORDS = ("--dtype", "float32", "--kv-cache-memory-bytes", "8MiB", "--max-model-len", 128, "--device", "cpu")
ASKED = {"dtype": "float32", "kv_cache_memory_bytes": 8 << 20, "max_model_len": 128, "device": "cpu"}


@pytest.fixture(autouse=True)
def nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started"))
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: pytest.fail("a group was made"))


def plan_of(folder: Path, rank: int, size: int, **options: Any) -> Plan:
    return make_plan(EngineConfig(**{**ASKED, **options}), open_checkpoint(folder), ranks=Ranks(rank, size))


@pytest.mark.parametrize(
    ("name", "size", "spread"), [("llama-biases-tied", 4, False), ("gpt_oss", 2, False), ("gpt_oss", 3, True)]
)
def test_bytes_and_ranges_are_those_of_the_ranks(
    slipstream: Run, tmp_path: Path, name: str, size: int, spread: bool
) -> None:
    save(name, tmp_path)
    more = ["--enable-expert-parallel"] if spread else []
    got = slipstream("explain", tmp_path, *WORDS, "--tensor-parallel-size", size, *more, "--json").json
    plans = [plan_of(tmp_path, r, size, tensor_parallel_size=size, enable_expert_parallel=spread) for r in range(size)]
    said = got["parallel"]
    assert said["ranks"] == size and said["experts"] == ("spread" if spread else "cut")
    assert said["weights_bytes"] == [p.weights_bytes for p in plans]
    least = min(range(size), key=lambda r: plans[r].num_pages)
    assert plans[got["largest_rank"]].num_pages == plans[least].num_pages
    assert got["bytes"]["weights"] == plans[got["largest_rank"]].weights_bytes
    assert [p["parameter"] for p in said["parameters"]] == [i.to for i in plans[0].loads]
    for i, p in enumerate(said["parameters"]):
        for plan, rank in zip(plans, p["ranks"], strict=True):
            item = plan.loads[i]
            assert rank["bytes"] == plan.held[i]
            shape = list(item.shape)
            if p["dim"] is not None:
                shape[p["dim"]] = sum(b - a for a, b in rank["ranges"])
            assert shape == list(plan.model.get_parameter(item.to).shape)
    out = slipstream("explain", tmp_path, *WORDS, "--tensor-parallel-size", size, *more).out
    assert "layers.*.attention.qkv.weight" in out and "the largest" in out and "whole, added by rank 0 alone" in out
    assert ("enable_expert_parallel" in out) == spread and ("experts" in out) == (name == "gpt_oss")
    if spread:
        assert "0-1 | 2-3 | 4-4" in out and "All-to-all of rows that" in out


@pytest.mark.parametrize("seqs", [9, 2])
@pytest.mark.parametrize("name", ["llama", "olmo2", "gemma2", "qwen3_moe", "gpt_oss"])
def test_collectives_are_those_of_a_step(
    slipstream: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, seqs: int
) -> None:
    """A step of 9 tokens on one of three ranks, with nobody to talk to: of 9 sequences, or of two prompts."""
    save(name, tmp_path)
    words = ("--tensor-parallel-size", 3, "--max-num-batched-tokens", 9, "--max-num-seqs", seqs, "--json")
    steps = {s["tokens"]: s for s in slipstream("explain", tmp_path, *WORDS, *words).json["parallel"]["steps"]}
    assert sorted(steps) == [1, 9]
    plan = plan_of(tmp_path, 0, 3, max_num_batched_tokens=9, max_num_seqs=seqs)
    load(plan.model, plan.loads, open_checkpoint(tmp_path), plan.device)
    for tokens, step in steps.items():
        seen: Counter[tuple[str, int]] = Counter()

        def speak(
            _: object, say: object, x: torch.Tensor, *more: object, seen: Counter[tuple[str, int]] = seen
        ) -> None:
            seen["all_gather" if say is gather_into else "all_reduce", x.nbytes] += 1
            if say is gather_into:
                x.zero_()
            else:
                assert say is dist.all_reduce

        monkeypatch.setattr(Together, "_speak", speak)
        parts = [(0, 1)] * tokens if tokens <= seqs else [(0, 4), (0, 5)]
        with torch.inference_mode():
            warm._run(Runner(plan, plan.model), parts)
        want: Counter[tuple[str, int]] = Counter()
        for c in step["collectives"]:
            want[c["kind"], c["bytes"]] += c["calls"]
        assert seen == want
        assert step["bytes"] == sum(n * nbytes for (_, nbytes), n in seen.items())


def test_what_does_not_fit_here_is_told_all_the_same(slipstream: Run, tmp_path: Path) -> None:
    """gpt-oss-120b from its config.json: half of the model each, less than 0.53 of it with what is on every rank."""
    config = {
        "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36, "vocab_size": 201088,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 128, "attention_bias": True,
        "num_experts_per_tok": 4, "sliding_window": 128, "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ("--weights", "random", "--device", "cpu", "--gpu-memory-utilization", 0.001)
    for more in ([], ["--enable-expert-parallel"]):
        ran = slipstream("explain", tmp_path, *words, "--tensor-parallel-size", 2, *more, "--json")
        assert ran.code == 5 and "does not fit" in ran.err
        got = ran.json["parallel"]
        whole = 36 * 128 * 2880 * 2880 * 3 * 17 // 32
        assert 0.5 * whole < max(got["weights_bytes"]) < 0.53 * (whole + 3 * 10**9)
        assert got["steps"][0]["collectives"][1] == {
            "of": "attention", "kind": "all_reduce", "calls": 36, "bytes": 5760, "bytes_sent_by_a_rank": 36 * 5760,
        }  # fmt: skip
    ran = slipstream("explain", tmp_path, *words, "--tensor-parallel-size", 4)
    assert ran.code == 5 and "0-735 | 736-1471 | 1472-2175 | 2176-2879" in ran.out


def test_what_cannot_be_shared(slipstream: Run, model: str) -> None:
    ran = slipstream("explain", model, "--tensor-parallel-size", 5)
    assert ran.code == 2 and "--tensor-parallel-size: 5 ranks cannot share 4 heads" in ran.err
    ran = slipstream("explain", model, "--tensor-parallel-size", 2, "--enable-expert-parallel")
    assert ran.code == 2 and "--enable-expert-parallel: a llama model has no experts" in ran.err
    ran = slipstream("explain", model, "--enable-expert-parallel")
    assert ran.code == 2 and "--enable-expert-parallel: a llama model has no experts" in ran.err
    assert len(TINY) > 12
