"""`slipstream batch` as it is typed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run
from tests.cli.test_chat import ENVIRONMENT, PROGRAM, Terminal

GREEDY = ("--temperature", "0", "--ignore-eos")


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def openai(i: int, model: str) -> dict[str, Any]:
    return {
        "custom_id": str(i),
        "url": "/v1/completions",
        "body": {"model": model, "prompt": "The tide", "max_tokens": 4},
    }


def test_a_file_of_prompts(slipstream: Run, model: str, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", {"prompt": "The tide"}, {"prompt": "x", "mood": 1}), tmp_path / "out"
    ran = slipstream("batch", source, out, "--model", model, "--max-new-tokens", 6, "--logprobs", 0, *GREEDY)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("1 of 2 lines answered, 1 errors, 9 prompt tokens, 6 new tokens, ")
    assert ran.out.endswith(f" tokens/s: {out}\n")
    good, bad = read(out)
    expected = slipstream("generate", model, "The tide", "--max-new-tokens", 6, *GREEDY)
    assert good["text"] + "\n" == expected.out and len(good["logprobs"]) == 6
    assert bad["error"]["param"] == "mood"


def test_the_model_that_the_lines_name(slipstream: Run, model: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in", openai(0, model), openai(1, model), openai(2, "another"))
    report = slipstream("batch", source, tmp_path / "out", "--json", *GREEDY).json
    assert (report["model"], report["lines"], report["answered"], report["errors"]) == (model, 3, 2, 1)
    assert (report["new_tokens"], report["resumed"], report["path"]) == (8, 0, str(tmp_path / "out"))
    engine = report["engine"]
    assert (engine["new_tokens"], engine["waiting"], engine["running"]) == (8, 0, 0)
    assert engine["step_seconds"] == round(engine["step_seconds"], 3) > 0 and engine["pages"][0]["held"] == 0
    assert "one job runs one model" in read(tmp_path / "out")[2]["error"]["message"]


def test_one_model_answers_whatever_models_lines_name(slipstream: Run, model: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in", openai(0, "gpt-4"), openai(1, "gpt-3.5"), {"prompt": "The tide"})
    report = slipstream(
        "batch", source, tmp_path / "out", "--model", model, "--max-new-tokens", 4, "--json", *GREEDY
    ).json
    assert (report["answered"], report["errors"]) == (3, 0)


def test_a_priority_that_no_line_could_have_is_refused_before(slipstream: Run, model: str, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", {"prompt": "The tide"}), tmp_path / "out"
    ran = slipstream("batch", source, out, "--model", model, "--priority", 1)
    assert ran.code == 2 and "--scheduling-policy priority" in ran.err and not out.exists()
    assert (
        slipstream("batch", source, out, "--model", model, "--priority", 1, "--scheduling-policy", "priority").code == 0
    )


def test_a_model_in_place_of_the_one_that_the_lines_name(slipstream: Run, model: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in", openai(0, "gpt"), openai(1, "gpt"))
    assert slipstream("batch", source, tmp_path / "out", "--model", model, "--json").json["answered"] == 2
    assert read(tmp_path / "out")[0]["response"]["body"]["model"] == model  # the one that ran


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("IN OUT", 2, "model: no line names one"),
        ("nowhere OUT --model MODEL", 2, "nowhere cannot be read"),
        ("IN IN --model MODEL", 2, "is the input"),
        ("IN OLD --model MODEL", 2, "allow it to be replaced (overwrite=True, --overwrite)"),
        ("IN OUT --model nosuchmodel", 3, "no model has this name"),
        ("IN OUT --model MODEL --top-p 2", 2, "--top-p: must be a number"),
        ("IN OUT --model MODEL --dtype int3", 2, "--dtype: must be one of"),
        ("TWINS OUT --model MODEL", 2, "lines 1 and 2 "),
        ("IN", 2, "Missing argument"),
    ],
)
def test_mistakes(slipstream: Run, model: str, tmp_path: Path, words: str, code: int, said: str) -> None:
    write(tmp_path / "in", {"prompt": "x"})
    write(tmp_path / "twins", {"prompt": "x", "id": 1}, {"prompt": "y", "id": 1})
    write(tmp_path / "old")
    places = {"MODEL": model} | {name.upper(): str(tmp_path / name) for name in ("in", "out", "old", "twins")}
    ran = slipstream("batch", *(places.get(word, word) for word in words.split()))
    assert said in ran.err and (ran.code, ran.out) == (code, "")
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "old", "twins"]


def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(slipstream: Run, model: str, tmp_path: Path) -> None:
    lines = [{"id": i, "prompt": f"The {i}", "max_new_tokens": 10 if i < 5 else 700} for i in range(9)]
    source, out = write(tmp_path / "in", *lines), tmp_path / "out"
    words = ["batch", str(source), str(out), "--model", model, "--max-num-seqs", "3", *GREEDY]
    ran = subprocess.Popen(
        [*PROGRAM, *words], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    journal = tmp_path / ".out.partial" / "journal"
    while ran.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 6):
        time.sleep(0.005)
    ran.send_signal(signal.SIGINT)
    printed, err = ran.communicate(timeout=60)
    assert (ran.returncode, printed) == (130, ""), err
    assert "Run the same command again to go on" in err and "Traceback" not in err
    assert not out.exists()
    done = slipstream(*words, "--json").json
    assert done["resumed"] >= 5 and done["answered"] == 9
    assert [line["usage"]["completion_tokens"] for line in read(out)] == [10] * 5 + [700] * 4


def test_a_terminal_shows_what_is_done(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENVIRONMENT, "TERM", "xterm")
    lines = [{"prompt": f"The {i}", "max_new_tokens": 1000} for i in range(4)]
    source = write(tmp_path / "in", *lines)
    terminal = Terminal("batch", str(source), str(tmp_path / "out"), "--model", model, "--max-num-seqs", "1", *GREEDY)
    try:
        terminal.until("answering")
        terminal.until("0/4")
        terminal.until("tokens/s")
        os.kill(terminal.pid, signal.SIGINT)
        terminal.until("Run the same command again")
        assert terminal.wait() == 130
    finally:
        terminal.close()
