"""What a step must read and compute, against numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slipstream.bench.work import Work, decode_work, prefill_work
from slipstream.checkpoint.open import open_checkpoint, open_random
from slipstream.config import EngineConfig
from slipstream.plan import Plan, make_plan
from slipstream.sources import resolve
from tests.engine import tiny

H100 = (3.0e12, 800e12)  # bytes a second copied, bfloat16 operations a second


def shapes(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Plan:
    monkeypatch.setattr("slipstream.hardware._available_memory", lambda: 1 << 40)
    return make_plan(EngineConfig(device="cpu", weights="random", **options), open_random(folder))


@pytest.fixture
def gpt_oss(monkeypatch: pytest.MonkeyPatch) -> Plan:
    return shapes(resolve("gpt-oss-20b", weights=False), monkeypatch)


@pytest.mark.parametrize(
    ("batch", "context", "milliseconds", "tokens"),
    [
        (1, 1024, 1.24, 803), (1, 8192, 1.30, 767), (8, 1024, 3.11, 2573), (32, 1024, 4.45, 7189), (64, 1024, 4.80, 13300),
        (64, 8192, 8.56, 7500), (256, 1024, 6.61, 38700), (256, 8192, 21.6, 11800),
    ],
)  # fmt: skip
def test_the_limit_of_decoding_gpt_oss_20b(
    gpt_oss: Plan, batch: int, context: int, milliseconds: float, tokens: float
) -> None:
    """The floors that were worked out on paper before the first kernel was written."""
    work = decode_work(gpt_oss, batch, context)
    seconds = work.seconds(*H100)
    assert 1000 * seconds == pytest.approx(milliseconds, rel=5e-3)
    assert batch / seconds == pytest.approx(tokens, rel=5e-3)
    assert work.is_read(*H100)


def test_the_bytes_of_one_token_of_gpt_oss_20b(gpt_oss: Plan) -> None:
    matrix, experts = 2880 * 2880, 24 * 4  # of 4 experts in each layer: gate and up and down, 17 bytes for 32 weights
    packed = experts * 3 * matrix * 17 / 32
    attention = 24 * 2 * (2 * 64 * 64 + 2 * 8 * 64) * 2880
    head, cache = 2 * 201088 * 2880, 2 * 2 * 8 * 64 * 12 * (1000 + 128)
    assert decode_work(gpt_oss, 1, 1000).bytes == pytest.approx(packed + attention + head + cache, rel=2e-3)


@pytest.mark.parametrize(("length", "milliseconds"), [(4096, 33), (32768, 381)])
def test_the_limit_of_a_prompt(gpt_oss: Plan, length: int, milliseconds: float) -> None:
    work = prefill_work(gpt_oss, length)
    # In the last layer the product after attention, router and experts are for one token.
    last = 2 * (length - 1) * (4 * 3 * 2880 * 2880 + 32 * 2880 + 4096 * 2880) / H100[1]
    assert 1000 * (work.seconds(*H100) + last) == pytest.approx(milliseconds, rel=1e-2) and not work.is_read(*H100)


def test_a_dense_model_with_windows_by_counting(tmp_path: Path) -> None:
    """Two layers that see everything, two that see 9 tokens; float32; every number counted from config.json."""
    plan = make_plan(EngineConfig(device="cpu"), open_checkpoint(tiny.write(tmp_path, tiny.HYBRID)))
    hidden, inner, vocab, kv = 32, 48, 131, 2 * 8
    matrices = 4 * (hidden * (hidden + 2 * kv) + hidden * hidden + 3 * hidden * inner)
    small = 4 * (hidden + 2 * kv + 2 * hidden) + hidden  # biases of queries, keys and values, and norms
    batch, context = 3, 20
    keys = batch * (2 * 20 + 2 * 9)  # visible to the queries of a step, over all layers
    work = decode_work(plan, batch, context)
    assert work.bytes == 4 * (matrices + small + vocab * hidden + batch * hidden + 2 * kv * keys)
    assert work.flops == 2 * batch * (matrices + vocab * hidden) + 4 * hidden * keys

    length = 13
    keys = 2 * sum(range(1, 14)) + 2 * (sum(range(1, 10)) + 4 * 9)
    work = prefill_work(plan, length, prompts=2)
    assert work.bytes == 4 * (matrices + small + vocab * hidden + 2 * length * hidden + 2 * length * 4 * 2 * kv)
    last = hidden * hidden + 3 * hidden * inner  # of the last layer, what comes after attention is for rows with logits
    assert work.flops == 2 * 2 * (length * matrices - (length - 1) * last + vocab * hidden) + 2 * 4 * hidden * keys


def test_a_head_that_is_the_embedding_is_read_all_the_same(tmp_path: Path) -> None:
    apart = make_plan(EngineConfig(device="cpu"), open_checkpoint(tiny.write(tmp_path / "a", tiny.LLAMA)))
    tied = tiny.write(tmp_path / "b", tiny.LLAMA | {"tie_word_embeddings": True})
    together = make_plan(EngineConfig(device="cpu"), open_checkpoint(tied))
    assert together.weights_bytes < apart.weights_bytes
    assert decode_work(together, 5, 40) == decode_work(apart, 5, 40)


def test_experts_that_nobody_picked_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.BASE | {
        "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = shapes(tmp_path, monkeypatch)
    expert, all_others = 4 * 4 * 3 * 32 * 24, decode_work(plan, 1, 9).bytes - 2 * 4 * 4 * 3 * 32 * 24
    for tokens, touched in ((1, 2.0), (2, 8 * (1 - 0.75**2)), (10_000, 8.0)):
        grows = (tokens - 1) * (4 * 32 + 9 * 4 * 2 * 2 * 8 * 4)  # rows of the embedding, and keys and values
        assert decode_work(plan, tokens, 9).bytes == pytest.approx(all_others + touched * expert + grows)


def test_what_takes_longer_counts() -> None:
    work = Work(bytes=6.0, flops=8.0)
    assert (work.seconds(2.0, 4.0), work.is_read(2.0, 4.0)) == (3.0, True)
    assert (work.seconds(6.0, 4.0), work.is_read(6.0, 4.0)) == (2.0, False)
    assert work * 2 + work == Work(18.0, 24.0)


@pytest.mark.parametrize(
    ("name", "billions", "gib"),
    [("gpt-oss-20b", 20.91, 12.82), ("gpt-oss-120b", 116.83, 60.77), ("llama-3.1-8b", 8.03, 14.96), ("qwen3-30b-a3b", 30.53, 56.87)],
)  # fmt: skip
def test_the_shapes_that_are_known_have_the_published_sizes(
    name: str, billions: float, gib: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    import math

    plan = shapes(resolve(name, weights=False), monkeypatch)
    assert sum(math.prod(item.shape) for item in plan.loads) / 1e9 == pytest.approx(billions, abs=0.005)
    assert plan.weights_bytes / 2**30 == pytest.approx(gib, abs=0.005)
