"""The commands that look and do not run: inspect, explain, models, pull."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from slipstream.checkpoint.open import open_checkpoint
from slipstream.config import EngineConfig
from tests.cli.conftest import Run
from tests.cli.test_chat import ENVIRONMENT
from tests.cli.tiny import write_chat_model


def test_inspect_says_what_the_files_say(slipstream: Run, model: str) -> None:
    got = slipstream("inspect", model, "--json").json
    with safe_open(Path(model) / "model.safetensors", "pt") as f:
        tensors = [f.get_tensor(name) for name in f.keys()]  # noqa: SIM118
    assert got["parameters"] == sum(t.numel() for t in tensors)
    assert got["bytes"] == 4 * got["parameters"]
    assert got["tensors"] == len(tensors)
    assert got["weights"] == [
        {"dtype": "F32", "tensors": len(tensors), "parameters": got["parameters"], "bytes": got["bytes"]}
    ]
    config = json.loads((Path(model) / "config.json").read_text())
    assert got["architecture"] == "llama"
    assert got["layers"] == config["num_hidden_layers"] and got["layer_types"] == {"full_attention": 4}
    assert (got["heads"], got["kv_heads"], got["head_dim"]) == (4, 2, 8)
    assert got["kv_bytes_per_token"] == {
        "float32": {"per_layer": 2 * 2 * 8 * 4, "in_all": 4 * 2 * 2 * 8 * 4},
        "bfloat16": {"per_layer": 2 * 2 * 8 * 2, "in_all": 4 * 2 * 2 * 8 * 2},
    }
    tokenizer = got["tokenizer"]
    assert tokenizer["kind"] == "BPE" and tokenizer["chat_template"] is True
    assert tokenizer["eos_token_ids"] == [3] and tokenizer["bos_token_id"] == 0
    out = slipstream("inspect", model).out
    assert "2,048 tokens" in out and f"{got['parameters']:,}" in out


def test_inspect_counts_layer_types_window_and_packed_experts(slipstream: Run, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    config = {
        "model_type": "gpt_oss", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 40,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 3,
        "num_experts_per_tok": 2, "sliding_window": 24, "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    blocks = torch.zeros(3, 128, 2, 16, dtype=torch.uint8)  # (experts, rows, blocks, bytes): 32 weights in 16 bytes
    tensors = {"a.mlp.experts.gate_up_proj_blocks": blocks, "a.mlp.experts.gate_up_proj_scales": blocks[..., 0].clone()}
    save_file(tensors, tmp_path / "model.safetensors")
    got = slipstream("inspect", tmp_path, "--json").json
    assert got["parameters"] == 3 * 128 * 64
    assert got["quantization"] == "mxfp4"
    assert got["layer_types"] == {"sliding_attention": 2, "full_attention": 2} and got["window"] == 24
    assert (got["experts"], got["experts_per_token"]) == (3, 2)
    assert "tokenizer.json" in got["tokenizer"]["error"]  # told, and no reason to say nothing
    out = slipstream("inspect", tmp_path).out
    assert "3, of which 2 for each token" in out and "window of 24 tokens" in out and "yarn" in out


def test_inspect_and_models_load_no_torch(model: str) -> None:
    code = f"""
import sys
from slipstream.cli.main import run
assert run(["inspect", {model!r}]) == 0 and run(["models"]) == 0 and run(["pull", {model!r}]) == 0
print([m for m in ("torch", "transformers", "huggingface_hub", "rich") if m in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1] == "[]", ran.stderr


def test_explain_is_the_plan(slipstream: Run, model: str) -> None:
    from slipstream.plan import make_plan

    words = ("--max-num-seqs", 2, "--max-model-len", 100, "--kv-cache-memory-bytes", "200KiB", "--page-size", 8)
    asked = EngineConfig(max_num_seqs=2, max_model_len=100, kv_cache_memory_bytes=200 << 10, page_size=8)
    expected = make_plan(asked, open_checkpoint(Path(model))).to_dict()
    got = slipstream("explain", model, *words, "--json").json
    expected["bytes"]["free"] = got["bytes"]["free"]  # it changes from moment to moment
    assert got == json.loads(json.dumps({"model": model, **expected}))

    out = slipstream("explain", model, *words).out
    for choice in expected["choices"]:
        assert choice["op"] in out and choice["reason"] in out
        for rejected in choice["rejected"]:
            assert f"not {rejected['implementation']}" in out and rejected["why"] in out
    for reason in expected["why"].values():
        assert reason in out
    assert "F32" in out and "full_attention" in out and "100 tokens" in out


def test_models_lists_names_pulled_models_and_architectures(
    slipstream: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path))
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "x.gguf").write_bytes(b"1234567")
    for name, size in (("main", 7), ("v2%3Ax.gguf", 7), ("broken", 8)):  # the last one is no longer what it was
        record = tmp_path / "hub" / "org--name" / f"{name}.json"
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({"commit": "c", "folder": str(folder), "files": {"x.gguf": [size, "0" * 64]}}))
    got = slipstream("models", "--json").json
    assert got["models"][0]["name"] == "smollm2-135m-instruct" and got["models"][0]["here"] is False
    assert [(m["name"], m["bytes"], m["path"]) for m in got["pulled_from_hub"]] == [
        ("org/name", 7, str(folder)),
        ("org/name@v2:x.gguf", 7, str(folder / "x.gguf")),
    ]
    assert got["shapes"]["gpt-oss-20b"] == "openai/gpt-oss-20b"
    assert {"llama", "gpt_oss", "gemma3_text"} <= set(got["architectures"])
    out = slipstream("models").out
    assert "not pulled yet" in out and "org/name@v2:x.gguf" in out and "gpt_oss" in out


def test_pull_hashes_a_local_model(slipstream: Run, model: str) -> None:
    weights = Path(model, "model.safetensors").read_bytes()
    got = slipstream("pull", model, "--json").json
    assert got["files"]["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert (got["path"], got["status"], got["verified"]) == (model, "local", False)
    listed = "".join(f"{h}  {n}\n" for n, h in sorted(got["files"].items()))
    assert got["sha256"] == hashlib.sha256(listed.encode()).hexdigest()
    ran = slipstream("pull", model)
    assert got["sha256"] in ran.out and ran.err == ""


def test_pull_finds_damage(slipstream: Run, tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path / "m")
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  model.safetensors\n")
    ran = slipstream("pull", folder)
    assert ran.code == 3 and ran.out == "" and "is damaged" in ran.err


def test_what_a_file_says_does_not_steer_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slipstream.cli import show

    shown: list[Any] = []
    monkeypatch.setattr("rich.console.Console.print", lambda self, *a, **k: shown.extend(a))
    show._print_rich([show.Table("t\x1b[2J", [("a\x9b2J", "[bold]b")], ("x", "y"))])
    table = next(s for s in shown if hasattr(s, "columns"))
    cells = [str(cell) for column in table.columns for cell in column.cells]
    assert cells == ["a\ufffd2J", "[bold]b"] and "\x1b" not in str(shown[0])
    assert show.safe("tab\t and line\n stay, \x07\x1b]0;title\x07 goes") == "tab\t and line\n stay, ��]0;title� goes"
    assert os.linesep not in show.size(5)
