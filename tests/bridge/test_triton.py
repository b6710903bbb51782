"""Our Triton attention on transformers' cache as it stands, and the Triton repository of benchmarks/hub_kernel.py, by Triton's
interpreter in a process of its own. tests/gpu/test_hub.py runs them on a device."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.bridge.attention import Step, _slots
from slipstream.ops.attention.reference import attention as reference
from slipstream.ops.candidate import compare
from slipstream.ops.choose import Case
from tests.ops import interpreter, repositories

pytest.importorskip("triton")
CPU = torch.device("cpu")


def on_the_cache_as_it_stands(window: int | None, start: int, pads: tuple[int, ...], cut: int) -> float:
    """A sliding cache is a part of one, so its sequences are not next to each other."""
    from slipstream.ops.attention.triton import attention

    torch.manual_seed(5)
    count, kv_heads, heads, head_dim = 7, 2, 6, 16
    key, value = (t[:, :, cut:] for t in torch.randn(2, len(pads), kv_heads, cut + start + count, head_dim))
    step = Step(count, start, pads, window, CPU)
    q = torch.randn(len(pads) * count, heads, head_dim)
    q = q if step.rows is None else q[step.rows]
    sinks, found = torch.randn(heads), []
    for fn, copies in ((attention, False), (reference, True)):
        keys, values, stride = _slots(key, value, copies)
        batch = step.batch(stride, kv_heads, head_dim)
        found.append(fn(q, keys, values, batch, batch.groups[0], scale=0.3, sinks=sinks))
    return (found[0] - found[1]).abs().max().item()


def of_the_repository(op: str) -> float:
    from slipstream.ops.activation import hub as activation_hub
    from slipstream.ops.norm import hub as norm_hub

    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from hub_kernel import TRITON

    case = Case("cpu", "float32", facts={"kinds": ("swiglu_clamped",)})
    adapter: Any = {"norm": norm_hub, "activation": activation_hub}[op]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        opened = repositories.load({"__init__.py": TRITON}, Path(folder))
        return compare(op, adapter.adapt(opened, case), case, {})


CASES = {
    "prompts": lambda: on_the_cache_as_it_stands(None, 0, (0, 0, 0), 0),
    "chunks": lambda: on_the_cache_as_it_stands(None, 9, (0, 0), 0),
    "padding": lambda: on_the_cache_as_it_stands(None, 2, (0, 5, 1), 0),
    "a window over a part": lambda: on_the_cache_as_it_stands(4, 9, (0, 3), 6),
    "norm": lambda: of_the_repository("norm"),
    "activation": lambda: of_the_repository("activation"),
}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return interpreter.run(__file__)


@pytest.mark.parametrize("name", CASES)
def test_as_the_reference(found: dict[str, Any], name: str) -> None:
    assert isinstance(found[name], float) and found[name] < 1e-5, found[name]


if __name__ == "__main__":
    interpreter.main(CASES)
