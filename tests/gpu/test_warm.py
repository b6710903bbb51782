"""Kernels compiled ahead on a card: serving then compiles nothing, and a second start has nothing to do. And `tune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton

from slipstream import LLM, SamplingParams
from slipstream.ops import tuned
from slipstream.tuning.run import tune
from tests.gpu.test_engine import SHAPE

pytestmark = pytest.mark.gpu
DENSE = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 999, "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
}  # fmt: skip
OPTIONS: dict[str, Any] = {
    "weights": "random", "device": "cuda", "max_model_len": 3000, "max_num_seqs": 40, "max_num_batched_tokens": 2048,
}  # fmt: skip


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that Triton compiles, into an empty cache."""
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "kernels"))
    forget()
    found: list[str] = []

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            found.append(src.name)

    monkeypatch.setattr(triton.knobs.compilation, "listener", listen)
    return found


def forget() -> None:
    """Kernels that this process has: as in a fresh one, they are to be looked for on the disk."""
    import gc

    from triton.runtime.jit import JITFunction

    for thing in gc.get_objects():
        if isinstance(thing, JITFunction):
            thing.device_caches.clear()


def answers(llm: LLM) -> list[list[int]]:
    """Prompts of many lengths, alone and together, answers that grow beside them, greedy and drawn."""
    vocab = llm.model_config.vocab_size
    prompts = [
        [(7 * i + j) % vocab for j in range(n)] for i, n in enumerate((1, 2, 3, 9, 31, 64, 130, 500, 2050, 2700))
    ]
    params = [
        SamplingParams(temperature=0.8 * (i % 2), seed=i, max_new_tokens=12, ignore_eos=True)
        for i in range(len(prompts))
    ]
    found = [llm.generate([prompt], p)[0].outputs[0].token_ids for prompt, p in zip(prompts, params, strict=True)]
    return [*found, *(o.outputs[0].token_ids for o in llm.generate_batch(prompts * 4, params * 4))]


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("config", [SHAPE, DENSE], ids=["gpt_oss", "llama"])
def test_serving_compiles_nothing(
    config: dict[str, Any], graphs: bool, tmp_path: Path, compiled: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    told: list[tuple[int, int]] = []
    options = OPTIONS | {"enforce_eager": not graphs}
    llm = LLM(tmp_path, compiling=lambda done, total: told.append((done, total)), **options)
    assert told[-1][0] == told[-1][1] == len(set(told)) >= 8 and len(compiled) >= 8
    assert "compiled once" in llm.plan.why["kernels"] and "cannot" not in llm.plan.why["kernels"], llm.plan.why
    with capsys.disabled():
        print(f"\n{llm.plan.why['kernels']}")
    compiled.clear()
    first = answers(llm)
    assert compiled == [], "these were compiled while requests waited"
    forget()
    told.clear()
    again = LLM(tmp_path, compiling=lambda done, total: told.append((done, total)), **options)
    assert again.plan.why["kernels"].startswith("compiled before") and told == [] == compiled
    assert answers(again) == first and compiled == []


def test_tune_writes_what_loads_read(tmp_path: Path, compiled: list[str]) -> None:
    config = SHAPE | {"num_local_experts": 32, "hidden_size": 640, "intermediate_size": 320}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = tune(str(tmp_path), OPTIONS, lambda text: None)
    card = torch.cuda.get_device_name()
    assert found.card == card and found.path == tmp_path / "home" / "tuned.json"
    assert {line.op for line in found.lines} == {"moe", "linear"}
    assert all(0 < line.after_us <= line.before_us for line in found.lines if line.op == "moe")
    table = tuned.read(found.path)[card]
    assert list(table.moe) == ["mxfp4 32 x 640 x 640"] and all(0 <= few <= 64 for few in table.linear.values())
    llm = LLM(tmp_path, **OPTIONS)
    assert "slipstream tune" in llm.plan.why["tiles"]
    assert llm.plan.ops.experts.kernel.experts.keywords["tuned"] == table.moe["mxfp4 32 x 640 x 640"]  # type: ignore[attr-defined]
    assert len(answers(llm)) == 50
