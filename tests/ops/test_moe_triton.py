"""The Triton experts without a GPU: run by Triton's interpreter in a process of its own (it must be asked for before the
kernels are imported; bfloat16 is wrong there, so float32 only), and compiled for Hopper."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream.errors import KernelError
from slipstream.ops.activation.reference import activation
from slipstream.ops.formats import Weight, decode, encode
from slipstream.ops.moe.reference import experts as reference

pytest.importorskip("triton")

from slipstream.ops.moe import kernels
from slipstream.ops.moe import triton as module
from slipstream.ops.moe.triton import Tiles, choose_tiles, experts, prepare

ROOT = Path(__file__).parents[2]
HIDDEN, INNER, EXPERTS, TOP_K = 160, 96, 5, 2


def linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor, int], Tensor]:
    return lambda x, e: torch.nn.functional.linear(x, weight[e], None if bias is None else bias[e])


def stack(format: str, shape: tuple[int, ...], dtype: torch.dtype) -> Weight:
    values = torch.randn(shape) * shape[-1] ** -0.5 * 2
    return encode(values, format) if format == "mxfp4" else Weight("dense", values.to(dtype), shape)


def case(
    format: str,
    tokens: int,
    kind: str,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    sizes: tuple[int, int, int, int] = (HIDDEN, INNER, EXPERTS, TOP_K),
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the kernels give and what float64 gives. What the kernels allocate starts as NaN."""
    hidden, inner, number, top_k = sizes
    torch.manual_seed(tokens)
    up, down = stack(format, (number, 2 * inner, hidden), dtype), stack(format, (number, hidden, inner), dtype)
    biases = [torch.randn(number, n).to(dtype) if kind == "swiglu_clamped" else None for n in (2 * inner, hidden)]
    x = (3 * torch.randn(tokens, hidden)).to(dtype)
    if ids is None:
        ids = torch.rand(tokens, number).topk(top_k).indices
    weights = torch.rand(tokens, top_k).softmax(-1)
    layers = [
        linear(decode(w, torch.float32).to(device).double(), None if b is None else b.to(device).double())
        for w, b in zip((up, down), biases, strict=True)
    ]
    x, ids, weights = x.to(device), ids.to(device), weights.to(device)
    wanted = reference(x.double(), ids, weights.double(), *layers, activation, kind=kind, limit=1.5)
    packed = [prepare(w.map(lambda t: t.to(device)), dtype, gated=i == 0) for i, w in enumerate((up, down))]
    gate_bias, down_bias = (None if b is None else b.to(device) for b in biases)
    empty = torch.empty

    def poisoned(*size: int, dtype: torch.dtype, device: Any) -> Tensor:
        return torch.full(size, -99 if dtype == torch.int32 else torch.nan, dtype=dtype, device=device)

    torch.empty = poisoned  # type: ignore[assignment]
    try:
        found = experts(x, ids, weights, packed[0], gate_bias, packed[1], down_bias, kind=kind, limit=1.5)
    finally:
        torch.empty = empty
    assert found.dtype == dtype and found.shape == x.shape
    return found, wanted


def error(*args: Any, **kwargs: Any) -> float:
    found, wanted = case(*args, **kwargs)
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def tiled(tiles: Tiles, *args: Any, **kwargs: Any) -> float:
    module.choose_tiles, before = lambda *_: tiles, module.choose_tiles
    try:
        return error(*args, **kwargs)
    finally:
        module.choose_tiles = before


def interpreted() -> dict[str, Callable[[], float]]:
    cases: dict[str, Callable[[], float]] = {
        f"{format}-{tokens}-{kind}": partial(error, format, tokens, kind)
        for format in ("mxfp4", "dense")
        for tokens in (1, 3, 37)
        for kind in ("swiglu_clamped", "silu")
    }
    for name, tiles in {
        "few": Tiles(True, 8, 8, 4, 2, 4),
        "left": Tiles(True, 16, 4, 4, 2, 4),
        "right": Tiles(False, 64, 8, 2, 4, 3),
    }.items():
        cases[f"tiles-{name}"] = partial(tiled, tiles, "mxfp4", 3 if name == "few" else 70, "silu")
    same = torch.tensor([[4, 1]]).expand(19, 2)
    cases["all-to-two-experts"] = partial(error, "mxfp4", 19, "silu", ids=same)
    cases["many-experts"] = partial(error, "mxfp4", 9, "silu", sizes=(64, 32, 67, 5))
    return cases


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    run = subprocess.run([sys.executable, __file__], env=env, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", interpreted())
def test_the_kernels_in_the_interpreter_against_float64(results: dict[str, Any], name: str) -> None:
    found = results[name]
    assert isinstance(found, float) and found < 1e-6, found


def main() -> None:
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:  # triton 3.6 calls int() on an array of one, which numpy 2.4 refuses
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
    found: dict[str, Any] = {}
    for name, one in interpreted().items():
        try:
            found[name] = one()
        except Exception as e:
            found[name] = repr(e)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
