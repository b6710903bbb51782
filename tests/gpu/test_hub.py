"""Kernels of a repository, and kernelize, on a CUDA device. Run: pytest -m gpu tests/gpu/test_hub.py"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from slipstream import LLM, SamplingParams
from slipstream.bench.kernels import bench_kernels
from slipstream.bridge import kernelize
from tests.bridge.test_kernelize import ids, logits, make
from tests.engine import tiny
from tests.ops import repositories as repos

pytestmark = pytest.mark.gpu
GREEDY = SamplingParams(max_new_tokens=9, temperature=0, ignore_eos=True)


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository of benchmarks/hub_kernel.py."""
    pytest.importorskip("kernels")
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path / "home"))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.chdir(tmp_path)
    import hub_kernel

    return hub_kernel.publish(tmp_path / "demo", "cuda")


def test_a_triton_repository_in_recorded_steps(demo: Path, tmp_path: Path) -> None:
    model, prompts = tiny.write(tmp_path / "model", tiny.LLAMA), [[3, 9, 27, 81, 12], [5, 7], [9]]
    pins = repos.pin(tmp_path, demo)
    llm = LLM(model, device="cuda", dtype="bfloat16", kernels={"norm": str(demo)}, count_calls=True, **pins)
    assert llm.plan.cuda_graphs and llm.plan.ops.used is not None
    for _ in range(2):  # the first records, the second only replays
        llm.plan.ops.used.calls.clear()
        got = llm.generate(prompts, GREEDY)
        norm = llm.plan.ops.used.calls["norm", str(demo)]
        assert norm % 9 == 0 and norm >= 9 * 9
        assert llm.plan.ops.used.calls["attention", "triton"] * 9 == norm * 4
    plain = LLM(model, device="cuda", dtype="bfloat16").generate(prompts, GREEDY)
    same = [a.outputs[0].token_ids[:3] == b.outputs[0].token_ids[:3] for a, b in zip(got, plain, strict=True)]
    assert sum(same) >= 2  # a sum in another order may turn a token now and then


@pytest.mark.parametrize("op", ["norm", "activation", "attention", "moe", "rotary"])
def test_our_own_are_measured(op: str) -> None:
    report = bench_kernels(op, device="cuda", batches=[1, 16], repeats=5)
    times = [t for line in report.timed for t in line.seconds.values()]
    assert "triton" in {line.name for line in report.timed} and all(1e-7 < t < 1e-1 for t in times)


def test_the_clock_is_that_of_the_card() -> None:
    """Writing a GB cannot take less than at 6 TB/s, nor more than ten times that."""
    from slipstream.ops.sample import seconds

    out = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    assert 1 / 6e3 < seconds(lambda: out.zero_(), torch.device("cuda")) < 10 / 6e3


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "mixtral", "gemma2"])
def test_kernelize(name: str, tmp_path: Path) -> None:
    model, tokens = make(name, tmp_path).to("cuda"), ids(3, 33).cuda()
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    want = logits(model, tokens, attention_mask=mask)
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    answers = model.generate(tokens, **options)
    report = kernelize(model, "builtin")
    assert any(layer.now == "attention[triton]" for layer in report.changed), str(report)
    got = logits(model, tokens, attention_mask=mask)
    assert (got - want)[mask.bool()].abs().max() < 1e-3
    assert torch.equal(model.generate(tokens, **options), answers)
    report.undo()
    assert torch.equal(logits(model, tokens, attention_mask=mask), want)


def test_nothing_of_the_cache_is_copied(tmp_path: Path) -> None:
    from slipstream.bridge.attention import _slots

    key = torch.randn(3, 2, 50, 16, device="cuda")
    value = torch.randn_like(key)
    for cut in (slice(None), slice(20, None)):  # a sliding cache is a part of one
        k, v = key[:, :, cut], value[:, :, cut]
        keys, values, stride = _slots(k, v, copies=False)
        assert keys.data_ptr() == k.data_ptr() and values.data_ptr() == v.data_ptr()
        for i in range(3):
            rows = slice(i * stride, i * stride + k.shape[2])
            assert torch.equal(keys[rows], k[i].transpose(0, 1)) and torch.equal(values[rows], v[i].transpose(0, 1))
