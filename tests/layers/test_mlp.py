"""Experts whose router is one kernel with the residual and the norm before it: when that is called, and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream import LLM, SamplingParams
from slipstream.layers.mlp import MLP, MoE
from slipstream.ops.norm.reference import add_norm
from slipstream.ops.router import AT_ONCE, WIDEST, Logits
from slipstream.ops.router.reference import router
from slipstream.parallel.collectives import Parts
from tests.parity.tiny import save

PROMPTS = [[3, 9, 27, 81, 12, 6, 2, 40, 41, 42, 43], [5, 7]]
GREEDY = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_few_tokens_take_the_one_kernel(name: str, tmp_path: Path) -> None:
    save(name, tmp_path / name)
    llm, plain = (LLM(tmp_path / name, device="cpu", dtype="float32", async_scheduling=False) for _ in range(2))
    want = [o.outputs[0].token_ids for o in plain.generate(PROMPTS, GREEDY)]
    layers = [m for m in llm.engine.runner.model.modules() if isinstance(m, MoE)]
    dense = [m for m in llm.engine.runner.model.modules() if isinstance(m, MLP)]
    assert layers and bool(dense) is (name == "qwen3_moe")
    called: list[int] = []

    def both(x: Tensor, delta: Any, weight: Tensor, eps: float, linear: Any, top_k: int, **how: bool) -> Any:
        assert linear.arrived.shape == (AT_ONCE,) and linear.arrived.dtype == torch.int32 and not linear.arrived.any()
        called.append(len(x))
        total, h = add_norm(x, delta, weight, eps)
        return total, h, *router(h, linear, top_k, **how)

    for layer in layers:
        assert layer.after_norm is None
        layer.after_norm = both
    assert [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY)] == want
    # Of the prompts together, two rows are left in the last layer, as no others get logits.
    assert called == [2] * (1 + 5 * len(layers)), "not the prompts together, and each step after them"
    assert len({layer.router.arrived.data_ptr() for layer in layers if layer.router.arrived is not None}) == len(layers)


def test_what_has_a_kernel_with_its_norm_or_has_no_norm_goes_one_by_one(tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path / "model")
    model = LLM(tmp_path / "model", device="cpu", dtype="float32").engine.runner.model
    mlp, norm = next((m.mlp, m.before_mlp) for m in model.layers if isinstance(m.mlp, MoE))
    mlp.after_norm = None
    x, delta = torch.randn(2, 3, mlp.router.dense.shape[1])
    want = mlp.route(norm, x, delta)

    class Sums:
        def reduce_norm(self, part: Tensor, x: Tensor, weight: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
            return add_norm(x, part, weight, more[0])

    def both(*_: Any, **__: Any) -> Any:
        raise AssertionError("not for these")

    mlp.after_norm = both
    found = mlp.route(norm, x, Parts(delta, Sums(), None))  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    total, h, *_ = mlp.route(None, x, delta)
    assert torch.equal(total, x + delta) and h is total
    many = torch.randn(AT_ONCE + 1, x.shape[1])
    assert len(mlp.route(norm, many, many)[2]) == AT_ONCE + 1
    with pytest.raises(AssertionError, match="not for these"):
        mlp.route(norm, x, delta)
    mlp.router.arrived = None  # its weight is packed, or wider than WIDEST
    assert torch.equal(mlp.route(norm, x, delta)[2], want[2]) and WIDEST >= 4096


def test_the_choice_is_left_to_experts_that_can_make_it_of_one_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("qwen3_moe", tmp_path / "model")
    model = LLM(tmp_path / "model", device="cpu", dtype="float32").engine.runner.model
    mlp, norm = next((m.mlp, m.before_mlp) for m in model.layers if isinstance(m.mlp, MoE))
    plain = mlp.experts.kernel
    told: dict[str, Logits | None] = {}

    def pick(h: Tensor, linear: Any, top_k: int, logits: Logits | None = None, **how: bool) -> tuple[Tensor, Tensor]:
        told["router"] = logits
        return router(h, linear, top_k, **how)

    def both(x: Tensor, delta: Tensor, weight: Tensor, eps: float, *more: Any, **how: Any) -> tuple[Tensor, ...]:
        total, h = add_norm(x, delta, weight, eps)
        return total, h, *pick(h, *more, **how)

    def experts(*given: Any, logits: Logits | None = None, **how: Any) -> Tensor:
        told["experts"] = logits
        out: Tensor = plain.experts(*given, **how)
        return out

    class Sums:
        def reduce_norm(self, part: Tensor, x: Tensor, weight: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
            return add_norm(x, part, weight, more[0])

    def left(tokens: int = 1, summed: bool = False) -> bool:
        told.clear()
        x, delta = torch.randn(2, tokens, mlp.router.dense.shape[1])
        mlp(norm, x, Parts(delta, Sums(), None) if summed else delta)  # type: ignore[arg-type]
        assert told["router"] is told["experts"], "both know, or nobody does"
        return told["router"] is not None

    mlp.after_norm, mlp.pick, mlp.experts.kernel = both, pick, replace(plain, experts=experts, chooses=mlp.top_k)
    assert left() and left(summed=True) and not left(2)
    logits = told["router"] if left() else None
    assert logits is not None and logits.values.shape == (1, mlp.num_experts) and logits.values.dtype == torch.float32
    assert (logits.softmax_first, logits.renormalize) == (mlp.softmax_first, mlp.renormalize)
    for owner, name, value in (
        (mlp, "after_norm", None),  # another router
        (mlp.experts, "kernel", replace(mlp.experts.kernel, chooses=mlp.top_k - 1)),
        (mlp.router, "arrived", None),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert not left(), name
    monkeypatch.setattr(type(mlp.ranks), "experts", range(mlp.num_experts))
    monkeypatch.setattr(type(mlp.ranks), "combine", lambda self, out, ids: out, raising=False)
    assert not left(), "experts are spread over ranks, and numbers are to be looked up"


def test_gate_and_up_of_few_tokens_are_wide(tmp_path: Path) -> None:
    """Where a kernel gives float32: what is given to down has the model's dtype all the same."""
    save("llama", tmp_path)
    llm = LLM(tmp_path, dtype="bfloat16")
    mlp = next(m for m in llm.plan.model.modules() if isinstance(m, MLP))
    given: list[tuple[str, torch.dtype]] = []

    class Product(torch.nn.Module):
        def wide(self, x: Tensor) -> Tensor:
            given.append(("wide", x.dtype))
            return torch.randn(len(x), 2 * inner)

        def forward(self, x: Tensor) -> Tensor:
            given.append(("narrow", x.dtype))
            return torch.randn(len(x), 2 * inner).bfloat16()

        def left(self, x: Tensor) -> Tensor:
            given.append(("left", x.dtype))
            return x

    inner, hidden = llm.plan.model_config.intermediate_size, llm.plan.model_config.hidden_size
    mlp.gate_up = mlp.down = Product()
    mlp.wide_rows = 4
    for rows in (4, 5):
        mlp(None, torch.randn(rows, hidden), torch.randn(rows, hidden))
    bf16 = torch.bfloat16
    assert given == [("wide", bf16), ("left", bf16), ("narrow", bf16), ("left", bf16)]
