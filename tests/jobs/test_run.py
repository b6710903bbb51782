"""A file of requests in, a file of answers out: both formats against the Python front, and every kind of failure."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slipstream import LLM, CapacityError, ConfigError, RequestError, SamplingParams
from slipstream.jobs import JobReport, lines, run, run_batch
from tests.cli.tiny import write_chat_model

GREEDY = {"temperature": 0, "ignore_eos": True}
HELLO = [{"role": "user", "content": "Hello"}]
URL = {"method": "POST", "url": "/v1/chat/completions"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("jobs") / "tiny")


@pytest.fixture
def llm(folder: Path) -> LLM:
    return LLM(folder, max_num_seqs=3, max_model_len=500)


class Job:
    """Runs a file of these lines: objects, or text as it is."""

    def __init__(self, llm: LLM, folder: Path) -> None:
        self.llm, self.source, self.out = llm, folder / "in.jsonl", folder / "out.jsonl"
        self.hidden = folder / ".out.jsonl.partial"

    def write(self, *made: Any) -> None:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in made]
        self.source.write_text("\n".join(texts), encoding="utf-8")

    def run(self, *made: Any, **options: Any) -> list[Any]:
        if made:
            self.write(*made)
        self.report: JobReport = run_batch(self.llm, self.source, self.out, **options)
        return [json.loads(line) for line in self.out.read_text("utf-8").splitlines()]


@pytest.fixture
def job(llm: LLM, tmp_path: Path) -> Job:
    return Job(llm, tmp_path)


def test_plain_lines(job: Job) -> None:
    params = SamplingParams(max_new_tokens=7, **GREEDY)
    a, b, c, d = job.run(
        {"prompt": "The tide", "id": "tide", "max_new_tokens": 7, **GREEDY},
        {
            "prompt": [21, 22, 23],
            "custom_id": "ids",
            "max_new_tokens": 7,
            "logprobs": 1,
            "prompt_logprobs": 0,
            **GREEDY,
        },
        "",
        {"messages": HELLO, "id": 5, "max_new_tokens": 7, **GREEDY},
        {"prompt": "x", "n": 3, "seed": 11, "max_new_tokens": 4},
    )
    llm = job.llm
    assert a == {
        "line": 1, "id": "tide", "text": llm.generate("The tide", params).text, "finish_reason": "length",
        "stop_reason": None, "usage": {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16}, "error": None,
    }  # fmt: skip
    expected = llm.generate([[21, 22, 23]], params.replace(logprobs=1, prompt_logprobs=0))[0]
    assert (b["id"], b["text"], b["prompt_logprobs"][0]) == ("ids", expected.text, None)
    assert [p["token_id"] for p in b["logprobs"]] == expected.outputs[0].token_ids
    assert all(p["top"][0] == [p["token_id"], p["logprob"]] for p in b["logprobs"])
    assert [p["token_id"] for p in b["prompt_logprobs"][1:]] == [22, 23]
    assert (c["line"], c["id"], c["text"]) == (4, 5, llm.chat(HELLO, params).text)
    texts = [o.text for o in llm.generate("x", SamplingParams(n=3, seed=11, max_new_tokens=4)).outputs]
    assert (d["line"], d["id"], [o["text"] for o in d["outputs"]]) == (5, None, texts)
    report = job.report
    assert (report.lines, report.answered, report.errors, report.resumed) == (4, 4, 0, 0)
    assert report.new_tokens == sum(line["usage"]["completion_tokens"] for line in (a, b, c, d)) and report.seconds > 0
    assert report.prompt_tokens == sum(line["usage"]["prompt_tokens"] for line in (a, b, c, d))
    assert not job.hidden.exists()


def test_the_batch_format_of_openai(job: Job) -> None:
    chat = {"model": "m", "messages": HELLO, "max_completion_tokens": 6, "logprobs": True, "top_logprobs": 2, **GREEDY}
    text = {"model": "m", "prompt": "The tide", "max_tokens": 5, "logprobs": 1, "stream": False, "user": None, **GREEDY}
    a, b = job.run(
        {"custom_id": "a", **URL, "body": chat},
        {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": text},
    )
    assert a["custom_id"] == "a" and a["error"] is None and a["response"]["status_code"] == 200
    assert a["id"] != b["id"] and a["response"]["request_id"] != b["response"]["request_id"]
    body = a["response"]["body"]
    expected = job.llm.chat(HELLO, SamplingParams(max_new_tokens=6, logprobs=2, **GREEDY))
    assert (body["object"], body["model"]) == ("chat.completion", "m")
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text}
    assert choice["finish_reason"] == "length" and choice["index"] == 0
    scores = choice["logprobs"]["content"]
    kept = expected.outputs[0].logprobs or []
    assert [s["logprob"] for s in scores] == pytest.approx([p.logprob for p in kept], abs=1e-5)
    assert [bytes(s["bytes"]) for s in scores] == [job.llm.tokenizer.token_bytes(p.token_id) for p in kept]
    assert all(len(s["top_logprobs"]) == 2 for s in scores)
    prompt = len(expected.prompt_token_ids)
    assert body["usage"] == {"prompt_tokens": prompt, "completion_tokens": 6, "total_tokens": prompt + 6}

    body = b["response"]["body"]
    assert body["object"] == "text_completion"
    assert body["choices"][0]["text"] == job.llm.generate("The tide", SamplingParams(max_new_tokens=5, **GREEDY)).text
    scored = body["choices"][0]["logprobs"]
    assert {len(values) for values in scored.values()} == {5}
    assert scored["text_offset"][1] == len(scored["tokens"][0])


def openai(**body: Any) -> dict[str, Any]:
    return {"custom_id": "x", **URL, "body": {"model": "m", "messages": HELLO, "max_tokens": 2, **body}}


@pytest.mark.parametrize(
    ("line", "field", "said"),
    [
        ("{oops", None, "not JSON"),
        ("[1]", None, "must be a JSON object"),
        ('{"prompt": "\\ud800"}', None, "surrogate"),
        ('{"prompt": "a", "prompt": "b"}', "prompt", "twice"),
        ('{"\\ud800": 1, "\\ud800": 2}', "?", "stands twice"),
        ('{"prompt": "a", "seed": ' + "1" * 5000 + "}", None, "not JSON"),
        ("[" * 100_000, None, "not JSON"),
        ({"id": "x"}, "prompt", "one of the two"),
        ({"prompt": "x", "messages": HELLO}, "prompt", "one of the two"),
        ({"prompt": 5}, "prompt", "token ids"),
        ({"prompt": [5, 10_000]}, "prompt", "vocabulary"),
        ({"prompt": ""}, None, None),
        ({"prompt": "x", "max_tokens": 3}, "max_tokens", "did you mean max_new_tokens"),
        ({"prompt": "x", "temperature": "hot"}, "temperature", "must be a number"),
        ({"prompt": "x", "tools": []}, "tools", "unknown"),
        ({"prompt": "x", "id": "a", "custom_id": "b"}, "id", "one of the two"),
        ({"prompt": "x", "id": [1]}, "id", "must be a string"),
        ({"prompt": "x" * 600}, "prompt", "max_model_len is 500"),
        ({"messages": "hello"}, "messages", "must be a list"),
        ({"messages": HELLO, "reasoning_effort": "low"}, "reasoning_effort", "no use for it"),
        (openai(suffix="y"), "suffix", "unknown"),
        (openai(stream=True), "stream", "not supported"),
        (openai(response_format={"type": "json_object"}), "response_format", "not supported"),
        (openai(model="other"), "model", "one job runs one model"),
        (openai(top_logprobs=2), "top_logprobs", "no effect"),
        (openai(logprobs=2), "logprobs", "true or false"),
        (openai(max_completion_tokens=3), "max_completion_tokens", "contradicts"),
        (openai(n=2, temperature=0), "n", "all be the same"),
        (openai(messages=[{"role": "user"}]), "messages", "no content"),
        ({"custom_id": "x", **URL, "body": {"prompt": "x"}}, "messages", "missing"),
        ({"custom_id": "x", "url": "/v1/completions", "body": {"prompt": ["x", "y"]}}, "prompt", "a line for each"),
        ({"custom_id": "x", "url": "/v1/embeddings", "body": {}}, "url", "must be one of"),
        ({"custom_id": "x", "method": "GET", "body": {}}, "method", "must be POST"),
        ({"custom_id": "x", **URL}, "body", "must be an object"),
        ({"custom_id": "x", **URL, "body": {}, "priority": 1}, "priority", "not a field"),
        ({**URL, "body": {}}, "custom_id", "missing"),
    ],
)
def test_what_is_wrong_with_a_line_is_its_answer(llm: LLM, tmp_path: Path, line: Any, field: str, said: str) -> None:
    job = Job(llm, tmp_path)
    good = [openai() | {"custom_id": f"good {i}"} for i in range(2)]
    first, bad, last = job.run(good[0], line, good[1])
    assert [a["response"]["status_code"] for a in (first, last)] == [200, 200]
    if said is None:  # an empty text has its first token here, so it is no mistake
        assert bad["error"] is None
        return
    assert (
        said in bad["error"]["message"] and bad["error"]["param"] == field and bad["error"]["code"] == "invalid_request"
    )
    assert (job.report.answered, job.report.errors) == (2, 1)
    if "custom_id" in bad:
        assert bad["response"] is None
        assert bad["custom_id"] == (line.get("custom_id") if isinstance(line, dict) else None)
    else:
        assert bad["line"] == 2


def test_what_cannot_be_read_is_answered_in_the_format_of_the_file(job: Job) -> None:
    assert job.run({"prompt": "x", "max_new_tokens": 2}, "{oops")[1].keys() == {"line", "id", "error"}


def test_a_line_too_long_is_skipped_over(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE", 100)
    a, b, c = job.run({"prompt": "x" * 300}, {"prompt": "x", "max_new_tokens": 2}, {"prompt": "y" * 100})
    assert a["error"]["message"].startswith("the line is longer") and b["error"] is None and c["error"] is not None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no lines"),
        ("\n \n", "has no lines"),
        ('{"id": "a", "prompt": "x"}\n\n{"id": "b"}\n{"custom_id": "a", "body": {}}', "lines 1 and 4 .* the id 'a'"),
    ],
)
def test_faults_of_the_whole_file(job: Job, text: str, said: str) -> None:
    job.write(text)
    with pytest.raises(RequestError, match=said):
        job.run()
    assert [p.name for p in job.source.parent.iterdir()] == ["in.jsonl"]


def test_places(job: Job, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        job.run()
    job.write({"prompt": "x"})
    for out, said in (
        (tmp_path / "no" / "out", "no folder"),
        (job.source, "is the input"),
        (tmp_path, "not a plain file"),
    ):
        with pytest.raises(ConfigError, match=said):
            run_batch(job.llm, job.source, out, overwrite=True)
    with pytest.raises(RequestError, match="not a file"):
        run_batch(job.llm, tmp_path, job.out)
    job.out.write_text("mine")
    with pytest.raises(ConfigError, match="--overwrite"):
        job.run()
    assert job.out.read_text() == "mine" and not job.hidden.exists()
    assert len(job.run(overwrite=True)) == 1


def many(count: int = 20) -> list[Any]:
    return [{"id": i, "prompt": f"The {i}", "max_new_tokens": 2 + i % 5, **GREEDY} for i in range(count)]


def stop_after(count: int) -> Any:
    def progress(done: int, total: int, tokens: int) -> None:
        if done >= count:
            raise KeyboardInterrupt

    return progress


def test_few_are_in_the_engine_at_a_time(job: Job) -> None:
    most = 0

    def look(done: int, total: int, tokens: int) -> None:
        nonlocal most
        assert total == 40
        scheduler = job.llm.engine.scheduler
        most = max(most, len(scheduler.running) + len(scheduler.waiting))

    job.run(*many(40), progress=look)
    assert most == 3


def test_a_flood_of_bad_lines_is_answered_as_it_comes(job: Job) -> None:
    """It holds up nobody who runs, and what a run that is killed has refused is kept."""
    steps: list[int] = []
    good = {"id": "good", "prompt": "The tide", "max_new_tokens": 20, **GREEDY}
    found = job.run(good, *["{"] * 300, progress=lambda *_: steps.append(job.llm.snapshot().new_tokens))
    assert [line["error"] is None for line in found] == [True] + [False] * 300
    assert len(set(steps[:20])) == 20, "a step between the refusals"
    assert len(steps) >= 100


def test_an_interrupted_job_goes_on_and_answers_each_line_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.write(*many())
    whole = job.run()
    job.out.unlink()
    with pytest.raises(KeyboardInterrupt):
        job.run(progress=stop_after(8))
    assert not job.out.exists() and not job.llm.engine.scheduler.busy
    submitted = []
    submit = job.llm.engine.submit
    monkeypatch.setattr(job.llm.engine, "submit", lambda *given: submitted.append(given) or submit(*given))
    assert job.run() == whole
    assert 8 <= job.report.resumed == 20 - len(submitted)
    assert job.report.new_tokens == sum(line["usage"]["completion_tokens"] for line in whole)
    assert not job.hidden.exists()


def test_another_input_or_other_settings_are_refused(job: Job) -> None:
    with pytest.raises(KeyboardInterrupt):
        job.run(*many(), progress=stop_after(5), params={"seed": 3})
    kept = (job.hidden / "journal").read_bytes()
    with pytest.raises(ConfigError, match="seed was 3 and is 4.*--overwrite"):
        job.run(params={"seed": 4})
    with pytest.raises(ConfigError, match="differs from what .* was begun with.*--overwrite"):
        job.run(*many(19), params={"seed": 3})
    assert (job.hidden / "journal").read_bytes() == kept
    job.write(*many())
    job.run(params={"seed": 3})
    assert job.report.resumed >= 5
    with pytest.raises(KeyboardInterrupt):
        job.run(overwrite=True, progress=stop_after(5))
    assert len(job.run(*many(7), overwrite=True)) == 7
    assert job.report.resumed == 0


def test_a_damaged_journal_is_trusted_up_to_the_damage(job: Job) -> None:
    job.write(*many())
    whole = job.run()
    job.out.unlink()
    with pytest.raises(KeyboardInterrupt):
        job.run(progress=stop_after(9))
    journal = job.hidden / "journal"
    kept = journal.read_bytes().splitlines(keepends=True)
    at = kept[5].index(b'"text": "') + 9
    kept[5] = kept[5][:at] + bytes([kept[5][at] ^ 1]) + kept[5][at + 1 :]
    journal.write_bytes(b"".join(kept))
    assert job.run() == whole and job.report.resumed == 4

    job.out.unlink()
    with pytest.raises(KeyboardInterrupt):
        job.run(progress=stop_after(9))
    journal.write_bytes(b"?" + journal.read_bytes()[1:])
    with pytest.raises(ConfigError, match="is damaged.*--overwrite"):
        job.run()
    assert job.run(overwrite=True) == whole and job.report.resumed == 0


def test_another_model_is_refused(job: Job, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        job.run(*many(), progress=stop_after(5))
    other = write_chat_model(tmp_path / "other", template="{{ messages[0].content }}")
    job.llm = LLM(other, max_model_len=500)
    with pytest.raises(ConfigError, match="model was"):
        job.run()


def test_an_output_that_appears_meanwhile_is_not_replaced(job: Job) -> None:
    job.write(*many(4))
    with pytest.raises(ConfigError, match="all lines are answered"):
        job.run(progress=lambda done, total, tokens: None if job.out.exists() else job.out.write_text("mine"))
    assert job.out.read_text() == "mine"
    job.out.unlink()
    assert len(job.run()) == 4 and job.report.resumed == 4


def test_an_input_that_changes_meanwhile_is_noticed(job: Job) -> None:
    long = [{**line, "id": f"{line['id']} {'x' * 4000}"} for line in many(30)]  # so that it is read in several pieces
    job.write(*long)

    def change(done: int, total: int, tokens: int) -> None:
        if done >= 3:
            job.write(*long[:-1], {**long[-1], "prompt": "changed"})

    with pytest.raises(ConfigError, match="was changed while the job ran"):
        job.run(progress=change)
    assert not job.out.exists()


def test_two_runs_at_once(job: Job) -> None:
    job.write(*many(5))
    with pytest.raises(ConfigError, match="another process"):
        job.run(progress=lambda done, total, tokens: run_batch(job.llm, job.source, job.out))


def test_a_full_disk_keeps_what_was_answered(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    write = os.write
    left = 3000

    def short(handle: int, data: Any) -> int:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        left -= (done := write(handle, bytes(data)[:left]))
        return done

    job.write(*many())
    with monkeypatch.context() as patch:
        patch.setattr("slipstream.jobs.journal.os.write", short)
        with pytest.raises(CapacityError, match="disk is full.*run the same again"):
            job.run()
    assert not job.out.exists()
    assert [line["id"] for line in job.run()] == list(range(20)) and 0 < job.report.resumed < 20


def test_bad_logits_are_an_error_of_their_line(job: Job) -> None:
    forbidden = {str(t): float("-inf") for t in range(job.llm.model_config.vocab_size)}
    a, b = job.run({"prompt": "x", "logit_bias": forbidden}, {"prompt": "x", "max_new_tokens": 2})
    assert a["error"]["code"] == "failed" and "no token to choose" in a["error"]["message"] and b["error"] is None


def test_a_pass_that_raises_costs_only_the_line_at_fault(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were beside it are tried again, and get the answer that they would have had."""
    job.write(*many(12))
    whole = job.run()
    engine = job.llm.engine
    poison = tuple(job.llm.tokenizer.encode("The 5"))
    real, culprits = engine.runner.launch, set()

    def fails(step: Any) -> Any:
        culprits.update(s.sequence for s in step.started if s.prompt_token_ids == poison)
        if any(c.sequence in culprits for c in step.chunks):
            raise RuntimeError("a kernel failed")
        return real(step)

    monkeypatch.setattr(engine.runner, "launch", fails)
    found = job.run(overwrite=True)
    assert "a kernel failed" in found[5]["error"]["message"]
    assert found[:5] + found[6:] == whole[:5] + whole[6:]


