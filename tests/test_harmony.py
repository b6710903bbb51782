"""gpt-oss's format against the example in OpenAI's own guide, and the parser against every way to break it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.errors import RequestError
from slipstream.harmony import HARMONY_TOKENS, HarmonyEvent, HarmonyParser, HarmonyResult, ToolCall, render_harmony

SPECIAL = {200000 + i: text for i, text in enumerate(HARMONY_TOKENS)}
IDS = {text: i for i, text in SPECIAL.items()}


def tokens(text: str, size: int = 3) -> list[tuple[int, str]]:
    """The text as (id, text) of special tokens and of plain ones of `size` characters."""
    out = []
    for part in re.split(r"(<\|\w+\|>)", text):
        if part in IDS:
            out.append((IDS[part], part))
        else:
            out += [(1, part[i : i + size]) for i in range(0, len(part), size)]
    return out


def parse(text: str, size: int = 3) -> tuple[HarmonyResult, list[HarmonyEvent]]:
    parser = HarmonyParser(SPECIAL)
    events = [e for i, t in tokens(text, size) for e in parser.feed(i, t)] + parser.finish()
    result = parser.result
    for kind, whole in (("reasoning", result.reasoning), ("answer", result.answer)):
        assert "".join(e.text for e in events if e.kind == kind) == whole, "the events are not the result"
    calls = [ToolCall("", "") for _ in result.tool_calls]
    for e in events:
        if e.kind == "tool_call":
            calls[e.index].name = e.name or ""
            calls[e.index].arguments += e.text
    assert calls == result.tool_calls
    return result, events


CALL = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city":"Köln"}<|call|>'
THINK = "<|channel|>analysis<|message|>Simple.<|end|>"
WEATHER = ToolCall("weather", '{"city":"Köln"}')


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    ("text", "want"),
    [
        # as the guide shows it
        (THINK + "<|start|>assistant<|channel|>final<|message|>2 + 2 = 4.<|return|>", ("Simple.", "2 + 2 = 4.", [])),
        (THINK + "<|start|>assistant" + CALL, ("Simple.", "", [WEATHER])),
        (" to=functions.weather<|channel|>commentary json<|message|>{}<|call|>", ("", "", [ToolCall("weather", "{}")])),
        ("<|channel|>commentary to=functions.f<|constrain|>json<|message|>{}<|call|>", ("", "", [ToolCall("f", "{}")])),
        ("<|channel|>analysis to=browser.search code<|message|>q<|call|>", ("", "", [ToolCall("browser.search", "q")])),
        ("<|channel|>analysis to=python code<|message|>1<|call|>", ("", "", [ToolCall("python", "1")])),
        ("<|channel|>commentary<|message|>Plan.<|end|><|start|>assistant" + CALL, ("", "Plan.", [WEATHER])),
        (CALL + "<|start|>assistant" + CALL, ("", "", [WEATHER, WEATHER])),
        # several messages of a kind
        (THINK + "<|start|>assistant" + THINK, ("Simple.\n\nSimple.", "", [])),
        # cut off
        ("<|channel|>analysis<|message|>I thi", ("I thi", "", [])),
        ("<|channel|>final<|message|>Hel", ("", "Hel", [])),
        ('<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a', ("", "", [ToolCall("f", '{"a')])),
        ("<|channel|>anal", ("", "anal", [])),
        ("", ("", "", [])),
        # malformed
        ("Hello there", ("", "Hello there", [])),
        ("assistance is near", ("", "assistance is near", [])),
        ("to be or not", ("", "to be or not", [])),
        ("<|channel|>analysis<|message|>Hm.<|channel|>final<|message|>Yes.", ("Hm.", "Yes.", [])),
        ("<|channel|>analysis<|message|>Hm.<|start|>assistant<|channel|>final<|message|>Yes.", ("Hm.", "Yes.", [])),
        (THINK + "assistant<|channel|>final<|message|>Yes.<|return|>", ("Simple.", "Yes.", [])),
        (THINK + "Yes.", ("Simple.", "Yes.", [])),
        ("<|channel|>final Hello<|end|>", ("", "Hello", [])),
        ("<|start|>assistant Hello<|end|>", ("", "Hello", [])),
        ("<|channel|>no such channel<|message|>Hi<|end|>", ("", "Hi", [])),
        ("<|message|>Hi<|end|>", ("", "Hi", [])),
        ("<|channel|>final<|message|>a<|message|>b<|constrain|>c<|end|>", ("", "abc", [])),
        ("<|end|><|end|><|return|><|start|><|start|><|channel|><|channel|>", ("", "", [])),
        ("<|channel|>final<|message|><|end|>", ("", "", [])),
    ],
)
def test_parts(text: str, want: tuple[str, str, list[ToolCall]], size: int) -> None:
    assert parse(text, size)[0] == HarmonyResult(*want)


def test_events_come_with_their_tokens() -> None:
    parser = HarmonyParser(SPECIAL)
    seen = [(t, parser.feed(i, t)) for i, t in tokens(THINK + "<|start|>assistant" + CALL, 100)]
    assert ("Simple.", [HarmonyEvent("reasoning", "Simple.", None, 0)]) in seen
    assert ("<|message|>", [HarmonyEvent("tool_call", "", "weather", 0)]) in seen, "the name is known before arguments"
    assert ('{"city":"Köln"}', [HarmonyEvent("tool_call", '{"city":"Köln"}', "weather", 0)]) in seen
    plain = HarmonyParser(SPECIAL)
    assert plain.feed(1, "Hello") == [HarmonyEvent("answer", "Hello")], "text with no header is not held back"


def test_a_header_without_end_is_text() -> None:
    result, _ = parse("<|channel|>" + "word " * 200)
    assert result.answer.count("word") == 200
    parser = HarmonyParser(SPECIAL)
    parser.feed(IDS["<|channel|>"], "<|channel|>")
    shown = sum(len(e.text) for _ in range(1000) for e in parser.feed(1, "word "))
    assert shown > 4000, "what will never be a header must not wait for the end"


@given(
    st.lists(st.sampled_from([*HARMONY_TOKENS, "final", "analysis", " to=functions.f", "assistant", "a b", "{", ""]))
)
@settings(deadline=None, max_examples=500)
def test_nothing_that_a_model_writes_is_an_error(parts: list[str]) -> None:
    result, _ = parse("".join(parts))
    everything = result.reasoning + result.answer + "".join(c.arguments for c in result.tool_calls)
    bodies = re.findall(r"<\|message\|>([^<]+)", "".join(parts))
    for body in bodies:
        assert body in everything, "text of a message was lost"


# -- the prompt -------------------------------------------------------------------------------------------------

# From https://cookbook.openai.com/articles/openai-harmony
GUIDE = """<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06
Current date: 2025-06-28

