"""Chat templates against transformers, and against templates that want our time and memory."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import textwrap
import time
from typing import Any

import pytest

from slipstream.chat import MAX_TEMPLATE_CHARS, render_chat
from slipstream.errors import CheckpointError, RequestError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
HELLO = [{"role": "user", "content": "Hello"}]

# Written for these tests, each in the manner of a family of models.
CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}
{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{%- if not date_string is defined %}{% set date_string = "26 Jul 2024" %}{% endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " ~ date_string ~ "\\n\\n" ~ system ~ "<|eot_id|>" }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("one call at a time") }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- elif message.role == "tool" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}{%- endif %}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}{%- set system_message = messages[0]["content"] %}
{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{{- bos_token }}
{%- for message in loop_messages %}
  {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
    {{- raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
  {%- endif %}
  {%- set ns.index = ns.index + 1 %}
  {%- if message["role"] == "user" %}
    {%- if loop.last and system_message is defined %}{{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
    {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
  {%- elif message["role"] == "assistant" %}{{- " " + message["content"]|trim + eos_token }}
  {%- endif %}
{%- endfor %}{{ user_messages|length }}"""
GEMMA = """{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}
{%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}{%- set loop_messages = messages[1:] -%}
{%- else -%}{%- set first_user_prefix = "" -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'assistant') -%}{%- set role = "model" -%}{%- else -%}{%- set role = message['role'] -%}{%- endif -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}{%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\\n'}}{%- endif -%}"""
QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}{{- '<|im_start|>' + message.role + '\\n' + content }}{%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
                {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
ODDS = """{% macro show(x, tail='.') %}<{{ x }}{{ tail }}>{% if x > 1 %}{{ show(x - 1) }}{% endif %}{% endmacro %}
{{ show(3, tail='!') }}{% generation %}{% set inner = 1 %}kept{% endgeneration %}{{ inner is defined }}
{% for k, v in {'a': 1, 'b': [1, 2.5, none, true]}.items() %}{% if loop.index == 9 %}{% break %}{% endif %}
{{ k }}={{ v }},{{ loop.revindex }},{{ loop.nextitem }};{% endfor %}
{% for x in [1, [2, [3]]] recursive %}{{ x if x is number else '(' ~ loop(x) ~ ')' }}{% else %}none{% endfor %}
{{ [3, 1, 2]|sort|join('-') }} {{ ['a', 'b']|map('upper')|join }} {{ 'x%sy' % 5 }} {{ '%05.1f'|format(2.25) }}
{{ '{:>5}|{a}'.format('é', a=[1]) }} {{ 7 // 2 }} {{ 2 ** 10 }} {{ -7 % 3 }} {{ 'a' * 3 }} {{ [1] + [2] }} {{ 'é'|upper }}
{{ "a\\nb"|indent(2, true) }} {{ 'Ab'.replace('b', 'c') }} {{ {'é': '<'}|tojson }} {{ {'b': 1, 'a': [1, {}]}|tojson(indent=2) }}
{{ {'a': [1, 2]}|tojson(separators=(',', ':'), sort_keys=true) }} {{ 'a b'.split() }} {{ '-'.join(['a', 'b']) }}
{{ messages|map(attribute='role')|list }} {{ messages|selectattr('role', 'in', ['user'])|list|length }} {{ 1.5|round|int }}
{{ (1, 2)[0] }} {{ 'abc'[1:] }} {{ 'abc'[::-1] }} {{ messages[-1].content }} {{ undefined_name }} {{ x|default('d') }} {{ '<'|e }}
{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }} {% set block %}in {{ 1 }}{% endset %}{{ block|upper }}
{% filter upper %}low {{ 'x' }}{% endfilter %} {% call(y) show2() %}{{ y }}{% endcall %} {{ 'b' in 'abc' }} {{ 1 < 2 < 3 }}
{{ range(3)|list }} {{ [1, 2, 3]|batch(2)|list }} {{ {'b': 1, 'a': 2}|dictsort }} {{ 'a,b'|replace(',', ';') }} {{ none }}"""
ODDS = ODDS.replace("{{ show(3", "{% macro show2() %}[{{ caller(5) }}]{% endmacro %}{{ show(3")

TALK: list[dict[str, Any]] = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Wie spät ist es? 日本 <b>"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFive."},
    {"role": "user", "content": "And now?"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Das Wetter <jetzt>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather in Köln?"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "look it up",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}],
    },
    {"role": "tool", "content": '{"sun": true}'},
]