def test_a_machine_that_fails_ends_the_job(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(step: Any) -> Any:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(job.llm.engine.runner, "launch", fails)
        with pytest.raises(RuntimeError, match="the device is gone"):
            job.run(*many(60))
    found = job.run()
    assert [line["id"] for line in found] == list(range(60))
    assert job.report.errors < run._FAILURES


def test_a_deadline_counts_from_when_the_line_runs_and_is_answered_once(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pass takes a second on this clock; three lines run together, so the last ones begin after 20 seconds."""
    now = 100.0
    monkeypatch.setattr("slipstream.engine.engine.time", SimpleNamespace(perf_counter=lambda: now))
    real = job.llm.engine.runner.launch

    def slow(step: Any) -> Any:
        nonlocal now
        now += 1
        return real(step)

    monkeypatch.setattr(job.llm.engine.runner, "launch", slow)
    made = [{"id": i, "prompt": f"The {i}", "max_new_tokens": 10, "deadline": 10.5, **GREEDY} for i in range(9)]
    made[4]["deadline"] = 4.5
    body = {"prompt": "x", "max_tokens": 9, "deadline": 2.5, **GREEDY}
    found = job.run(*made, {"custom_id": "late", "url": "/v1/completions", "body": body})
    assert [line["finish_reason"] for line in found[:4] + found[5:9]] == ["length"] * 8
    assert (found[4]["finish_reason"], found[4]["stop_reason"], found[4]["error"]) == ("abort", "deadline", None)
    assert found[4]["usage"]["completion_tokens"] == 5
    (choice,) = found[9]["response"]["body"]["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("abort", "deadline") and choice["text"]
    assert (job.report.answered, job.report.errors) == (10, 0)

    job.out.unlink()
    with pytest.raises(KeyboardInterrupt):
        job.run(progress=stop_after(6))
    again = job.run()
    assert again[4] == found[4] and job.report.resumed >= 6
    assert [line["id"] for line in again[:9]] == list(range(9))


def test_what_only_says_when_may_change_before_a_job_goes_on(job: Job) -> None:
    with pytest.raises(KeyboardInterrupt):
        job.run(*many(), progress=stop_after(5), params={"cache_salt": "a"})
    with pytest.raises(ConfigError, match="deadline was None and is 9.0"):
        job.run(params={"deadline": 9})
    job.run(params={"cache_salt": "b"})
    assert job.report.resumed >= 5


def test_priorities_and_salts_of_lines(folder: Path, tmp_path: Path) -> None:
    line = {"prompt": "a beginning that is long enough for a page", "max_new_tokens": 3, **GREEDY}
    job = Job(LLM(folder, max_num_seqs=3, max_model_len=500), tmp_path)
    a, b = job.run({**line, "priority": 2}, openai(priority=2, cache_salt="s"))
    for about in (a["error"], b["error"]):
        assert about["param"] == "priority" and 'scheduling_policy="priority"' in about["message"]
    job.llm = LLM(folder, max_num_seqs=1, max_model_len=500, scheduling_policy="priority", page_size=4)
    order: list[int] = []
    submit = job.llm.engine.submit

    def watch(request: Any, deliver: Any) -> Any:
        def noted(stream: Any, delta: Any) -> None:
            if delta.finish_reason is not None:
                order.append(request.params.priority)
            deliver(stream, delta)

        return submit(request, noted)

    job.llm.engine.submit = watch  # type: ignore[method-assign]
    job.run(*({**line, "priority": p} for p in (5, 3, 9, 1)), overwrite=True)
    assert sorted(order) == [1, 3, 5, 9] and order.index(1) < order.index(9)
    assert job.llm.snapshot().cached_tokens > 0
    cached = job.llm.snapshot().cached_tokens
    job.run(*({**line, "cache_salt": f"mine {i}"} for i in range(3)), overwrite=True)
    assert job.llm.snapshot().cached_tokens == cached


def test_parameters_of_the_job_hold_where_a_line_says_nothing(job: Job) -> None:
    a, b = job.run({"prompt": "x"}, {"prompt": "x", "max_new_tokens": 3}, params={"max_new_tokens": 5, **GREEDY})
    assert (a["usage"]["completion_tokens"], b["usage"]["completion_tokens"]) == (5, 3)
    (c,) = job.run({"messages": HELLO}, params=SamplingParams(max_new_tokens=4, **GREEDY), overwrite=True)
    assert c["usage"]["completion_tokens"] == 4
    (d,) = job.run({"messages": HELLO, "ignore_eos": True, "temperature": 0}, overwrite=True)
    assert sum(d["usage"][name] for name in ("prompt_tokens", "completion_tokens")) == 500  # a chat goes on to the end
