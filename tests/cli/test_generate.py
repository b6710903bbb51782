"""`slipstream generate` against the Python front, and what it prints where."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from slipstream import LLM, SamplingParams
from slipstream.config import EngineConfig
from tests.cli.conftest import Run

SUMMARY = re.compile(
    r"(\d+) prompt tokens, (\d+) new tokens, first token after [\d.]+ m?s, [\d.]+ tokens/s, peak memory [\d.]+ [MG]iB\n"
)
GREEDY = ("--temperature", "0", "--max-new-tokens", "12", "--ignore-eos")


@pytest.fixture(scope="module")
def llm(model: str) -> LLM:
    return LLM(model)


def test_the_answer_is_that_of_the_python_front(slipstream: Run, model: str, llm: LLM) -> None:
    expected = llm.generate("The tide", SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True))
    ran = slipstream("generate", model, "The tide", *GREEDY)
    assert (ran.code, ran.out) == (0, expected.text + "\n")
    summary = SUMMARY.fullmatch(ran.err)
    assert summary and summary.groups() == ("9", "12")  # <s> and eight letters


def test_json_is_all_there_is_on_standard_output(slipstream: Run, model: str, llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True, logprobs=2, prompt_logprobs=0)
    expected = llm.generate("The tide", params)
    ran = slipstream("generate", model, "The tide", *GREEDY, "--logprobs", 2, "--prompt-logprobs", 0, "--json")
    assert (ran.code, ran.err) == (0, "")
    got = ran.json
    assert got["prompt"] == "The tide"
    assert got["prompt_token_ids"] == list(expected.prompt_token_ids)
    answer = got["outputs"][0]
    assert answer["text"] == expected.text
    assert answer["token_ids"] == expected.outputs[0].token_ids
    assert answer["finish_reason"] == "length"
    assert expected.outputs[0].logprobs is not None
    for a, b in zip(answer["logprobs"], expected.outputs[0].logprobs, strict=True):
        assert (a["token_id"], a["rank"], len(a["top"])) == (b.token_id, b.rank, 2)
        assert a["logprob"] == pytest.approx(b.logprob, abs=1e-5)
    assert got["prompt_logprobs"][0] is None and len(got["prompt_logprobs"]) == 9
    assert got["usage"]["new_tokens"] == 12 and got["usage"]["peak_memory_bytes"] > 10**7
    assert "metrics" not in got


def test_every_sampling_option_reaches_the_sampler(
    slipstream: Run, model: str, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[SamplingParams] = []
    submit = LLM.submit

    def watch(self: LLM, prompt: str, params: SamplingParams) -> object:
        seen.append(params)
        return submit(self, prompt, params)

    monkeypatch.setattr(LLM, "submit", watch)
    given = SamplingParams(
        n=2, temperature=0.7, top_k=20, top_p=0.9, min_p=0.01, typical_p=0.95, repetition_penalty=1.1,
        presence_penalty=0.2, frequency_penalty=0.3, logit_bias={50: -1.5, 60: float("-inf")}, seed=7, min_new_tokens=1,
        max_new_tokens=9, stop=("zq", "\n"), stop_token_ids=(5, 6), include_stop_str_in_output=True, ignore_eos=True,
        logprobs=1, prompt_logprobs=0, skip_special_tokens=False, deadline=600.5, priority=-2, cache_salt="mine",
    )  # fmt: skip
    for f in dataclasses.fields(SamplingParams):  # a new field must be given here, and so have an option
        assert getattr(given, f.name) != getattr(SamplingParams(), f.name), f.name
    words = shlex.split("""--n 2 --temperature 0.7 --top-k 20 --top-p 0.9 --min-p 0.01 --typical-p 0.95
        --repetition-penalty 1.1
        --presence-penalty 0.2 --frequency-penalty 0.3 --logit-bias 50=-1.5 --logit-bias 60=-inf --seed 7
        --min-new-tokens 1 --max-new-tokens 9 --stop zq --stop-token-id 5 --stop-token-id 6
        --include-stop-str-in-output --ignore-eos --logprobs 1 --prompt-logprobs 0 --no-skip-special-tokens
        --deadline 600.5 --priority -2 --cache-salt mine --scheduling-policy priority""")
    assert slipstream("generate", model, "Tide", *words, "--stop", "\n").code == 0
    assert seen == [given]


def test_every_engine_option_reaches_the_engine(slipstream: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("slipstream.plan.make_plan", lambda asked, *_: seen.append(asked) or 1 / 0)
    given = EngineConfig(
        device="cpu", dtype="float32", quantization="dequantize", max_model_len=64, max_num_seqs=3, max_num_batched_tokens=32,
        kv_cache_memory_bytes=3 << 20, gpu_memory_utilization=0.4, page_size=8, attn_implementation="sdpa",
        linear_implementation="torch", num_threads=1, enable_prefix_caching=False,
        scheduling_policy="priority", batch_invariant=True, weights="random", enforce_eager=True, async_scheduling=False,
        moe_implementation="loop", reduce_implementation="collective", enable_expert_parallel=True,
        kernels={"norm": "a/b:C"}, use_kernels=True, kernels_lock="my.lock", kernels_policy="my.toml",
    )  # fmt: skip
    for f in dataclasses.fields(EngineConfig):
        if f.name not in (
            "seed",
            "tensor_parallel_size",
            "count_calls",
        ):  # --seed is the request's; ranks would be started
            assert getattr(given, f.name) != getattr(EngineConfig(), f.name), f.name
    words = shlex.split("""--device cpu --dtype float32 --quantization dequantize --max-model-len 64 --max-num-seqs 3
        --max-num-batched-tokens 32 --kv-cache-memory-bytes 3MiB --gpu-memory-utilization 0.4 --page-size 8
        --attn-implementation sdpa --linear-implementation torch --num-threads 1 --no-enable-prefix-caching
        --scheduling-policy priority --batch-invariant --weights random --enforce-eager --no-async-scheduling
        --moe-implementation loop --reduce-implementation collective --enable-expert-parallel
        --kernels norm=a/b:C --use-kernels --kernels-lock my.lock --kernels-policy my.toml""")
    bench = ["--batch-size", 3, "--input-len", 9, "--output-len", 9]
    for command in (["generate", model, "x"], ["chat", model], ["explain", model], ["bench", "decode", model, *bench]):
        with pytest.raises(ZeroDivisionError):  # a bug of ours is not dressed up as a mistake of the user
            slipstream(*command, *words)
    assert seen == [given] * 4


@pytest.mark.parametrize(
    ("text", "size"),
    [("123", 123), ("2GiB", 2 << 30), ("2G", 2 << 30), ("1.5KiB", 1536), ("500MB", 500_000_000), ("7 tb", 7 * 10**12)],
)
def test_sizes(text: str, size: int) -> None:
    from slipstream.cli.options import parse_size

    assert parse_size(text) == size


def test_the_prompt_may_come_through_a_pipe_or_from_a_file(slipstream: Run, model: str, tmp_path: Path) -> None:
    expected = slipstream("generate", model, "The\ntide", *GREEDY, "--json").json
    file = tmp_path / "prompt.txt"
    file.write_text("The\ntide\n")
    for ran in (
        slipstream("generate", model, *GREEDY, "--json", stdin="The\ntide\n"),
        slipstream("generate", model, "-", *GREEDY, "--json", stdin="The\ntide"),
        slipstream("generate", model, "--file", file, *GREEDY, "--json", stdin="not this"),
    ):
        assert ran.json["prompt"] == "The\ntide"
        assert ran.json["outputs"] == expected["outputs"]


def test_several_answers_stand_under_headers(slipstream: Run, model: str) -> None:
    words = ("generate", model, "The tide", "--n", 3, "--seed", 5, "--max-new-tokens", 6, "--ignore-eos")
    texts = [c["text"] for c in slipstream(*words, "--json").json["outputs"]]
    assert len(set(texts)) == 3
    out = slipstream(*words).out
    assert out == "\n".join(f"--- answer {i + 1} of 3 (length)\n{text}\n" for i, text in enumerate(texts))


def test_a_deadline_that_cuts_says_so(slipstream: Run, model: str) -> None:
    words = ("generate", model, "The tide", "--max-new-tokens", 1000, "--ignore-eos", "--deadline", 0.2)
    ran = slipstream(*words)
    assert ran.code == 0 and ran.err.endswith("\nthe deadline of 0.2 s cut the answer off\n"), ran.err
    several = slipstream(*words, "--n", 2, "--seed", 0)
    assert several.out.startswith("--- answer 1 of 2 (deadline)\n") and several.err.endswith("cut 2 of 2 answers off\n")
    ran = slipstream(*words, "--json")
    (answer,) = ran.json["outputs"]
    assert (answer["finish_reason"], answer["stop_reason"]) == ("abort", "deadline") and "deadline" in ran.err
    assert len(answer["token_ids"]) < 1000
    chat = slipstream("chat", model, *words[3:], "--json", stdin="Hello\n")
    assert chat.json["stop_reason"] == "deadline" and chat.err == "the deadline of 0.2 s cut the answer off\n"
    kind = slipstream("generate", model, "x", "--stop", "deadline", "--max-new-tokens", 2)
    assert "cut" not in kind.err


def test_logprobs_are_printed_after_the_answer(slipstream: Run, model: str) -> None:
    ran = slipstream("generate", model, "ab", *GREEDY, "--logprobs", 3, "--prompt-logprobs", 1)
    _, prompt, answer = ran.out.split("\n\n")
    assert len(prompt.splitlines()) == 2 + 3 and "of the prompt" in prompt
    assert len(answer.splitlines()) == 2 + 12
    assert [line.split()[3] for line in answer.splitlines()[2:]] == ["1"] * 12  # greedy takes the first rank


def test_chat_asks_in_the_models_own_format(slipstream: Run, model: str, llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    expected = llm.chat(messages, params)
    words = ("generate", model, "Hello", "--chat", "--system", "Be brief.", *GREEDY)
    assert slipstream(*words).out == expected.text + "\n"
    got = slipstream(*words, "--json").json
    assert got["prompt"].startswith("<s><|im_start|>system\nBe brief.<|im_end|>")
    assert got["answers"] == [{"content": expected.text, "reasoning": None, "tool_calls": []}]


def test_no_limit_but_the_models_own(slipstream: Run, model: str) -> None:
    words = ("generate", model, "x", "--ignore-eos", "--max-model-len", 40, "--json")
    got = slipstream(*words, "--max-new-tokens", "none").json
    assert len(got["outputs"][0]["token_ids"]) == 40 - 2


def test_greedy_puts_a_recommended_typical_p_aside(
    slipstream: Run, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slipstream.llm._default_params", lambda _: SamplingParams(typical_p=0.9, top_p=0.8))
    assert slipstream("generate", model, "x", *GREEDY).code == 0
