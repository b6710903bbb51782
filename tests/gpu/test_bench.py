"""`slipstream bench` on a card: its rates are a card's, and what it took is given back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from slipstream.bench.run import Asked, decode_case, prefill_case, run, serve_case

pytestmark = pytest.mark.gpu

SHAPE = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 999, "max_position_embeddings": 2048, "torch_dtype": "bfloat16",
}  # fmt: skip


def test_figures_and_rates(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    cases = [decode_case(3, 40, 24), prefill_case(500, 2), serve_case(6, 30, 16)]
    before = torch.cuda.memory_allocated()
    report = run(Asked(model=str(tmp_path), options={"device": "cuda", "weights": "random"}), cases)
    assert torch.cuda.memory_allocated() - before < 64 << 20
    assert [f.name for f in report.figures] == ["decode", "prefill", "serve"]
    assert all(0 < f.fraction < 1 for f in report.figures)
    assert report.machine["name"] == torch.cuda.get_device_name()
    assert report.machine["bandwidth"] > 1e11 and report.machine["flops"] > 1e13
