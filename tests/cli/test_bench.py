"""`slipstream bench` on a tiny model: what it prints, what it sets, and what it refuses."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

from slipstream.bench.machine import Machine
from slipstream.bench.measure import Answers, Slipstream
from tests.cli.conftest import Run

SMALL = ("--input-len", 8, "--output-len", 12, "--repeats", 2)
RATES = Machine("this", 2e9, 3e9, "float32", 2048)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring it for each case would take longer than all the rest."""
    monkeypatch.setattr("slipstream.bench.run.measure_machine", lambda *_: RATES)


@pytest.fixture
def shape(tmp_path: Path, model: str) -> Path:
    """A folder with nothing but a config.json."""
    shutil.copy(Path(model) / "config.json", tmp_path)
    return tmp_path


def test_decode(slipstream: Run, model: str) -> None:
    ran = slipstream("bench", "decode", model, "--batch-size", "1,3", *SMALL, "--json")
    assert (ran.code, ran.err) == (0, "")
    got = ran.json
    assert [f["at"] for f in got["figures"]] == [{"batch_size": b, "input_len": 8, "output_len": 12} for b in (1, 3)]
    for figure in got["figures"]:
        assert (figure["name"], figure["unit"], len(figure["runs"])) == ("decode", "tok/s", 2)
        assert figure["value"] == statistics.median(figure["runs"])
        more = figure["more"]
        assert more["least_ms"] == pytest.approx(1000 * max(more["bytes"] / 2e9, more["flops"] / 3e9))
        assert figure["bound_by"] == ("bandwidth" if more["bytes"] / 2 > more["flops"] / 3 else "matrices")
        assert figure["limit"] == pytest.approx(figure["at"]["batch_size"] / more["least_ms"] * 1000)
        assert figure["fraction"] == pytest.approx(figure["value"] / figure["limit"])
        assert figure["against"] == {} and figure["ratio"] is None
    assert got["machine"] == {"name": "this", "bandwidth": 2e9, "flops": 3e9, "dtype": "float32", "size": 2048}
    assert got["chosen"] == {"max_model_len": 21, "enable_prefix_caching": False}
    assert got["plan"]["max_model_len"] == 21 and got["plan"]["choices"]
    assert got["versions"]["torch"] and got["versions"]["slipstream"] and got["notes"] == []
    assert got["model"] == model and "commit" in got


def test_the_table(slipstream: Run, model: str) -> None:
    ran = slipstream("bench", "decode", model, "--batch-size", "1,3", *SMALL)
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0] == f"decode: {model}" and lines[1].split("  ")[-1] == "bound by"
    assert [line.split("  ")[1] for line in lines[2:4]] == ["batch 1", "batch 3"]
    assert all("tok/s" in line and "%" in line for line in lines[2:4])
    assert "set for this  max_model_len=21, enable_prefix_caching=False" in ran.out
    assert "copies 2 GB/s" in ran.out and "float32 matrices at 0.003 TFLOP/s" in ran.out


def test_prefill_and_serve(slipstream: Run, model: str) -> None:
    (figure,) = slipstream("bench", "prefill", model, "--input-len", 21, "--repeats", 3, "--json").json["figures"]
    assert (figure["unit"], figure["at"], len(figure["runs"])) == ("ms", {"input_len": 21}, 3)
    assert figure["fraction"] == pytest.approx(figure["limit"] / figure["value"])

    words = ("bench", "serve", model, "--num-prompts", 5, "--input-len", 6, "--output-len", 7)
    got = slipstream(*words, "--max-num-seqs", 2, "--json").json
    (figure,) = got["figures"]
    assert figure["at"] == {"num_prompts": 5, "input_len": 6, "output_len": 7} and figure["unit"] == "tok/s"
    assert got["plan"]["max_num_seqs"] == 2 and "max_num_seqs" not in got["chosen"]
    more = figure["more"]
    seconds = 5 * 7 / figure["value"]
    assert 0 < more["time_to_first_token_ms_p50"] <= more["time_to_first_token_ms_p95"] <= 1000 * seconds
    assert 0 < more["inter_token_ms_p50"] <= more["inter_token_ms_p95"]
    out = slipstream(*words).out
    assert "5 prompts of 6, 7 new each" in out and "time to first token" in out and "95 of 100 within" in out