def transformers_render(template: str, messages: list[dict[str, Any]], **given: Any) -> str:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    given.setdefault("add_generation_prompt", True)
    rendered, _ = utils.render_jinja_template([messages], chat_template=template, **SPECIAL, **given)
    return str(rendered[0])


@pytest.mark.parametrize("name", ["CHATML", "LLAMA3", "MISTRAL", "GEMMA", "QWEN3", "ODDS"])
@pytest.mark.parametrize("case", ["hello", "talk", "tools", "no prompt", "variables"])
def test_the_text_is_transformers_own(name: str, case: str) -> None:
    template = globals()[name]
    if case == "tools" and name not in ("LLAMA3", "QWEN3"):
        return  # a template without tools
    messages, given = {
        "hello": (HELLO, {}),
        "talk": (TALK, {}),
        "tools": (CALL, {"tools": TOOLS}),
        "no prompt": (TALK[:3], {"add_generation_prompt": False}),
        "variables": (TALK, {"enable_thinking": False, "date_string": "1 Jan 2026"}),
    }[case]
    want = transformers_render(template, messages, **given)
    assert len(want) > 5
    assert render_chat(template, messages, special_tokens=SPECIAL, **given) == want


def test_the_real_models_template(smollm2: Any) -> None:
    from slipstream.checkpoint.open import open_checkpoint

    template = open_checkpoint(smollm2).metadata["tokenizer.chat_template"]
    for messages in (HELLO, TALK):
        assert render_chat(template, messages, special_tokens={}) == transformers_render(template, messages)


