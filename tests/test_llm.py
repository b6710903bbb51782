"""The offline front: what it hands to the engine, and what becomes of what the engine writes.

Where it matters what the model says, a script says it: the runner is replaced, all else is real.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import LLM, CheckpointError, RequestError, SamplingParams
from slipstream.conversation import ChatDelta, ChatOutput
from slipstream.engine.runner import Flight, StepResult
from slipstream.harmony import ToolCall
from slipstream.request import Step
from tests.cli.tiny import TEMPLATE, write_chat_model

HELLO = [{"role": "user", "content": "Hello"}]
GREEDY = SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]

Script = Callable[..., None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("llm") / "tiny")


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, max_model_len=2000)


@pytest.fixture
def says(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Has the model say these texts, one for each answer in turn. Special tokens may stand in them."""

    def script(*texts: str) -> None:
        encoded = [llm.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        waiting: Iterator[list[int]] = iter(encoded)
        under_way: dict[int, Iterator[int]] = {}

        def launch(step: Step) -> Flight:
            return Flight(step, frozenset(), torch.empty(0))

        def finish(flight: Flight) -> StepResult:
            tokens: dict[int, int | None] = {}
            for chunk in flight.step.chunks:
                if chunk.sample:
                    if chunk.sequence not in under_way:
                        under_way[chunk.sequence] = iter(next(waiting))
                    tokens[chunk.sequence] = next(under_way[chunk.sequence])
            return StepResult(tokens)

        monkeypatch.setattr(llm.engine.runner, "launch", launch)
        monkeypatch.setattr(llm.engine.runner, "finish", finish)

    return script


@pytest.fixture
def gpt_oss(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """The same model, taken for gpt-oss, without a chat template."""
    monkeypatch.setattr(llm, "model_config", dataclasses.replace(llm.model_config, model_type="gpt_oss"))
    monkeypatch.setattr(llm.tokenizer, "chat_templates", {})
    return llm


def joined(deltas: Iterable[ChatDelta], kind: str) -> str:
    return "".join(d.text for d in deltas if d.kind == kind)


def test_a_list_of_prompts_is_answered_in_its_order(llm: LLM) -> None:
    prompts = ["The tide", [5, 6, 7], "a"]
    together = llm.generate(prompts, GREEDY)
    assert [o.prompt for o in together] == ["The tide", None, "a"]
    assert [o.text for o in together] == [llm.generate([p], GREEDY)[0].text for p in prompts]
    assert llm.generate("The tide", GREEDY).text == together[0].text
    assert "".join(llm.stream("The tide", GREEDY)) == together[0].text
    assert llm.generate([], GREEDY) == []


def test_a_bad_prompt_leaves_nothing_of_its_list_behind(llm: LLM) -> None:
    with pytest.raises(RequestError, match="token 131 is not in the vocabulary"):
        llm.generate(["fine", [131]], GREEDY)
    assert llm.engine.step() is False


def test_a_stream_that_is_closed_ends_its_request(llm: LLM) -> None:
    stream = llm.stream("The tide", GREEDY.replace(max_new_tokens=1000))
    next(stream)
    stream.close()
    deltas = llm.stream_chat(HELLO, GREEDY.replace(max_new_tokens=1000))
    next(deltas)
    deltas.close()
    assert llm.engine.step() is False
    with pytest.raises(RequestError, match="one answer, not 2"):
        next(llm.stream("x", SamplingParams(n=2)))


def test_what_the_checkpoint_recommends_is_the_default(tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path / "m")
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": 9}))
    llm = LLM(folder)
    assert llm.default_params == SamplingParams(temperature=0.6, top_k=20, top_p=0.95)
    assert llm.engine.eos_token_ids == (3, 9)
    file.write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    assert LLM(folder).default_params == SamplingParams(temperature=0)
    file.write_text(json.dumps({"top_p": 5}))
    with pytest.raises(CheckpointError, match=r"generation_config.json: top_p"):
        LLM(folder)


def test_chat_is_generate_on_what_the_template_writes(llm: LLM) -> None:
    prompt = "<s><|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    ids = llm.tokenizer.encode(prompt, add_special_tokens=False)
    output = llm.chat(HELLO, GREEDY)
    assert isinstance(output, ChatOutput)
    assert output.prompt == prompt and output.prompt_token_ids == tuple(ids)
    assert ids.count(0) == 1  # the template has written <s>; the tokenizer does not add another
    assert output.text == llm.generate([ids], GREEDY)[0].text
    assert output.message == {"role": "assistant", "content": output.text}
    assert output.reasoning is None and output.tool_calls == []
    deltas = list(llm.stream_chat(HELLO, GREEDY))
    assert joined(deltas, "answer") == output.text and {d.kind for d in deltas} == {"answer"}
    no_turn = llm.chat(HELLO, GREEDY, add_generation_prompt=False)
    assert no_turn.prompt == "<s><|im_start|>user\nHello<|im_end|>\n"


def test_by_default_a_chat_goes_on_until_the_model_ends_its_turn(llm: LLM, says: Script) -> None:
    says("x" * 300 + "<|im_end|>")
    output = llm.chat(HELLO)
    assert output.text == "x" * 300 and output.outputs[0].finish_reason == "stop"


def test_several_answers(llm: LLM, says: Script) -> None:
    says("one<|im_end|>", "two<|im_end|>")
    output = llm.chat(HELLO, SamplingParams(n=2))
    assert [a.content for a in output.answers] == ["one", "two"] and output.text == "one"
    says("one<|im_end|>", "two<|im_end|>")
    deltas = list(llm.stream_chat(HELLO, SamplingParams(n=2)))
    assert ["".join(d.text for d in deltas if d.index == i) for i in (0, 1)] == ["one", "two"]


def test_cancelled_the_answer_so_far_stays(llm: LLM, says: Script) -> None:
    says("abcdefgh<|im_end|>")
    stream = llm.submit_chat(HELLO, SamplingParams(stop=("cdX",)))
    for delta in stream:
        if delta.text.endswith("b"):
            break
    llm.engine.step()  # a token more, held back as it may begin the stop string
    stream.cancel()
    assert stream.output.text == "abc"
    assert stream.output.outputs[0].finish_reason == "abort"
    assert llm.engine.step() is False


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"tools": TOOLS}, "tools"),
        ({"enable_thinking": True}, "enable_thinking"),
    ],
)
def test_what_the_template_would_ignore_is_refused(llm: LLM, options: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=f"{named}: .* would change nothing") as e:
        llm.chat(HELLO, GREEDY, **options)
    assert e.value.field == named
    assert llm.chat(HELLO, GREEDY, **dict.fromkeys(options)).text  # None is as good as left out


