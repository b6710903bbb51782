"""SamplingParams: every wrong value is a RequestError that names its field, every right one is kept."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.errors import ConfigError, RequestError, SlipstreamError
from slipstream.request import Chunk, SamplingParams, Step, as_token_ids

FIELDS = {f.name for f in dataclasses.fields(SamplingParams)}

not_a_number = st.none() | st.text(max_size=3) | st.booleans() | st.lists(st.integers(), max_size=2) | st.just(math.nan)
huge = st.sampled_from([10**400, -(10**400), math.inf, -math.inf])


def outside(low: float, high: float, *, open_low: bool = False) -> st.SearchStrategy[Any]:
    below = st.floats(max_value=low, exclude_max=not open_low)
    return not_a_number | huge | below | st.floats(min_value=high, exclude_min=True)


def not_whole(low: int, high: int) -> st.SearchStrategy[Any]:
    return not_a_number | huge | st.floats() | st.integers(max_value=low - 1) | st.integers(min_value=high + 1)


not_bool = st.none() | st.integers() | st.text(max_size=3)
token_id = st.integers(0, 2**63 - 1)
bad_token = st.integers(max_value=-1) | st.integers(min_value=2**63) | st.floats() | st.text("x -.²", max_size=3) | huge
bad_list = st.integers() | st.booleans() | st.floats() | st.dictionaries(st.text(), st.text())

BAD: dict[str, st.SearchStrategy[Any]] = {
    "n": not_whole(1, 1024),
    "temperature": outside(0, 1e4) | st.floats(0, 1e-6, exclude_min=True, exclude_max=True),
    "top_k": not_whole(0, 2**31),
    "top_p": outside(0, 1, open_low=True),
    "min_p": outside(0, 1),
    "typical_p": outside(0, 1, open_low=True),
    "repetition_penalty": outside(1e-4, 1e4),
    "presence_penalty": outside(-1e4, 1e4),
    "frequency_penalty": outside(-1e4, 1e4),
    "logit_bias": bad_list.filter(lambda v: not isinstance(v, dict))
    | st.none()
    | st.dictionaries(bad_token, st.just(1.0), min_size=1)
    | st.dictionaries(token_id, not_a_number | st.sampled_from([math.inf, 1e31, 10**400]), min_size=1)
    | st.sampled_from([{7: 1.0, "7": 1.0}, {"9" * 5000: 1.0}, {"٣": 1.0}]),
    "seed": (not_whole(-(2**63), 2**64 - 1)).filter(lambda v: v is not None),
    "min_new_tokens": not_whole(0, 2**31),
    "max_new_tokens": (not_whole(1, 2**31)).filter(lambda v: v is not None),
    "stop": bad_list | st.sampled_from(["", [""], ["a", 3], [None], b"ab", [b"a"]]),
    "stop_token_ids": bad_list | st.text() | st.lists(bad_token, min_size=1),
    "include_stop_str_in_output": not_bool,
    "ignore_eos": not_bool,
    "logprobs": (not_whole(0, 100)).filter(lambda v: v is not None),
    "prompt_logprobs": (not_whole(0, 100)).filter(lambda v: v is not None),
    "skip_special_tokens": not_bool,
    "deadline": outside(0, 1e9, open_low=True).filter(lambda v: v is not None),
    "priority": not_whole(-(2**31), 2**31),
    "cache_salt": not_a_number.filter(lambda v: not isinstance(v, str)) | st.binary() | st.lists(st.text()),
}


def test_every_field_has_bad_values() -> None:
    assert BAD.keys() == FIELDS


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_an_error_that_names_its_field(name: str) -> None:
    @given(BAD[name])
    def check(value: Any) -> None:
        with pytest.raises(RequestError) as e:
            SamplingParams(**{name: value})
        assert e.value.field == name
        assert str(e.value).startswith(f"{name}: ") and len(str(e.value)) < 300

    check()


@pytest.mark.parametrize("name", BAD)
def test_a_number_that_python_cannot_print_is_an_error_like_others(name: str) -> None:
    for value in (10**5000, [10**5000], {1: 10**5000}, {10**5000: 1}):
        with pytest.raises(RequestError, match=f"{name}: ") as e:
            SamplingParams(**{name: value})
        assert e.value.field == name


@given(st.text(min_size=1).filter(lambda s: s not in FIELDS))
def test_an_unknown_name_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(RequestError, match="unknown sampling parameter") as e:
        SamplingParams(**{name: 1})
    assert e.value.field == name


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_tokens", "max_new_tokens"),
        ("num_return_sequences", "n"),
        ("top_logprobs", "logprobs"),
        ("echo", "prompt_logprobs"),
        ("do_sample", "temperature"),
        ("temprature", "temperature"),
        ("topp", "top_p"),
    ],
)
def test_an_unknown_name_says_what_was_meant(name: str, meant: str) -> None:
    with pytest.raises(RequestError, match=f"did you mean {meant}\\?"):
        SamplingParams(**{name: 1})


def test_a_name_like_no_other_lists_the_known_ones() -> None:
    with pytest.raises(RequestError, match=r"known are .*frequency_penalty.*typical_p"):
        SamplingParams(zzz=1)


def test_values_without_names_are_refused() -> None:
    with pytest.raises(RequestError, match="by name only"):
        SamplingParams(0.5)


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens"),
        ({"min_new_tokens": 257}, "min_new_tokens"),  # the default of max_new_tokens counts too
        ({"temperature": 0, "n": 2}, "n"),
        ({"temperature": 0, "typical_p": 0.5}, "typical_p"),
        ({"include_stop_str_in_output": True}, "include_stop_str_in_output"),
    ],
)
def test_contradictions(params: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as e:
        SamplingParams(**params)
    assert e.value.field == field


@pytest.mark.parametrize(
    "params",
    [
        {"min_new_tokens": 8, "max_new_tokens": 8},
        {"min_new_tokens": 10**6, "max_new_tokens": None},
        {"temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.1},
        {"temperature": 1e-6, "top_p": 1e-300, "typical_p": 1},
        {"seed": 2**64 - 1, "n": 1024},
        {"seed": -(2**63)},
        {"include_stop_str_in_output": True, "stop": ["x"]},
        {"logprobs": 0, "prompt_logprobs": 100},
        {"logit_bias": {0: -math.inf, 2**63 - 1: 1e30}},
    ],
    ids=str,
)
def test_values_at_the_edge_are_taken(params: dict[str, Any]) -> None:
    p = SamplingParams(**params)
    assert {name: getattr(p, name) for name in params} == {**params, **({"stop": ("x",)} if "stop" in params else {})}


def test_json_is_taken_as_it_comes() -> None:
    text = """{"temperature": 1, "top_p": 1, "stop": "END", "stop_token_ids": [3, 4], "logit_bias": {"17": -2, "0": 1},
               "max_new_tokens": null, "seed": null}"""
    p = SamplingParams(**json.loads(text))
    assert (p.stop, p.stop_token_ids, p.logit_bias) == (("END",), (3, 4), {17: -2.0, 0: 1.0})
    assert isinstance(p.temperature, float) and isinstance(p.top_p, float)
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()


def test_values_are_copied_and_frozen() -> None:
    bias, stop = {1: 2.0}, ["a"]
    p = SamplingParams(logit_bias=bias, stop=stop)
    bias[5] = 1.0
    stop.append("b")
    assert p.logit_bias == {1: 2.0} and p.stop == ("a",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.top_k = 3


def test_replace_checks_again() -> None:
    p = SamplingParams(top_k=5, stop="a")
    q = p.replace(temperature=0, stop=["b"])
    assert (q.top_k, q.temperature, q.greedy, q.stop) == (5, 0.0, True, ("b",))
    assert (p.temperature, p.greedy, p.stop) == (1.0, False, ("a",))
    with pytest.raises(RequestError, match="top_p"):
        p.replace(top_p=2)
    with pytest.raises(RequestError, match="did you mean max_new_tokens"):
        p.replace(max_tokens=2)
    with pytest.raises(RequestError, match="typical_p"):
        p.replace(typical_p=0.5).replace(temperature=0)


def test_params_survive_copy_and_pickle() -> None:
    p = SamplingParams(top_k=5, logit_bias={3: 1}, stop="a")
    assert copy.copy(p) == copy.deepcopy(p) == pickle.loads(pickle.dumps(p)) == dataclasses.replace(p) == p


def test_a_request_error_is_an_ordinary_slipstream_error() -> None:
    assert issubclass(RequestError, SlipstreamError) and issubclass(RequestError, ValueError)
    assert RequestError("x").field is None and RequestError.exit_code == ConfigError.exit_code == 2


@pytest.mark.parametrize(
    ("ids", "why"),
    [
        ([], "is empty"),
        (None, "must be a list"),
        ("abc", "must be a list"),
        ({1: 2}, "must be a list"),
        ([1, 11], "token 11 is not in the vocabulary of 11"),
        ([-1], "token -1 is not"),
        ([1.0], "token 1.0 is not"),
        ([True], "token True is not"),
        ([10**5000], "a int too large to show is not"),
    ],
)
def test_prompts_that_are_not_token_ids(ids: Any, why: str) -> None:
    with pytest.raises(RequestError, match=why) as e:
        as_token_ids(ids, 11)
    assert e.value.field == "prompt"


def test_prompt_token_ids() -> None:
    assert as_token_ids([0, 10, 3], 11) == (0, 10, 3)
    assert as_token_ids(iter([4]), 11, name="x") == (4,)


def test_a_step_counts_its_tokens() -> None:
    chunks = (Chunk(1, 4, (7, 8, 9), (), False), Chunk(2, 0, (5,), (), True))
    step = Step(0, (), (), chunks)
    assert step.num_tokens == 4 and [c.end for c in chunks] == [7, 1]


def test_no_torch() -> None:
    code = "import sys, slipstream.request, slipstream.ops.sampling; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