# -- messages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "must be a list"),
        ([], "empty"),
        (["hello"], r"messages\[0\] must be an object"),
        ([{"content": "x"}], r"messages\[0\] needs a role"),
        ([*HELLO, {"role": 5, "content": "x"}], r"messages\[1\] needs a role"),
        ([{"role": "user"}], "no content"),
        ([{"role": "user", "content": None}], "no content"),
        ([{"role": "user", "content": 5}], "type int"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "only text"),
        ([{"role": "user", "content": ["x"]}], "only text"),
    ],
)
def test_wrong_messages_are_named(messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as e:
        render_chat(CHATML, messages, special_tokens={})
    assert e.value.field == "messages"


def test_text_parts_become_one_text_and_nulls_are_left_out() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert render_chat(CHATML, [{"role": "user", "content": parts}], special_tokens={}) == render_chat(
        CHATML, HELLO, special_tokens={}
    )
    call = [CALL[0], {**CALL[1], "content": None, "name": None}, {**CALL[2], "tool_calls": None}]
    assert render_chat(QWEN3, call, special_tokens={}) == render_chat(QWEN3, CALL, special_tokens={})


def test_who_is_at_fault() -> None:
    with pytest.raises(RequestError, match="roles must alternate") as e:
        render_chat(MISTRAL, [*HELLO, *HELLO], special_tokens=SPECIAL)
    assert e.value.field == "messages"
    with pytest.raises(RequestError, match="tools must be"):
        render_chat(CHATML, HELLO, special_tokens={}, tools=["x"])  # type: ignore[list-item]
    for broken in ("{% for %}", "{{ 1", "{{ nothing.more.at_all }}", "{{ x|no_such_filter }}", "{% include 'a' %}"):
        with pytest.raises(CheckpointError, match="template"):
            render_chat(broken, HELLO, special_tokens={})
    with pytest.raises(CheckpointError, match="characters"):
        render_chat("a" * (MAX_TEMPLATE_CHARS + 1), HELLO, special_tokens={})
    with pytest.raises(RequestError, match="too long"):
        render_chat(CHATML, [{"role": "user", "content": "a" * 5000}], special_tokens={}, max_chars=1000)
    with pytest.raises(RequestError, match="wrote more than 1000"):
        render_chat(CHATML, [{"role": "user", "content": "a" * 1500}], special_tokens={}, max_chars=1000)


def test_a_long_conversation_is_no_attack() -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": "Ein langer Satz. " * 100} for i in range(500)]
    start = time.process_time()
    text = render_chat(QWEN3, messages, special_tokens={})
    assert len(text) > 800_000 and time.process_time() - start < 1.5


# -- attacks ----------------------------------------------------------------------------------------------------

NS = "{% set ns = namespace(x='ab', l=[1], m=[1]) %}"
TWICE = NS + "{% for i in range(60) %}{% set ns.l = REPEAT %}{% endfor %}"
BIG = "{% set a = 'a' * 1000000 %}"
ATTACKS = {
    "multiply": "{{ 'a' * 10**9 }}",
    "multiply from the left": "{{ 1000000000 * 'a' }}",
    "list multiplication": "{{ ([1] * 10**9)|length }}",
    "tuple multiplication": "{{ ((1,) * 10**9)|length }}",
    "range": "{{ range(10**9)|list }}",
    "huge range": "{{ range(10**30)|length }}",
    "power": "{{ 10**(10**8) }}",
    "squaring": NS + "{% set ns.x = 9 %}{% for i in range(100) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "doubling a number": NS + "{% set ns.x = 1 %}{% for i in range(100000) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10**9, 1) }}",
    "percent precision": "{{ '%.1000000000f' % 1 }}",
    "percent key": "{{ '%((x))1000000000d' % {'(x)': 1} }}",
    "percent many": "{{ '%s' * 1000 % (('a' * 100000,) * 1000) }}",
    "percent scan": "{{ ('%(' * 2000000) % 1 }}",
    "format filter": "{{ '%1000000000d'|format(1) }}",
    "ljust": "{{ 'x'.ljust(10**9) }}",
    "rjust": "{{ 'x'.rjust(10**9) }}",
    "center": "{{ 'x'.center(10**9) }}",
    "zfill": "{{ 'x'.zfill(10**9) }}",
    "expandtabs": "{{ ('\\t' * 1000000).expandtabs(10000) }}",
    "center filter": "{{ 'a'|center(1000000000) }}",
    "filter block": "{% filter center(1000000000) %}a{% endfilter %}",
    "indent filter": "{{ ('a\\n' * 100000)|indent(1000) }}",
    "indent by text": "{{ ('a\\n' * 100000)|indent('a' * 100000) }}",
    "batch": "{{ [1]|batch(1000000000, 'x')|list }}",
    "slice": "{{ [1]|slice(1000000000)|list }}",
    "round down": "{{ 1|round(-1000000000) }}",
    "round up": "{{ 1|round(1000000000, 'ceil') }}",
    "sum of lists": "{{ ([[1]] * 90000)|sum(start=[]) }}",
    "join filter": "{{ range(100000)|join('a' * 100000) }}",
    "join": "{{ ('a' * 100000).join(['x'] * 100000) }}",
    "json indent": "{{ ([1] * 90000)|tojson(indent=100000) }}",
    "json separators": "{{ ([1] * 90000)|tojson(separators=('a' * 100000, ':')) }}",
    "tilde": NS + "{% for i in range(100) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "wide tilde": BIG + "{{ " + "~".join(["a"] * 1000) + " }}",
    "plus": NS + "{% for i in range(100) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "replace": NS + "{% for i in range(100) %}{% set ns.x = ns.x.replace('a', 'aaaaaaaa') %}{% endfor %}",
    "replace filter": NS + "{% for i in range(100) %}{% set ns.x = ns.x|replace('a', 'aaaaaaaa') %}{% endfor %}",
    "replace nothing": BIG + "{{ a.replace('', a) }}",
    "format width": "{{ '{:>1000000000}'.format('x') }}",
    "format nested width": "{{ '{:>{w}}'.format('x', w=1000000000) }}",
    "format map": "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "format many": BIG + "{{ ('{0}' * 10000).format(a) }}",
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}"
    + "{% endfor %}" * 3,
    "nested output": "{% for a in range(9999) %}{% for b in range(9999) %}some text{% endfor %}{% endfor %}",
    "loop filter": "{% for a in range(90000) if a == -1 %}{% endfor %}" * 200,
    "set block": "{% set x %}{% for a in range(90000) %}" + "a" * 10000 + "{% endfor %}{% endset %}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "cycler": BIG + "{% set c = cycler(a) %}{% for i in range(100000) %}{{ c.next() }}{% endfor %}",
    "joiner": "{% set j = joiner('a' * 4000000) %}{% for i in range(1000) %}{{ j() }}{% endfor %}",
    "namespace list": NS + "{% for i in range(100000) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "nested list": NS + "{% for i in range(100000) %}{% set ns.l = [ns.l] %}{% endfor %}{{ ns.l|tojson }}",
    "list of itself twice": TWICE.replace("REPEAT", "[ns.l, ns.l]") + "{{ ns.l|string|length }}",
    "dict of itself twice": TWICE.replace("REPEAT", "{'a': ns.l, 'b': ns.l}") + "{{ ns.l|tojson|length }}",
    "dict() of itself twice": TWICE.replace("REPEAT", "dict(a=ns.l, b=ns.l)") + "{{ ns.l }}",
    "views": TWICE.replace("REPEAT", "{'a': ns.l, 'b': ns.l}.values()|list") + "{{ ns.l|string }}",
    "compare": TWICE.replace("REPEAT", "[ns.l, ns.l]")
    + TWICE[len(NS) :].replace("REPEAT", "[ns.m, ns.m]")
    + "{{ ns.l == ns.m }}",
    "comparisons": "{% set a = [0] * 90000 %}" + "{{ 1 in a }}" * 4000,
    "tests": "{% set a = [0] * 90000 %}" + "{{ 1 is in(a) }}" * 3500,
    "macro": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "macro tree": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "block": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "recursive loop": "{% for x in range(90000) recursive %}{{ loop(range(90000)) if loop.depth < 5 }}{% endfor %}",
    "endless loop": "{% for x in [1] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "search backwards": "{{ ('a' * 1000000).rfind('b' + 'a' * 500000) }}",
    "split backwards": "{{ ('a' * 1000000).rsplit('b' + 'a' * 500000) }}",
    "split": "{{ ('a ' * 1000000).split()|length }}",
    "split lines": "{{ ('\\n' * 1000000).splitlines()|length }}",
    "letters": "{{ ('€' * 4000000)|list|length }}",
    "words": BIG + "{{ a|title }}",
    "slices": "{% set a = '€' * 4000000 %}{% for i in range(1000) %}{% set b = a[::-1] %}{% endfor %}",
    "hexadecimal": "{{ ('f' * 4000000)|int(0, 16) }}",
    "date": "{{ strftime_now('%c' * 1000000) }}",
}
FORBIDDEN = {
    "class": "{{ ''.__class__.__mro__ }}",
    "init": "{{ namespace.__init__.__globals__ }}",
    "environment": "{{ self._TemplateReference__context.environment }}",
    "to_bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "bytes": "{{ 'a'.encode().center(1000000000) }}",
    "translate": "{{ 'a'.translate({97: 'b' * 1000000}) }}",
    "append": "{{ messages.append(1) }}",
    "update": "{{ messages[0].update(role='x') }}",
    "pprint": "{{ messages|pprint }}",
    "autoescape": "{% autoescape true %}{{ '<' }}{% endautoescape %}",
    "import": "{% from 'a' import b %}",
    "deep parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep sum": "{{ " + "1+" * 20000 + "1 }}",
    "deep loops": "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "deep list": "{{ " + "[" * 2000 + "]" * 2000 + " }}",
    "long number": "{{ " + "9" * 50000 + " }}",
}
HARMLESS = {  # allowed, as they come to nothing
    "attr filter": "{{ ''|attr('__class__') }}",
    "format attribute": "{{ '{0.__class__}'.format('x') }}",
    "format globals": "{{ '{0.__globals__}'.format(raise_exception) }}",
    "function globals": "{{ raise_exception.__globals__ }}",
    "loop internals": "{% for x in [1] %}{{ loop._iterable }}{% endfor %}",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_stopped_in_time(name: str) -> None:
    start = time.process_time()  # not of the clock: another program may have the processor
    with pytest.raises(RequestError, match="was stopped"):
        render_chat(ATTACKS[name], HELLO, special_tokens={}, max_seconds=0.5)
    assert time.process_time() - start < 1.5


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_a_template_may_not_do(name: str) -> None:
    with pytest.raises(CheckpointError):
        render_chat(FORBIDDEN[name], HELLO, special_tokens={})


@pytest.mark.parametrize("name", HARMLESS)
def test_a_look_inside_shows_nothing(name: str) -> None:
    assert render_chat(HARMLESS[name], HELLO, special_tokens={}) == ""


def test_all_attacks_together_stay_in_200_mb() -> None:
    script = """
        import json, resource, sys
        from slipstream.chat import render_chat
        from slipstream.errors import RequestError
        hello = [{"role": "user", "content": "Hello"}]
        render_chat("{{ messages }}", hello, special_tokens={})
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for attack in json.load(sys.stdin):
            try:
                render_chat(attack, hello, special_tokens={}, max_seconds=0.3)
            except RequestError:
                pass
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    unit = 1 if sys.platform == "darwin" else 1024
    limit = (4 << 30, resource.RLIM_INFINITY)
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        input=json.dumps(list(ATTACKS.values())),
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit),
    )
    assert int(out.stdout) * unit < 200 << 20


def test_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": "x", "extra": [1]}]
    with pytest.raises(CheckpointError):
        render_chat("{{ messages[0].extra.append(2) }}", messages, special_tokens={})
    assert messages == [{"role": "user", "content": "x", "extra": [1]}]
