"""What was measured on a card reaches the kernels of a plan for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from slipstream.layers.linear import Linear
from slipstream.ops import tuned
from slipstream.ops.linear.triton_few import FEW
from slipstream.ops.tuned import Experts, Group, Tile, Tuned
from tests.engine import hopper
from tests.engine.test_warm import SHAPE


def kernels(plan: Any) -> tuple[Any, dict[tuple[int, int], int]]:
    """The table that experts are called with, and the few tokens of each weight's own kernel."""
    few = {}
    for layer in plan.model.modules():
        if isinstance(layer, Linear):
            out, width = layer.weight.shape  # type: ignore[union-attr]
            few[out, width] = plan.ops.linear("dense", out, width, False).few
    return getattr(plan.ops.experts.kernel.experts, "keywords", {}).get("tuned"), few


def test_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path / "home"))
    table, few = kernels(hopper.plan_for(tmp_path / "model", SHAPE, monkeypatch))
    assert table is None and set(few.values()) == {FEW}
    entry = Experts(Tile(8, 2, 8, 2, 4), ((float("inf"), Group(64)),))
    tuned.write(hopper.CARD, Tuned({"mxfp4 8 x 192 x 320": entry}, {"bfloat16 640 x 320": 5, "bfloat16 320 x 640": 3}))
    plan = hopper.plan_for(tmp_path / "model", SHAPE, monkeypatch)
    table, few = kernels(plan)
    assert table == entry and "slipstream tune" in plan.why["tiles"]
    assert few[640, 320] == 5 and few[320, 384] == few[999, 320] == FEW
