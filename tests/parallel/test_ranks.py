"""Ranks that share a model give the logits of one that has all of it. They speak to each other through gloo, on CPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.checkpoint.open import open_checkpoint
from slipstream.parallel.shares import Ranks
from tests.parallel.one_rank import logits
from tests.parity.test_mxfp4 import publish
from tests.parity.tiny import TINY, save

ROOT = Path(__file__).parents[2]


def run(size: int, folders: list[Path], out: Path, **options: Any) -> list[dict[str, Any]]:
    """What each rank says of each folder."""
    out.mkdir()
    command = [sys.executable, "-m", "tests.parallel.one_rank"]
    words = [str(size), str(out / "store"), str(out), json.dumps(options), *map(str, folders)]
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(i), *words], env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for i in range(size)
    ]
    errors = [r.communicate(timeout=280)[1] for r in ranks]
    assert not any(r.returncode for r in ranks), "\n".join(errors)
    return [json.loads((out / f"said-{i}.json").read_text()) for i in range(size)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("ranks")
    for name in TINY:
        save(name, home / name)
    return [home / name for name in TINY]


@pytest.mark.parametrize("size", [2, 4])
def test_logits_of_every_architecture(folders: list[Path], tmp_path: Path, size: int) -> None:
    said = run(size, folders, tmp_path / "out")
    for folder in folders:
        want, whole = logits(folder, Ranks(), {})
        got = torch.load(tmp_path / "out" / f"{folder.name}.pt")
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4, msg=lambda text, f=folder: f"{f.name}: {text}")
        parts = [rank[str(folder)]["weights"] for rank in said]
        assert max(parts) < 0.75 * whole["weights"], folder.name


@pytest.mark.parametrize("size", [2, 3, 4])
def test_blocks_are_not_cut_apart(tmp_path: Path, size: int) -> None:
    """Five blocks of 32 columns inside an expert, for two, three and four ranks; and what is quantized while it loads."""
    home = tmp_path / "gpt_oss"
    sized(home, "gpt_oss")
    publish(home)
    folders, options = [home], {"page_size": 3, "max_num_batched_tokens": 7}
    said = run(size, folders, tmp_path / "out", **options)
    want, whole = logits(home, Ranks(), options)
    for mine, theirs in zip(torch.load(tmp_path / "out" / "gpt_oss.pt"), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
    assert sum(rank[str(home)]["weights"] for rank in said) < 1.3 * whole["weights"]


MIXTURES = {"mixtral": {"num_local_experts": 8}, "qwen3_moe": {"num_experts": 8}, "gpt_oss": {"num_local_experts": 8}}


@pytest.mark.parametrize("size", [2, 3])
def test_experts_are_spread(folders: list[Path], tmp_path: Path, size: int) -> None:
    """Every mixture with 5 experts and with 8, which neither two nor three ranks share evenly at once; MXFP4 too."""
    some = [f for f in folders if "experts" in str(TINY[f.name])]
    assert len(some) >= 4
    for name, more in MIXTURES.items():
        sized(tmp_path / f"{name}-8", name, more)
        some.append(tmp_path / f"{name}-8")
    sized(tmp_path / "gpt_oss-packed", "gpt_oss", {"num_local_experts": 8})
    publish(tmp_path / "gpt_oss-packed")
    some.append(tmp_path / "gpt_oss-packed")
    said = run(size, some, tmp_path / "out", enable_expert_parallel=True)
    for folder in some:
        want, whole = logits(folder, Ranks(), {})
        got = torch.load(tmp_path / "out" / f"{folder.name}.pt")
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4, msg=lambda text, f=folder: f"{f.name}: {text}")
        assert max(rank[str(folder)]["weights"] for rank in said) < 0.75 * whole["weights"], folder.name
        config = open_checkpoint(folder).config
        number = config.get("num_experts") or config["num_local_experts"]
        for rank in said:  # each of them knows where every token went
            tokens, load = rank[str(folder)]["tokens"], rank[str(folder)]["load"]
            assert load == said[0][str(folder)]["load"] and load
            for counts in load.values():
                assert len(counts) == number and sum(counts) == tokens * config["num_experts_per_tok"]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_experts_speak_all_to_all(tmp_path: Path, size: int) -> None:
    """The same logits, from one token on. What a rank sends another is what that one expects of it, and only what its experts had."""
    some = []
    for name, more in MIXTURES.items():
        some.append(tmp_path / name)
        sized(tmp_path / name, name, {**more, "num_experts_per_tok": 2})
    said = run(size, some, tmp_path / "out", enable_expert_parallel=True, least_tokens=1, max_num_batched_tokens=21)
    saved = 0
    for folder in some:
        want, _ = logits(folder, Ranks(), {})
        for mine, theirs in zip(torch.load(tmp_path / "out" / f"{folder.name}.pt"), want, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4, msg=lambda text, f=folder: f"{f.name}: {text}")
        steps = list(zip(*(rank[str(folder)]["exchanges"] for rank in said), strict=True))
        assert steps
        for step in steps:
            for a in range(size):
                for b in range(size):
                    (come, _), (_, go) = step[a], step[b]
                    assert come[b] == go[a]
        tokens = said[0][str(folder)]["tokens"] * len(said[0][str(folder)]["load"])
        rows = sum(sum(go) for step in steps for _, go in step)
        assert tokens <= rows <= 2 * tokens, "each is on one rank or on two"
        saved += rows < min(2, size) * tokens
    assert saved


@pytest.mark.parametrize("format", ["mxfp4", "int8", "int4"])
def test_quantized_while_loading(tmp_path: Path, format: str) -> None:
    sized(tmp_path / "llama", "llama")
    run(2, [tmp_path / "llama"], tmp_path / "out", quantization=format)
    want, _ = logits(tmp_path / "llama", Ranks(), {"quantization": format})
    for mine, theirs in zip(torch.load(tmp_path / "out" / "llama.pt"), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


def sized(folder: Path, name: str, more: Mapping[str, Any] | None = None) -> None:
    """A checkpoint whose sizes blocks of 32 fit, an odd number of times."""
    kind, changes = TINY[name]
    sizes = {**(more or {}), "hidden_size": 192, "intermediate_size": 160, "head_dim": 32}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY, name, (kind, changes | sizes))
        save(name, folder)
