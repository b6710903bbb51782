"""When experts speak all to all: the formula against experts drawn by chance, and bytes against those of an all-reduce."""

from __future__ import annotations

import random

import pytest

from slipstream.config import ModelConfig
from slipstream.parallel.exchange import WORTH, had, least_tokens, reason

CONFIG = {
    "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36, "vocab_size": 201088,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 128, "num_experts_per_tok": 4,
    "sliding_window": 128, "attention_bias": True,
}  # fmt: skip


@pytest.mark.parametrize(("ranks", "top_k"), [(2, 4), (4, 4), (8, 8), (3, 1)])
def test_a_rank_had_this_part_of_the_tokens(ranks: int, top_k: int) -> None:
    draw, tokens = random.Random(5), 20_000
    found = sum(any(draw.randrange(ranks) == 1 for _ in range(top_k)) for _ in range(tokens)) / tokens
    assert abs(found - had(ranks, top_k)) < 0.02


@pytest.mark.parametrize(("ranks", "least"), [(2, 46_604), (4, 6_140), (8, 2_840)])
def test_it_is_taken_where_it_saves_more_than_it_waits(ranks: int, least: int) -> None:
    config = ModelConfig.from_hf(CONFIG)
    found = least_tokens(config, ranks, 2, "cuda")
    assert abs(found - least) <= 2
    f = 1 - ((ranks - 1) / ranks) ** 4
    reduced, exchanged = (x * (ranks - 1) / ranks * found * 2880 * 2 for x in (2, 1 + f))
    assert 0 <= reduced - exchanged - WORTH["cuda"] < 2 * 2880 * 2
    assert f"{exchanged / reduced:.2f}" in reason(config, ranks, found, 8192)
    assert ("taken in steps" in reason(config, ranks, found, 8192)) == (ranks > 2)
    assert least_tokens(config, ranks, 2, "cpu") < found