Reasoning: high

# Valid channels: analysis, commentary, final. Channel must be included for every message.
Calls to these tools must go to the commentary channel: 'functions'.<|end|><|start|>developer<|message|># Instructions

Use a friendly tone.

# Tools

## functions

namespace functions {

// Gets the location of the user.
type get_location = () => any;

// Gets the current weather in the provided location.
type get_current_weather = (_: {
// The city and state, e.g. San Francisco, CA
location: string,
format?: "celsius" | "fahrenheit", // default: celsius
}) => any;

// Gets the current weather in the provided list of locations.
type get_multiple_weathers = (_: {
// List of city and state, e.g. ["San Francisco, CA", "New York, NY"]
locations: string[],
format?: "celsius" | "fahrenheit", // default: celsius
}) => any;

} // namespace functions<|end|><|start|>user<|message|>What is the weather like in SF?<|end|>"""
GUIDE_CALL = """<|start|>assistant<|channel|>analysis<|message|>Need to use function get_weather.<|end|>\
<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>\
{"location":"San Francisco"}<|call|><|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>\
{"sunny": true, "temperature": 20}<|end|>"""


def function(name: str, description: str, properties: dict[str, Any] | None = None, *required: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties or {}, "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


DEGREES = {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"}
CITY = {"type": "string", "description": "The city and state, e.g. San Francisco, CA"}
CITIES = {
    "type": "array",
    "items": {"type": "string"},
    "description": 'List of city and state, e.g. ["San Francisco, CA", "New York, NY"]',
}
TOOLS = [
    function("get_location", "Gets the location of the user."),
    function(
        "get_current_weather",
        "Gets the current weather in the provided location.",
        {"location": CITY, "format": DEGREES},
        "location",
    ),
    function(
        "get_multiple_weathers",
        "Gets the current weather in the provided list of locations.",
        {"locations": CITIES, "format": DEGREES},
        "locations",
    ),
]
ASK: list[dict[str, Any]] = [
    {"role": "system", "content": "Use a friendly tone."},
    {"role": "user", "content": "What is the weather like in SF?"},
]
ASKED: list[dict[str, Any]] = [
    *ASK,
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Need to use function get_weather.",
        "tool_calls": [
            {"id": "c1", "function": {"name": "get_weather", "arguments": '{"location":"San Francisco"}'}},
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": '{"sunny": true, "temperature": 20}'},
]


def render(messages: list[dict[str, Any]], **given: Any) -> str:
    return render_harmony(messages, **{"current_date": "2025-06-28", "reasoning_effort": "high", **given})


def test_the_guides_example() -> None:
    assert render(ASK, tools=TOOLS) == GUIDE + "<|start|>assistant"
    assert render(ASKED, tools=TOOLS) == GUIDE + GUIDE_CALL + "<|start|>assistant"
    assert render(ASK, tools=TOOLS, add_generation_prompt=False) == GUIDE


def test_a_plain_conversation() -> None:
    talk = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4", "thinking": "easy"},
        {"role": "user", "content": "9/2?"},
    ]
    text = render(talk, reasoning_effort="low")
    assert text.endswith(
        "Channel must be included for every message.<|end|><|start|>user<|message|>2+2?<|end|>"
        "<|start|>assistant<|channel|>final<|message|>4<|end|><|start|>user<|message|>9/2?<|end|><|start|>assistant"
    )
    assert "Reasoning: low\n\n" in text and "developer" not in text and "easy" not in text
    assert re.search(r"Current date: \d{4}-\d\d-\d\d\n", render_harmony(talk))
    assert "Reasoning: medium" in render_harmony(talk)


def test_the_reasoning_of_a_finished_turn_is_dropped() -> None:
    done = [*ASKED, {"role": "assistant", "content": "Sunny."}, {"role": "user", "content": "Thanks"}]
    assert "Need to use" in render(ASKED) and "Need to use" not in render(done)
    assert "to=functions.get_weather <|constrain|>json" in render(done)


def test_a_later_instruction_and_arguments_as_an_object() -> None:
    text = render([*ASK, {"role": "developer", "content": "Now in verse."}])
    assert "<|start|>developer<|message|># Instructions\n\nNow in verse.<|end|><|start|>assistant" in text
    call = {"role": "assistant", "content": "Let me see.", "tool_calls": [{"name": "f", "arguments": {"a": "é"}}]}
    text = render([*ASK, call, {"role": "tool", "name": "f", "content": "1"}])
    assert "<|channel|>commentary<|message|>Let me see.<|end|>" in text
    assert 'to=functions.f <|constrain|>json<|message|>{"a": "é"}<|call|><|start|>functions.f to=assistant' in text


def test_types() -> None:
    def of(schema: Any) -> str:
        text = render(ASK, tools=[function("f", "", {"x": schema}, "x")])
        return text.split("type f = (_: {\nx: ")[1].split(",\n}) => any")[0]

    assert of({"type": "integer"}) == "number" and of({"type": "boolean"}) == "boolean" and of({}) == "any"
    assert (
        of({"type": ["string", "null"]}) == "string | null"
        and of({"type": "number", "nullable": True}) == "number | null"
    )
    assert of({"type": "array"}) == "any[]" and of({"type": "array", "items": {"enum": [1, "a"]}}) == '(1 | "a")[]'
    assert of({"anyOf": [{"type": "string"}, {"type": "object"}]}) == "string | object"
    nested = {"type": "object", "properties": {"a": {"type": "string", "description": "A\nB", "default": "q"}}}
    assert of(nested) == '{\n// A\n// B\na?: string, // default: "q"\n}'
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(5000):
        deep = {"type": "array", "items": deep}
    assert of(deep).startswith("any[]"), "a schema nested without end must not overflow the stack"
    assert of({"type": {"odd": 1}}) == "any" and of(5) == "any"


@pytest.mark.parametrize(
    ("messages", "given", "field", "message"),
    [
        (ASK, {"reasoning_effort": "extreme"}, "reasoning_effort", "low, medium, high.*'extreme'"),
        (ASK, {"reasoning_effort": None}, "reasoning_effort", "low, medium, high"),
        ([], {}, "messages", "empty"),
        ([{"role": "robot", "content": "x"}], {}, "messages", r"messages\[0\].*robot"),
        ([*ASK, {"role": "tool", "content": "x"}], {}, "messages", r"messages\[2\].*not called"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], {}, "messages", "name of a function"),
        ([{"role": "assistant", "tool_calls": [5]}], {}, "messages", "name of a function"),
        (ASK, {"tools": [{"function": {}}]}, "tools", r"tools\[0\]"),
        (ASK, {"tools": [5]}, "tools", r"tools\[0\]"),
    ],
)
def test_what_is_wrong_is_named(messages: Any, given: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as e:
        render(messages, **given)
    assert e.value.field == field


def test_what_was_rendered_parses_back() -> None:
    text = render(ASKED)
    start = text.index("<|start|>assistant") + len("<|start|>assistant")
    result, _ = parse(text[start : text.index("<|start|>functions")])
    assert result.reasoning == "Need to use function get_weather."
    assert result.tool_calls == [ToolCall("get_weather", '{"location":"San Francisco"}')]
