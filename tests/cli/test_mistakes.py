"""Every mistake of a user ends in one line that says what to do, and in the exit code of its kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.cli.tiny import write_chat_model


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("generate nosuchmodel x", 3, "'nosuchmodel': no model has this name"),
        ("generate ./nowhere/at/all x", 3, "no such folder or file"),
        ("pull nosuchmodel", 3, "no model has this name"),
        ("pull MODEL --revision main", 3, "revision"),
        ("inspect nosuchmodel", 3, "no model has this name"),
        ("explain nosuchmodel", 3, "no model has this name"),
        ("chat nosuchmodel", 3, "no model has this name"),
        ("generate MODEL x --top-p 3", 2, "--top-p: must be a number above 0 to 1, got 3.0"),
        ("generate MODEL x --top-p much", 2, "--top-p"),
        ("generate MODEL x --max-new-tokens 0", 2, "at least 1, or none"),
        ("generate MODEL x --max-new-tokens 99999999999", 2, "--max-new-tokens"),
        ("generate MODEL x --n 2 --temperature 0", 2, "--n: 2 answers at temperature=0 would all be the same"),
        ("generate MODEL x --logit-bias 5", 2, "--logit-bias: '5' is not ID=VALUE"),
        ("generate MODEL x --logit-bias 999=1", 2, "--logit-bias: token 999 is not in the vocabulary of 131"),
        ("generate MODEL x --stop-token-id 131", 2, "--stop-token-id: token 131 is not in the vocabulary of 131"),
        ("generate MODEL x --include-stop-str-in-output", 2, "has no effect without stop strings"),
        ("generate MODEL x --file /nowhere", 2, "one on the command line and one in --file"),
        ("generate MODEL --file /nowhere", 2, "/nowhere cannot be read: No such file or directory"),
        ("generate MODEL --file /", 2, "cannot be read"),
        ("generate MODEL x --system Hello", 2, "add --chat"),
        ("generate MODEL x --reasoning-effort low", 2, "--reasoning-effort: is part of a chat"),
        ("generate MODEL x --chat --reasoning-effort low", 2, "--reasoning-effort: this model's chat template has no"),
        ("generate MODEL x --kv-cache-memory-bytes 2Q", 2, "'2Q' is not a size"),
        ("generate MODEL x --kv-cache-memory-bytes 1KiB", 5, "what would do: kv_cache_memory_bytes="),
        ("generate MODEL x --max-model-len 100000", 2, "--max-model-len: 100000 is more than the 2048 positions"),
        ("generate MODEL abcdefgh --max-model-len 4", 2, "prompt: 9 tokens leave no room for an answer"),
        ("generate MODEL x --deadline 0", 2, "--deadline: must be a number above 0"),
        ("generate MODEL x --priority 3", 2, "--priority: 3 has no effect"),
        ("generate MODEL x --scheduling-policy best", 2, "--scheduling-policy: must be one of fcfs, priority"),
        ("generate MODEL x --dtype int3", 2, "--dtype: must be one of"),
        ("generate MODEL x --device tpu", 2, "--device: must be"),
        ("generate MODEL x --device cuda:77", 2, "cuda:77"),
        ("generate MODEL x --attn-implementation nosuch", 4, "no implementation is called 'nosuch'"),
        ("explain MODEL --attn-implementation nosuch", 4, "no implementation is called 'nosuch'"),
        ("explain MODEL --page-size 0", 2, "--page-size: must be a whole number of at least 1"),
        ("generate MODEL x --temprature 0", 2, "No such option: --temprature"),
        ("generate MODEL x y", 2, "unexpected extra argument"),
        ("generate", 2, "see slipstream generate --help"),
        ("generat MODEL x", 2, "Did you mean 'generate'?"),
        ("--nosuch", 2, "No such option: --nosuch"),
    ],
)
def test_one_line_and_an_exit_code(slipstream: Run, model: str, words: str, code: int, said: str) -> None:
    ran = slipstream(*words.replace("MODEL", model).split())
    assert said in ran.err
    assert ran.code == code
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1 and ran.err.endswith("\n")
    assert ran.out == ""


def test_an_empty_prompt(slipstream: Run, model: str, tmp_path: Path) -> None:
    plain = write_chat_model(tmp_path / "plain")
    config = json.loads((plain / "tokenizer_config.json").read_text())
    (plain / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": False}))
    ran = slipstream("generate", plain, "")
    assert (ran.code, ran.out) == (2, "") and "prompt: is empty" in ran.err


def test_what_is_not_utf8(slipstream: Run, model: str, tmp_path: Path) -> None:
    file = tmp_path / "latin"
    file.write_bytes(b"caf\xe9 au lait")
    for ran in (
        slipstream("generate", model, "--file", file),
        slipstream("generate", model, stdin=b"caf\xe9 au lait"),
        slipstream("generate", model, "caf\udce9 au lait"),  # how Python hands over such words of the command line
        slipstream("chat", model, stdin=b"caf\xe9 au lait\n"),
    ):
        assert ran.code == 2 and ran.err.startswith("error: ") and ran.err.count("\n") == 1


@pytest.mark.parametrize("command", ["generate", "explain", "inspect"])
def test_an_unknown_architecture_lists_the_known_ones(slipstream: Run, tmp_path: Path, command: str) -> None:
    folder = write_chat_model(tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    ran = slipstream(command, folder, *(["x"] if command == "generate" else []))
    assert ran.code == 3 and ran.out == ""
    assert "'mamba' is not supported" in ran.err and "llama" in ran.err and "gpt_oss" in ran.err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b'{"model_type": "llama"}'),
        ("model.safetensors", b"\xff" * 40),
        ("model.safetensors", b""),
        ("tokenizer.json", b"{}"),
        ("generation_config.json", b'{"top_p": 5}'),
        ("tokenizer_config.json", b'{"chat_template": "{% for %}"}'),
    ],
)
def test_a_damaged_checkpoint(slipstream: Run, tmp_path: Path, name: str, content: bytes) -> None:
    folder = write_chat_model(tmp_path / "damaged")
    (folder / name).write_bytes(content)
    ran = slipstream("generate", folder, "x", "--chat", "--max-new-tokens", 2)
    assert ran.code == 3 and ran.err.startswith("error: ") and ran.err.count("\n") == 1, ran.err


def test_a_model_without_a_chat_template_cannot_chat(slipstream: Run, tmp_path: Path) -> None:
    base = write_chat_model(tmp_path / "base", template=None)
    assert slipstream("generate", base, "x", "--max-new-tokens", 2).code == 0
    for ran in (slipstream("generate", base, "x", "--chat"), slipstream("chat", base, stdin="Hello\n")):
        assert ran.code == 2 and "no chat template" in ran.err and "generate" in ran.err
