"""The table of choices: what it may hold, whose comes first, and that kernels and plans do as it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.errors import ConfigError
from slipstream.ops import tuned
from slipstream.ops.tuned import Experts, Group, Tile, Tuned

CARD = "NVIDIA H100 80GB HBM3"
SHAPE = "mxfp4 32 x 5760 x 2880"
ONE, TWO = Tile(8, 2, 8, 2, 4), Tile(32, 8, 4, 4, 3)
TABLE = Experts(ONE, ((2.5, ONE), (40.0, TWO), (float("inf"), Group(64))))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path))
    return tmp_path


def test_the_shipped_table_is_one() -> None:
    table = tuned.read(tuned.SHIPPED)
    assert SHAPE in table[CARD].moe and table[CARD].linear


def test_a_table_is_read_as_it_was_written(home: Path) -> None:
    path = tuned.write("a card", Tuned({SHAPE: TABLE}, {"bfloat16 4 x 16": 0}))
    assert path == home / "tuned.json"
    tuned.write("another", Tuned(linear={"bfloat16 7 x 9": 64}))
    tuned.write("a card", Tuned(linear={"bfloat16 4 x 16": 8, "bfloat16 5 x 16": 9}))
    assert tuned.read(path) == {
        "a card": Tuned({SHAPE: TABLE}, {"bfloat16 4 x 16": 8, "bfloat16 5 x 16": 9}),
        "another": Tuned(linear={"bfloat16 7 x 9": 64}),
    }
    assert [f.name for f in home.iterdir()] == ["tuned.json"]


def test_a_choice_goes_by_the_pairs_of_an_expert() -> None:
    assert [TABLE.choose(each) for each in (0.1, 2.5, 2.6, 40, 41, 9999)] == [ONE, ONE, TWO, TWO, Group(64), Group(64)]


def test_the_users_own_comes_first() -> None:
    why: dict[str, str] = {}
    shipped = tuned.tuned("cuda", CARD, why)
    assert shipped == tuned.read(tuned.SHIPPED)[CARD] and "comes with" in why["tiles"] and " and " not in why["tiles"]
    tuned.write(CARD, Tuned({SHAPE: TABLE}))
    found = tuned.tuned("cuda:1", CARD, why)
    assert found == Tuned({SHAPE: TABLE}, shipped.linear) and "tuned.json" in why["tiles"]
    assert tuned.tuned("cuda", "a card that nobody knows", why) == Tuned() and "not measured" in why["tiles"]
    assert tuned.tuned("cpu", CARD, {}) == Tuned()


def entry(**changes: Any) -> dict[str, Any]:
    return {"few": ONE._asdict(), "steps": [[4, ONE._asdict()], [None, {"group": 64}]], **changes}


BAD = {
    "nothing": "",
    "no json": "{",
    "a list": "[]",
    "deep": "[" * 100_000,
    "a card that is a number": {CARD: 3},
    "moe that is a list": {CARD: {"moe": []}},
    "an entry that is text": {CARD: {"moe": {SHAPE: "fast"}}},
    "no steps": {CARD: {"moe": {SHAPE: {"few": ONE._asdict()}}}},
    "empty steps": {CARD: {"moe": {SHAPE: entry(steps=[])}}},
    "few that are sorted": {CARD: {"moe": {SHAPE: entry(few={"group": 64})}}},
    "a bound too few": {CARD: {"moe": {SHAPE: entry(steps=[[4, ONE._asdict()]])}}},
    "bounds that fall": {
        CARD: {"moe": {SHAPE: entry(steps=[[4, {"group": 64}], [3, {"group": 64}], [None, {"group": 64}]])}}
    },
    "a bound of text": {CARD: {"moe": {SHAPE: entry(steps=[["4", {"group": 64}], [None, {"group": 64}]])}}},
    "a group of 65": {CARD: {"moe": {SHAPE: entry(steps=[[None, {"group": 65}]])}}},
    "pairs that are true": {CARD: {"moe": {SHAPE: entry(few={**ONE._asdict(), "pairs": True})}}},
    "too many stages": {CARD: {"moe": {SHAPE: entry(few=ONE._replace(stages=99)._asdict())}}},
    "more warps than slabs": {CARD: {"moe": {SHAPE: entry(few=ONE._replace(warps=8)._asdict())}}},
    "a part missing": {CARD: {"moe": {SHAPE: entry(few={"pairs": 8})}}},
    "few of 65 tokens": {CARD: {"linear": {"bfloat16 3 x 4": 65}}},
    "few of a half": {CARD: {"linear": {"bfloat16 3 x 4": 0.5}}},
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_table_is_told_and_left_aside(name: str, home: Path) -> None:
    bad = BAD[name]
    path = home / "tuned.json"
    path.write_text(bad if isinstance(bad, str) else json.dumps(bad))
    with pytest.raises(ConfigError, match=r"tuned\.json is no table of measurements .* run `slipstream tune` again"):
        tuned.read(path)
    why: dict[str, str] = {}
    assert tuned.tuned("cuda", CARD, why) == tuned.read(tuned.SHIPPED)[CARD]
    assert "no table of measurements" in why["tiles"]
    assert tuned.read(tuned.write("a card", Tuned(linear={"bfloat16 3 x 4": 5}))) == {
        "a card": Tuned(linear={"bfloat16 3 x 4": 5})
    }


def test_the_experts_do_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from slipstream.ops.moe import triton as moe

    x = torch.empty(0, dtype=torch.bfloat16)
    packed = (torch.empty(0), torch.empty(0))
    for hopper in (True, False):
        monkeypatch.setattr(moe, "_hopper", lambda device, hopper=hopper: hopper)
        groups = [moe.choose_group(pairs, 8, x, packed, TABLE) for pairs in (4, 20, 320, 321)]
        assert groups == [0, 0, 0, 64 * hopper]
    tiles = [moe.choose_tiles(pairs, 8, torch.bfloat16, True, TABLE) for pairs in (4, 20, 320)]
    assert tiles == [moe.Tiles(True, *ONE), moe.Tiles(True, *ONE), moe.Tiles(True, *TWO)]
    for args in ((4, 8, torch.float32, True), (99, 8, torch.bfloat16, False), (321, 8, torch.bfloat16, True)):
        assert moe.choose_tiles(*args, TABLE) == moe.choose_tiles(*args), "the rule, where the table has no say"


def test_the_shipped_choices_are_the_rule_that_was_measured() -> None:
    """Both came from the same sweep, of gpt-oss-20b on an H100; whoever changes one of them measures anew."""
    pytest.importorskip("triton")
    from slipstream.ops.moe import triton as moe

    table = tuned.read(tuned.SHIPPED)[CARD].moe[SHAPE]
    for tokens in (1, 2, 3, 8, 40, 41, 96, 192):
        rule = moe.choose_tiles(4 * tokens, 32, torch.bfloat16, True)
        assert moe.choose_tiles(4 * tokens, 32, torch.bfloat16, True, table) == rule
    assert [table.choose(each) for each in (24, 24.1, 48, 48.1)][1:] == [Group(64), Group(64), Group(128)]