def test_what_the_template_reads_reaches_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% if enable_thinking is not defined %}{% set enable_thinking = 'unset' %}{% endif %}" + TEMPLATE
    template += "{{ enable_thinking }} {{ reasoning_effort }} {{ tools[0].function.name }}"
    monkeypatch.setattr(llm.tokenizer, "chat_templates", {"default": template})
    output = llm.chat(HELLO, GREEDY, reasoning_effort="high", tools=TOOLS, enable_thinking="yes")
    assert output.prompt is not None and output.prompt.endswith("assistant\nyes high weather")


def test_no_template_no_chat(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.tokenizer, "chat_templates", {})
    with pytest.raises(RequestError, match="no chat template.*generate"):
        llm.chat(HELLO)


def test_wrong_messages_name_the_message(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"messages\[1\]"):
        llm.chat([*HELLO, {"role": "assistant"}])
    with pytest.raises(RequestError, match="messages is empty"):
        llm.chat([])


THOUGHT = "<|channel|>analysis<|message|>Let me see.<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>Two.<|return|>"
CALL = '<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"in": "Bern"}<|call|>'


def test_harmony_parts_reasoning_and_answer(gpt_oss: LLM, says: Script) -> None:
    says(THOUGHT + FINAL)
    output = gpt_oss.chat(HELLO, reasoning_effort="low")
    assert output.prompt is not None
    assert "Reasoning: low" in output.prompt and output.prompt.endswith("Hello<|end|><|start|>assistant")
    assert (output.reasoning, output.text, output.tool_calls) == ("Let me see.", "Two.", [])
    assert output.message == {"role": "assistant", "content": "Two."}
    assert output.outputs[0].finish_reason == "stop"  # <|return|> ends the turn though it is not in eos_token_id
    assert output.outputs[0].text.startswith("<|channel|>analysis<|message|>Let")

    says(THOUGHT + FINAL)
    deltas = list(gpt_oss.stream_chat(HELLO))
    assert joined(deltas, "reasoning") == "Let me see." and joined(deltas, "answer") == "Two."
    kinds = [d.kind for d in deltas]
    assert kinds == sorted(kinds, reverse=True) and len(deltas) > 10  # as it comes, not in one piece


