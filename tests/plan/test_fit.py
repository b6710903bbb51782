"""A model that does not fit says by how much, and each option that the message names does what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slipstream.checkpoint.open import open_random
from slipstream.config import EngineConfig
from slipstream.errors import CapacityError
from slipstream.plan import Plan, make_plan

GIB = 1 << 30
UNITS = {"bytes": 1, "MiB": 1 << 20, "GiB": GIB}
# Of Llama-3.1-8B: real sizes, as there is nothing to load.
LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
}  # fmt: skip
SIZED = EngineConfig(max_num_seqs=64, max_num_batched_tokens=2048)
Planner = Callable[..., Plan]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planner:
    """plan(gib, **options): on a machine with so much free memory."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))

    def make(gib: float, **options: Any) -> Plan:
        monkeypatch.setattr("slipstream.hardware._available_memory", lambda: int(gib * GIB))
        return make_plan(EngineConfig(device="cpu", weights="random", **options), open_random(tmp_path))

    return make


def refusal(plan: Planner, gib: float, **options: Any) -> str:
    with pytest.raises(CapacityError) as caught:
        plan(gib, **options)
    return str(caught.value)


def missing(message: str) -> float:
    """GiB that would do."""
    found = re.search(r"([\d.]+) (bytes|MiB|GiB) more of free memory would do", message)
    assert found, message
    return float(found[1]) * UNITS[found[2]] / GIB


def ways(message: str) -> list[dict[str, Any]]:
    """The options that are named, each of which is to do alone."""
    named = re.search(r"(?:so would|what would do:) (.*)$", message)
    assert named, message
    found = []
    for way in named[1].split(", or "):
        name, value = re.findall(r"(\w+)=('\w+'|[\d.]+)", way)[0]
        found.append({name: value.strip("'") if "'" in value else float(value) if "." in value else int(value)})
    return found


@pytest.mark.parametrize(
    ("gib", "options", "named"),
    [
        (16, {}, {"quantization"}),
        (24, {}, {"quantization", "kv_cache_memory_bytes"}),
        (34, {"max_num_batched_tokens": 16384, "max_model_len": 9}, {"quantization", "max_num_batched_tokens"}),
        (33, {"max_num_seqs": 999}, {"quantization", "max_num_seqs"}),
        (40, {"gpu_memory_utilization": 0.3}, {"quantization", "gpu_memory_utilization"}),
        (62, {"max_model_len": 131072}, {"quantization", "max_model_len"}),
        (64, {"max_model_len": 131072, "kv_cache_memory_bytes": GIB}, {"max_model_len", "kv_cache_memory_bytes"}),
        (40, {"kv_cache_memory_bytes": 200 * GIB}, {"kv_cache_memory_bytes"}),
        (64, {"kv_cache_memory_bytes": 10}, {"kv_cache_memory_bytes"}),
    ],
)
def test_what_the_message_names_does(plan: Planner, gib: float, options: dict[str, Any], named: set[str]) -> None:
    message = refusal(plan, gib, **options)
    found = ways(message)
    assert named <= {name for way in found for name in way}, message
    for way in found:
        got = plan(gib, **(options | way))
        assert (
            options.get("max_model_len") is None
            or "max_model_len" in way
            or got.max_model_len == options["max_model_len"]
        )
        assert got.max_model_len >= min(2048, options.get("max_model_len", 2048)), way
        if "quantization" in way:  # and its bytes are those of the plan
            assert f"weights of {got.weights_bytes / GIB:.2f} GiB, not 14.96 GiB" in message


def test_the_numbers_are_tight(plan: Planner) -> None:
    options = {"max_model_len": 131072}
    message = refusal(plan, 62, **options)
    more = missing(message)
    assert plan(62 + more + 0.01, **options).max_model_len == 131072
    assert "more of free memory" in refusal(plan, 62 + more - 0.01, **options)
    (length,) = (way["max_model_len"] for way in ways(message) if "max_model_len" in way)
    refusal(plan, 62, max_model_len=length + 1)


def test_how_much_is_missing_where_no_length_was_asked_for(plan: Planner) -> None:
    message = refusal(plan, 16)
    assert "for one request of 2,048 tokens" in message
    more = missing(message)
    assert plan(16 + more + 0.01).max_model_len >= 2048
    try:
        assert plan(16 + more - 0.1).max_model_len < 2048  # which is not much, and so not advised
    except CapacityError as e:
        assert missing(str(e)) < 0.2


def test_together_where_nothing_does_alone(plan: Planner) -> None:
    options = {"max_num_batched_tokens": 65536, "max_num_seqs": 2048}
    message = refusal(plan, 17, **options)
    assert message.endswith(", together") and "quantization=" in message
    small = {"quantization": "mxfp4", "max_num_batched_tokens": 256, "max_num_seqs": 8}
    assert all(str(v) in message for v in small.values())
    assert plan(17, **small).max_model_len >= 2048


def test_where_nothing_helps_it_says_what_is_missing_still(plan: Planner) -> None:
    message = refusal(plan, 4)
    assert "no option makes it fit" in message and "smaller model" in message
    still = re.search(r"there are ([\d.]+) GiB missing still", message)
    assert still is not None
    small = {"quantization": "mxfp4", "max_num_batched_tokens": 256, "max_num_seqs": 8}
    assert plan(4 + float(still[1]) + 0.01, **small).max_model_len >= 2048
    refusal(plan, 4, **small)


def test_a_card_may_be_used_for_the_most_part(plan: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the share that may be used is an option too, but never all of it."""
    from slipstream.plan.fit import Fit

    def divide(asked: EngineConfig, weights: int, free: int) -> None:
        if free * asked.gpu_memory_utilization < weights:
            raise CapacityError("too large")

    def repacked(_: str) -> int:
        return 95

    said = str(Fit(SIZED, 512, 100, True, 95, divide, repacked).advise(CapacityError("too large")))
    assert ways(said) == [{"gpu_memory_utilization": 0.95}] and said.startswith("too large; 6 bytes more")
    said = str(Fit(SIZED, 512, 100, True, 99, divide, lambda _: 99).advise(CapacityError("too large")))
    assert "gpu_memory_utilization" not in said and "no option makes it fit" in said