def test_load(slipstream: Run, model: str) -> None:
    got = slipstream("bench", "load", model, "--repeats", 1, "--num-threads", 1, "--json").json
    load, first = got["figures"]
    assert (load["name"], load["unit"], first["name"], first["unit"]) == ("load", "GB/s", "first_token", "s")
    weights = sum(w["bytes"] for w in got["plan"]["weights"])
    assert load["more"]["bytes"] == weights and load["fraction"] == pytest.approx(load["value"] / load["limit"])
    assert load["limit"] == pytest.approx(got["machine"]["read_gb_s"]) and got["machine"]["copy_gb_s"] is None
    assert load["more"]["seconds"] + first["more"]["import_seconds"] < first["value"] < 60


def test_random_weights_need_shapes_alone(slipstream: Run, shape: Path) -> None:
    got = slipstream("bench", "decode", shape, "--weights", "random", *SMALL, "--json").json
    assert got["figures"][0]["value"] > 0 and "random weights" in got["plan"]["why"]
    ran = slipstream("bench", "decode", shape, *SMALL)
    assert ran.code == 3 and "no model to open" in ran.err


def test_what_the_user_sets_stays(slipstream: Run, model: str) -> None:
    words = ("--max-model-len", 99, "--max-num-seqs", 3, "--enable-prefix-caching", "--dtype", "bfloat16")
    got = slipstream("bench", "decode", model, *SMALL, *words, "--json").json
    assert got["chosen"] == {}
    assert (got["plan"]["max_model_len"], got["plan"]["max_num_seqs"], got["plan"]["dtype"]) == (99, 3, "bfloat16")


def test_what_the_benchmark_needs_is_set(slipstream: Run, model: str) -> None:
    got = slipstream(
        "bench", "decode", model, "--batch-size", "2,70", "--input-len", 40, "--output-len", 24, "--json"
    ).json
    assert got["chosen"]["max_num_seqs"] == got["plan"]["max_num_seqs"] == 70
    assert got["chosen"]["max_num_batched_tokens"] == 2800


@pytest.mark.parametrize("weights", ["checkpoint", "random"])
def test_against_transformers(slipstream: Run, model: str, weights: str) -> None:
    pytest.importorskip("transformers")
    words = ("bench", "decode", model, *SMALL, "--weights", weights, "--against", "transformers")
    ran = slipstream(*words, "--json")
    (figure,) = ran.json["figures"]
    assert figure["ratio"] == pytest.approx(figure["value"] / figure["against"]["transformers"])
    assert ran.json["versions"]["transformers"]
    assert ran.json["notes"] == ["transformers holds the weights as float32, 0.00 GiB"] and ran.err == ""
    ran = slipstream(*words)
    assert "transformers  ratio" in ran.out and ran.err == "transformers holds the weights as float32, 0.00 GiB\n"


