"""Two cards that share a model. Run with: pytest -m multi_gpu tests/gpu"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import LLM, SamplingParams
from slipstream.errors import RankError
from tests.gpu.test_engine import SHAPE
from tests.parity import tiny as parity
from tests.parity.test_mxfp4 import SIZES, publish

pytestmark = pytest.mark.multi_gpu
ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[(7 * i + j) % 90 for j in range(3 + 9 * i)] for i in range(7)]  # tokens of the smallest vocabulary
PARAMS = SamplingParams(temperature=0, max_new_tokens=24, ignore_eos=True)
NAMES = ["llama", "gpt_oss", "qwen3_moe", "gemma2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("cards")
    for name in NAMES:
        parity.save(name, home / name)
    return {name: home / name for name in NAMES}


def load(folder: Path, size: int, **options: Any) -> LLM:
    given = {"device": "cuda", "dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, **options}
    return LLM(folder, tensor_parallel_size=size, **given)


def answers(llm: LLM) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [{}, {"enforce_eager": True}, {"async_scheduling": False}, {"enforce_eager": True, "async_scheduling": False}],
    ids=str,
)
def test_tokens_are_those_of_one_card(folders: dict[str, Path], name: str, options: dict[str, Any]) -> None:
    want = answers(load(folders[name], 1))
    assert answers(load(folders[name], 2, **options)) == want


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}], ids=str)
def test_experts_are_spread(folders: dict[str, Path], name: str, options: dict[str, Any]) -> None:
    want = answers(load(folders[name], 1))
    llm = load(folders[name], 2, enable_expert_parallel=True, **options)
    assert answers(llm) == want
    assert llm.engine.expert_load()


def test_penalties_count_the_same_tokens(folders: dict[str, Path]) -> None:
    """Tokens are chosen on each card, which has to know what was chosen before."""
    kinds = [{"repetition_penalty": 1.8}, {"presence_penalty": 1.5}, {"logprobs": 1}, {"temperature": 0.9, "seed": 3}]
    params = [PARAMS.replace(**kind) for kind in kinds]
    found = []
    for size in (1, 2):
        llm = load(folders["llama"], size)
        found.append([o.outputs[0].token_ids for o in llm.generate_batch(PROMPTS[:4], params, progress=False)])
        del llm
    assert found[0] == found[1]


def test_mxfp4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, changes = parity.TINY["gpt_oss"]
    monkeypatch.setitem(parity.TINY, "gpt_oss", (kind, changes | SIZES))
    parity.save("gpt_oss", tmp_path / "model")
    publish(tmp_path / "model")
    assert answers(load(tmp_path / "model", 2)) == answers(load(tmp_path / "model", 1))


def test_collectives_are_in_the_graphs(folders: dict[str, Path]) -> None:
    llm = load(folders["llama"], 2)  # experts this small are called one by one, for which no step is recorded
    first = answers(llm)
    decoder = llm.engine.runner.decoder
    assert decoder is not None and decoder.recorded
    assert [answers(llm) for _ in range(3)] == [first] * 3


def test_sums_through_shared_memory_are_those_of_nccl() -> None:
    """And can be had: cards of one machine reach each other's memory."""
    ran = subprocess.run(
        [sys.executable, ROOT / "benchmarks/sums.py"], capture_output=True, text=True, timeout=150,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout.splitlines()[-1])
    assert said["why_not"] is None and all("shared memory, with norm" in us for us in said["us"].values()), said


@pytest.mark.parametrize("name", NAMES)
def test_both_ways_of_sums_give_the_same_tokens(folders: dict[str, Path], name: str) -> None:
    found = {}
    for way in ("peers", "collective"):
        llm = load(folders[name], 2, reduce_implementation=way)
        assert {c.op: c.name for c in llm.plan.choices}["reduce"] == way
        found[way] = answers(llm)
        began = time.monotonic()
        del llm
        gc.collect()
        assert time.monotonic() - began < 8, "it parts in order, and waits for nothing"
    assert found["peers"] == found["collective"]


def test_bytes_of_a_rank(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    one = load(tmp_path, 1, weights="random", dtype="bfloat16").plan.weights_bytes
    two = load(tmp_path, 2, weights="random", dtype="bfloat16").plan.weights_bytes
    assert two < 0.7 * one  # of a shape this small norms and routers, which all have, are much


@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}], ids=str)
@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP], ids=lambda v: v.name)
def test_a_rank_that_is_lost_in_a_step(folders: dict[str, Path], what: signal.Signals, options: dict[str, Any]) -> None:
    """Rank 0 does not wait for ever in a kernel of NCCL, and its card is of use again."""
    llm = load(folders["llama"], 2, **options)
    stream = llm.submit(PROMPTS[0], PARAMS.replace(max_new_tokens=200))
    deltas = iter(stream)
    for _ in range(5):
        next(deltas)
    os.kill(llm.engine.runner._crew._others.ranks[0].process.pid, what)  # type: ignore[union-attr]
    began = time.monotonic()
    with pytest.raises(RankError, match="rank 1 "):
        for _ in deltas:
            pass
    assert time.monotonic() - began < 30
    with pytest.raises(RankError, match="rank 1 "):
        answers(llm)
    del llm
    torch.cuda.synchronize()
    assert answers(load(folders["llama"], 2)) == answers(load(folders["llama"], 1))
