"""Kernels of repositories on the command line: --kernels, explain --used, kernels bench."""

from __future__ import annotations

from pathlib import Path

import pytest

from slipstream.checkpoint.open import open_checkpoint
from slipstream.cli.options import parse_kernels
from slipstream.errors import ConfigError
from tests.cli.conftest import Run
from tests.ops import repositories as repos


@pytest.fixture
def act(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("kernels")
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return repos.publish(repos.ACTIVATION, tmp_path / "act")


def test_explain_used_proves_what_ran(slipstream: Run, model: str, act: Path, tmp_path: Path) -> None:
    pins = repos.pin(tmp_path, act)
    words = (
        model, "--device", "cpu", "--kernels", f"activation={act}", "--kernels", "norm=reference", "--kernels-lock",
        pins["kernels_lock"], "--kernels-policy", pins["kernels_policy"], "--used",
    )  # fmt: skip
    said = slipstream("explain", *words, "--json").json
    calls = {u["op"]: (u["implementation"], u["calls"]) for u in said["used"]}
    steps, layers = 8, 4
    assert calls["activation"] == (str(act), steps * layers)
    assert calls["norm"] == ("reference", steps * (2 * layers + 1))
    assert all(u["source"] == "slipstream" for u in said["used"] if u["op"] != "activation")
    assert {c["op"] for c in said["choices"]} == set(calls)
    text = slipstream("explain", *words)
    assert text.code == 0 and "Calls for 2 prompts of 16 tokens, 8 new tokens each" in text.out
    assert f"activation       {act}  32     {act}, torch-cpu, sha256" in text.out


def test_explain_names_every_candidate(slipstream: Run, model: str, act: Path) -> None:
    said = slipstream("explain", model, "--device", "cpu", "--use-kernels", "--json").json
    rejected = {r["implementation"] for c in said["choices"] for r in c["rejected"]}
    assert rejected >= {
        "kernels-community/liger-kernels:LigerRMSNorm", "kernels-community/activation", "kernels-community/rotary",
        "kernels-community/vllm-flash-attn3",
    }  # fmt: skip


def test_what_is_not_pinned_ends_with_the_code_of_trust(slipstream: Run, model: str, act: Path) -> None:
    ran = slipstream("generate", model, "x", "--device", "cpu", "--kernels", f"activation={act}")
    assert ran.code == 6 and f"slipstream kernels lock {act}" in ran.err


@pytest.mark.parametrize(
    ("words", "want"),
    [
        (["auto"], "auto"),
        (["norm=a/b:C"], {"norm": "a/b:C"}),
        (["norm=a/b", "moe=loop"], {"norm": "a/b", "moe": "loop"}),
        (['{"norm": "a/b", "moe": "c/d"}'], {"norm": "a/b", "moe": "c/d"}),
    ],
)
def test_kernels_as_they_are_written(words: list[str], want: object) -> None:
    assert parse_kernels(words) == want


@pytest.mark.parametrize("words", [["norm=a/b", "auto"], ["norm=a/b", "norm=c/d"], ['{"norm": '], ["auto", "builtin"]])
def test_kernels_as_they_cannot_be_written(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="kernels: "):
        parse_kernels(words)


def test_mistakes_name_the_option(slipstream: Run, model: str) -> None:
    ran = slipstream("explain", model, "--kernels", "fast")
    assert ran.code == 2 and ran.err.startswith("error: --kernels: must be auto, builtin, reference")


def test_bench(slipstream: Run, act: Path, tmp_path: Path) -> None:
    pins = repos.pin(tmp_path, act)
    words = (
        "kernels", "bench", "activation", "--device", "cpu", "--shape", "inner=24,kind=gelu", "--batch", "1,3",
        "--repeats", 1, "--lock", pins["kernels_lock"], "--policy", pins["kernels_policy"], "--candidates", act,
        "--candidates", "reference", "--candidates", "triton",
    )  # fmt: skip
    said = slipstream(*words, "--json").json
    assert [(x["name"], x["why"]) for x in said["lines"]] == [
        (str(act), None), ("triton", "is for CUDA devices"), ("reference", None),
    ]  # fmt: skip
    assert said["shape"] == {"inner": 24, "kind": "gelu"} and set(said["lines"][0]["seconds"]) == {"1", "3"}
    text = slipstream(*words).out
    assert (
        "activation in float32" in text and "1 token" in text and "3 tokens" in text and "is for CUDA devices" in text
    )
    for wrong, why in (
        (("--shape", "inner"), "--shape"),
        (("--shape", "depth=3"), "has no depth"),
        (("--shape", "inner=many"), "--shape: inner must be a number, got 'many'"),
        (("--shape", "kind=relu"), "--shape: activation cannot be called with these sizes"),
        (("--batch", "0"), "batch"),
    ):
        assert why in slipstream("kernels", "bench", "activation", "--device", "cpu", *wrong).err
    for op, shape in (("attention", "heads=5"), ("moe", "format=mxfp5"), ("moe", "top_k=9"), ("rotary", "rotated=128")):
        ran = slipstream("kernels", "bench", op, "--device", "cpu", "--shape", shape)
        assert ran.code == 2 and f"--shape: {op} cannot be called with these sizes" in ran.err


def test_bench_takes_the_sizes_of_a_gguf(slipstream: Run, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from tests.checkpoint.test_gguf_names import build, to_gguf

    arch, config = build("llama", tmp_path / "hf")
    file = to_gguf(arch, config, open_checkpoint(tmp_path / "hf"), tmp_path / "m.gguf", lambda w: None)
    words = ("--model", file, "--device", "cpu", "--dtype", "float32", "--batch", 1, "--repeats", 1, "--json")
    assert slipstream("kernels", "bench", "norm", *words).json["shape"]["width"] == config.hidden_size
    ran = slipstream("kernels", "bench", "moe", *words)
    assert ran.code == 2 and "a llama model has no experts" in ran.err


def test_what_to_do_without_a_policy_is_said(slipstream: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    for command in ("list", "verify"):
        ran = slipstream("kernels", command)
        assert ran.code == 6 and "`slipstream kernels lock` writes one" in ran.err