def test_a_prompt_that_takes_half_as_long_is_twice_as_good(
    slipstream: Run, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slipstream.bench.peer import Transformers

    pytest.importorskip("transformers")
    for subject, seconds in ((Slipstream, 1.0), (Transformers, 2.0)):
        monkeypatch.setattr(subject, "run", lambda _, prompts, n, s=seconds: Answers(s, [[1] * n for _ in prompts]))
    got = slipstream("bench", "prefill", model, "--input-len", 8, "--against", "transformers", "--json").json
    (figure,) = got["figures"]
    assert (figure["value"], figure["against"], figure["ratio"]) == (1000.0, {"transformers": 2000.0}, 2.0)


def test_transformers_without_memory_is_a_note(slipstream: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from slipstream.bench.peer import Transformers
    from slipstream.errors import CapacityError

    pytest.importorskip("transformers")

    def run(_: object, prompts: list[list[int]], new: int) -> Answers:
        if len(prompts) > 2:
            raise CapacityError("transformers has no memory for 3 prompts together")
        return Answers(float(new), [[1] * new for _ in prompts])

    monkeypatch.setattr(Transformers, "run", run)
    ran = slipstream("bench", "decode", model, "--batch-size", "2,3", *SMALL, "--against", "transformers", "--json")
    two, three = ran.json["figures"]
    assert two["against"] == {"transformers": 2.0} and three["against"] == {} and three["value"] > 0
    assert ran.json["notes"][-1] == "transformers has no memory for 3 prompts together"


def test_random_weights_that_are_packed_are_no_match(slipstream: Run, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    config: dict[str, Any] = {
        "model_type": "gpt_oss", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 40,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 3, "torch_dtype": "bfloat16",
        "num_experts_per_tok": 2, "sliding_window": 24, "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ("bench", "decode", tmp_path, "--weights", "random", *SMALL)
    assert slipstream(*words, "--json").json["figures"][0]["value"] > 0
    ran = slipstream(*words, "--against", "transformers")
    assert ran.code == 2 and ran.err.startswith("error: --against: random weights are drawn as mxfp4 here")


def test_without_transformers(slipstream: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    ran = slipstream("bench", "decode", model, *SMALL, "--against", "transformers")
    assert ran.code == 2 and "--against: transformers is not installed here; pip install transformers" in ran.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("", 2, "see slipstream bench --help"),
        ("decod MODEL", 2, "Did you mean 'decode'?"),
        ("decode", 2, "see slipstream bench decode --help"),
        ("decode MODEL --batch-size 1,x", 2, "'1,x' is no list of batch sizes"),
        ("decode MODEL --batch-size 0", 2, "--batch-size"),
        ("decode MODEL --batch-size 1,", 2, "--batch-size"),
        ("decode MODEL --input-len 0", 2, "--input-len"),
        ("decode MODEL --repeats 0", 2, "--repeats"),
        ("prefill MODEL --batch-size 8", 2, "No such option: --batch-size"),
        ("prefill MODEL", 2, "--input-len: 4096 tokens and 1 new ones are more than the 2048 positions"),
        ("decode MODEL --batch-size 9 --max-num-seqs 8", 2, "--max-num-seqs: 8 is less than the 9"),
        ("decode MODEL --max-model-len 100", 2, "--max-model-len: 100 is less than the 257"),
        ("decode MODEL --against vllm", 2, "--against: must be transformers, got 'vllm'"),
        (
            "decode MODEL --batch-size 40 --kv-cache-memory-bytes 1MiB",
            5,
            "40 sequences of 257 tokens need 680 pages of",
        ),
        ("load MODEL --weights random", 2, "--weights: random ones are drawn"),
        ("load MODEL --against transformers", 2, "No such option: --against"),
        ("decode gpt-oss-20b", 3, "only the shapes of this model are here, for weights='random'"),
        ("decode nosuchmodel", 3, "no model has this name"),
        ("decode MODEL --temperature 1", 2, "No such option: --temperature"),
    ],
)
def test_one_line_and_an_exit_code(slipstream: Run, model: str, words: str, code: int, said: str) -> None:
    ran = slipstream("bench", *words.replace("MODEL", model).split())
    assert said in ran.err and ran.code == code, ran.err
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1 and ran.out == ""


def test_what_is_wrong_is_not_timed(slipstream: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = iter(range(10_000))
    monkeypatch.setattr(
        Slipstream, "run", lambda _, prompts, n: Answers(1.0, [[next(tokens) for _ in range(n)] for _ in prompts])
    )
    ran = slipstream("bench", "decode", model, *SMALL)
    assert (ran.code, ran.out) == (1, "") and "1 prompts asked twice got other answers" in ran.err


def test_logits_that_are_no_numbers_end_it(slipstream: Run, model: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    spoilt = tmp_path / "spoilt"
    shutil.copytree(model, spoilt)
    tensors = load_file(spoilt / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, spoilt / "model.safetensors")
    ran = slipstream("bench", "decode", spoilt, *SMALL)
    assert (ran.code, ran.out) == (1, "") and "logits that are not finite" in ran.err


def test_ctrl_c(slipstream: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from slipstream.engine.engine import Engine

    engines = []

    def step(self: Engine) -> bool:
        engines.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "step", step)
    ran = slipstream("bench", "decode", model, *SMALL, "--batch-size", 3)
    assert (ran.code, ran.out, ran.err.strip()) == (130, "", "")
    assert not engines[0]._answers  # what was queued is cancelled


def test_help_is_by_example(slipstream: Run) -> None:
    out = slipstream("bench", "--help").out
    for line in (
        "slipstream bench decode gpt-oss-20b --weights random",
        "bench load ./folder",
        "--against transformers",
    ):
        assert line in out
    for command in ("decode", "prefill", "serve", "load"):
        assert "--repeats" in slipstream("bench", command, "--help").out