def test_harmony_tool_calls_end_the_turn_and_go_on_with_it(gpt_oss: LLM, says: Script) -> None:
    says(THOUGHT + CALL)
    output = gpt_oss.chat(HELLO, tools=TOOLS)
    assert output.tool_calls == [ToolCall("weather", '{"in": "Bern"}')] and output.text == ""
    assert output.outputs[0].finish_reason == "stop"
    function = {"name": "weather", "arguments": {"in": "Bern"}}
    assert output.message == {
        "role": "assistant", "content": "", "thinking": "Let me see.",
        "tool_calls": [{"type": "function", "function": function}],
    }  # fmt: skip
    says(FINAL.removeprefix("<|start|>assistant"))
    result = {"role": "tool", "content": "sunny"}
    second = gpt_oss.chat([*HELLO, output.message, result], tools=TOOLS)
    assert second.text == "Two." and second.prompt is not None
    assert (
        "analysis<|message|>Let me see." in second.prompt and 'json<|message|>{"in": "Bern"}<|call|>' in second.prompt
    )

    says(CALL.removeprefix("<|start|>assistant"))
    deltas = list(gpt_oss.stream_chat(HELLO, tools=TOOLS))
    assert {(d.kind, d.name, d.call) for d in deltas} == {("tool_call", "weather", 0)}
    assert joined(deltas, "tool_call") == '{"in": "Bern"}'


@pytest.mark.parametrize("include", [False, True])
def test_harmony_stop_strings_are_looked_for_in_the_answer_alone(gpt_oss: LLM, says: Script, include: bool) -> None:
    written = "<|channel|>analysis<|message|>a stop b<|end|><|start|>assistant<|channel|>final<|message|>one stop two"
    params = SamplingParams(stop=("stop",), include_stop_str_in_output=include, max_new_tokens=None)
    says(written + "<|return|>")
    output = gpt_oss.chat(HELLO, params)
    assert output.reasoning == "a stop b"
    assert output.text == ("one stop" if include else "one ")
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", "stop")
    says(written + "<|return|>")
    deltas = list(gpt_oss.stream_chat(HELLO, params))
    assert joined(deltas, "answer") == output.text and joined(deltas, "reasoning") == "a stop b"
    assert gpt_oss.engine.step() is False


def test_harmony_gives_what_was_held_for_a_stop_string(gpt_oss: LLM, says: Script) -> None:
    says("<|channel|>final<|message|>one sto<|return|>")
    output = gpt_oss.chat(HELLO, SamplingParams(stop=("stop",)))
    assert output.text == "one sto" and output.outputs[0].stop_reason != "stop"


def test_harmony_cut_short_keeps_the_reasoning(gpt_oss: LLM, says: Script) -> None:
    says(THOUGHT)
    output = gpt_oss.chat(HELLO, SamplingParams(max_new_tokens=20))
    assert output.outputs[0].finish_reason == "length" and output.text == ""
    assert output.reasoning == "Let me see"


@pytest.mark.parametrize(
    ("options", "named"),
    [({"reasoning_effort": "extreme"}, "reasoning_effort"), ({"enable_thinking": True}, "enable_thinking")],
)
def test_harmony_refuses_what_it_does_not_know(gpt_oss: LLM, options: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=named) as e:
        gpt_oss.chat(HELLO, **options)
    assert e.value.field == named
