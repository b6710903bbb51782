"""`slipstream quantize` as it is typed."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest

from slipstream import LLM
from slipstream.checkpoint.manifest import verify
from slipstream.evaluation import perplexity
from tests.cli.conftest import Run
from tests.engine.tiny import LLAMA, write

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny", LLAMA | {"hidden_size": 96, "intermediate_size": 160})


def test_the_report(slipstream: Run, tiny: Path, tmp_path: Path) -> None:
    ran = slipstream("quantize", tiny, tmp_path / "out", "--to", "int4", "--skip", "*.o_proj", "--skip", "*.1.*")
    assert (ran.code, ran.err) == (0, "")
    for said in (
        "int4, a scale for 32 weights",
        "weights before",
        "weights after",
        "covered",
        "The worst of 18 modules",
    ):
        assert said in ran.out
    assert ran.out.count("model.layers.") == 8
    verify(tmp_path / "out")


def test_one_model_in_memory_at_a_time(
    slipstream: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def measure(llm: LLM, text: str, *, window: int) -> float:
        alive.append(sum(model() is not None for model in models))
        models.append(weakref.ref(llm.plan.model))
        return perplexity(llm, text, window=window)

    monkeypatch.setattr("slipstream.evaluation.perplexity", measure)
    text = tmp_path / "text"
    text.write_text("rain")
    gc.disable()  # or it may come just in time
    try:
        assert slipstream("quantize", tiny, tmp_path / "out", "--text", text).code == 0
    finally:
        gc.enable()
    assert alive == [0, 0]


def test_as_json_with_perplexity(slipstream: Run, tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("the rain in the harbour and one more train " * 4)
    words = [
        "quantize",
        tiny,
        tmp_path / "out",
        "--json",
        "--text",
        text,
        "--max-shard-size",
        "100kB",
        "--modules",
        "*.mlp.*",
    ]
    found = slipstream(*words).json
    assert (found["to"], found["group_size"], found["resumed"], found["notes"]) == ("mxfp4", None, 0, [])
    assert found["shards"] > 2 and 0 < found["bytes_after"] < found["bytes_before"]
    assert found["parameters_covered"] == 4 * 3 * 96 * 160
    assert len(found["errors"]) == 12 and all(0.05 < e < 0.2 for e in found["errors"].values())
    for when, folder in (("before", tiny), ("after", tmp_path / "out")):
        assert found["perplexity"][when] == pytest.approx(
            perplexity(LLM(folder), text.read_text(), window=511), rel=1e-3
        )
    assert found["perplexity"]["before"] != found["perplexity"]["after"]


def test_a_text_that_cannot_be_scored_does_not_lose_the_report(slipstream: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("t")
    found = slipstream("quantize", tiny, tmp_path / "out", "--json", "--text", tmp_path / "text").json
    assert "needs at least 2" in found["perplexity"]["after"] and len(found["errors"]) == 28


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("quantize TINY OUT --to fp8", 2, "--to: must be one of mxfp4, int8, int4, got 'fp8'"),
        ("quantize TINY OUT --modules *.mpl.*", 2, "--modules: '*.mpl.*' matches none of the modules"),
        ("quantize TINY OUT --skip head_lm", 2, "--skip: 'head_lm' matches none"),
        ("quantize TINY OUT --group-size 64", 2, "--group-size: only int4 has groups"),
        ("quantize TINY OUT --to int4 --group-size 48", 2, "--group-size: must be one of 32, 64, 128, got 48"),
        ("quantize TINY OUT --to int4 --group-size 64", 2, "int4 needs rows of a multiple of 64 weights"),
        ("quantize TINY OUT --max-shard-size 2Q", 2, "'2Q' is not a size"),
        ("quantize TINY OUT --max-shard-size 0", 2, "--max-shard-size: must be a whole number of at least 1"),
        ("quantize TINY OUT --text /nowhere", 2, "--text: /nowhere cannot be read: No such file or directory"),
        ("quantize TINY TINY", 2, "must not contain each other"),
        ("quantize TINY TINY/inner --overwrite", 2, "must not contain each other"),
        (
            "quantize TINY OLD",
            2,
            "exists; name another folder, or allow it to be replaced (overwrite=True, --overwrite)",
        ),
        ("quantize TINY OLD --overwrite", 2, "holds more than a model"),
        ("quantize nosuchmodel OUT", 3, "no model has this name"),
        ("quantize TINY", 2, "Missing argument"),
    ],
)
def test_mistakes(slipstream: Run, tiny: Path, tmp_path: Path, words: str, code: int, said: str) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "letter").write_text("mine")
    places = {"TINY": str(tiny), "OUT": str(tmp_path / "out"), "OLD": str(tmp_path / "old")}
    for name, place in places.items():
        words = words.replace(name, place)
    ran = slipstream(*words.split())
    assert said in ran.err
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old", "tiny"]


def test_ctrl_c_stops_cleanly_and_says_how_to_go_on(tmp_path: Path) -> None:
    model = write(tmp_path / "large", LLAMA | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12})
    words = ["quantize", str(model), str(tmp_path / "out"), "--max-shard-size", "1MB"]
    program = [sys.executable, "-c", "from slipstream.cli.main import main; main()", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    ran = subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / ".out.partial" / ".journal"
    while ran.poll() is None and (not journal.exists() or journal.read_text().count("\n") < 3):
        time.sleep(0.005)
    ran.send_signal(signal.SIGINT)
    out, err = ran.communicate(timeout=60)
    assert (ran.returncode, out) == (130, ""), err
    assert "Run the same command again to go on" in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()
    done = subprocess.run([*program, "--json"], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed"] >= 2
