"""Adapters of kernel repositories: each against the op's reference, and what they refuse."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.errors import KernelError
from slipstream.ops.candidate import HOMES, compare, home, sample
from slipstream.ops.choose import Case
from slipstream.ops.sample import TOLERANCE, error
from tests.ops import repositories as repos

GPT_OSS = {"kinds": {"swiglu_clamped"}, "formats": {"mxfp4"}, "limit": 7.0}
DENSE = GPT_OSS | {"formats": {"dense"}}
ADAPTED: dict[str, tuple[str, dict[str, str], Case]] = {
    "activation": (
        "activation", repos.ACTIVATION, Case("cpu", "float32", facts={"kinds": ("silu", "gelu", "gelu_tanh")}),
    ),
    "activation in bfloat16": ("activation", repos.ACTIVATION, Case("cpu", "bfloat16", facts={"kinds": ("silu",)})),
    "liger": ("norm", repos.LIGER, Case("cpu", "float32")),
    "liger in bfloat16": ("norm", repos.LIGER, Case("cpu", "bfloat16")),
    "liger with Gemma's weights": ("norm", repos.LIGER, Case("cpu", "bfloat16", facts={"wide_weight": True})),
    "fused norm": ("norm", repos.FLASH_NORM, Case("cpu", "float32")),
    "rotary": ("rotary", repos.ROTARY, Case("cpu", "float32")),
    "liger's rotary": ("rotary", repos.LIGER, Case("cpu", "float32")),
    "flash 3": ("attention", repos.FLASH3, Case("cpu", "bfloat16", facts={"head_dim": 64})),
    "flash 3 with sinks": ("attention", repos.FLASH3, Case("cpu", "float16", facts={"head_dim": 16, "sinks": True})),
    "flash 3, capped": ("attention", repos.FLASH3, Case("cpu", "bfloat16", facts={"head_dim": 16, "softcap": 3.0})),
    "flash 3 as vLLM has it": ("attention", repos.FLASH3_VLLM, Case("cpu", "bfloat16", facts={"sinks": True})),
    "megablocks": ("moe", repos.MEGABLOCKS, Case("cpu", "float32", facts=DENSE)),
    "triton kernels": ("moe", repos.TRITON_KERNELS, Case("cpu", "bfloat16", facts=GPT_OSS)),
}  # fmt: skip
REFUSED: dict[str, tuple[str, dict[str, str], Case, str]] = {
    "another op's": ("norm", repos.ACTIVATION, Case("cpu", "float32"), "has no rms_norm_fn"),
    "no such kind": (
        "activation", repos.ACTIVATION, Case("cpu", "float32", facts={"kinds": ("swiglu_clamped",)}),
        "has no swiglu_clamped_and_mul",
    ),
    "other arguments": (
        "activation", {"__init__.py": "def silu_and_mul(x): return x\n"}, Case("cpu", "float32"), r"\(x\) takes no out",
    ),
    "no sinks": (
        "attention", repos.FLASH3_WITHOUT_SINKS, Case("cpu", "bfloat16", facts={"sinks": True}), "takes no s_aux",
    ),
    "no pages": ("attention", repos.LIGER, Case("cpu", "bfloat16"), "not attention over pages"),
    "packed weights": ("moe", repos.MEGABLOCKS, Case("cpu", "float32", facts=GPT_OSS), "dequantize"),
    "weights that are not packed": ("moe", repos.TRITON_KERNELS, Case("cpu", "bfloat16", facts=DENSE), "takes mxfp4"),
    "float32": ("moe", repos.TRITON_KERNELS, Case("cpu", "float32", facts=GPT_OSS), "not float32"),
}  # fmt: skip
STATIC = {
    "attention in float32": ("attention", Case("cpu", "float32"), "not float32"),
    "odd heads": ("attention", Case("cpu", "bfloat16", facts={"head_dim": 60}), "multiples of 8"),
    "an old card": ("attention", Case("cuda", "bfloat16", (7, 5)), "compute capability 8.0"),
    "another activation": ("moe", Case("cuda", "bfloat16", facts={"kinds": {"silu"}}), "not silu"),
    "another limit": ("moe", Case("cuda", "bfloat16", facts={"limit": 5.0}), "not at 5.0"),
    "experts on other ranks": ("moe", Case("cuda", "bfloat16", facts={"spread": True}), "each rank"),
}


def adapter(op: str) -> Any:
    return import_module(f"slipstream.ops.{HOMES.get(op, op)}.hub")


@pytest.mark.parametrize("name", ADAPTED)
@torch.inference_mode()
def test_an_adapter_gives_what_the_reference_gives(name: str, tmp_path: Path) -> None:
    op, files, case = ADAPTED[name]
    assert adapter(op).reject(case) is None
    fn = adapter(op).adapt(repos.load(files, tmp_path), case)
    assert compare(op, fn, case, {}) < TOLERANCE[case.dtype] / 2


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_repository_cannot_do_is_said(name: str, tmp_path: Path) -> None:
    op, files, case, why = REFUSED[name]
    with pytest.raises(KernelError, match=why):
        adapter(op).adapt(repos.load(files, tmp_path), case)


@pytest.mark.parametrize("name", STATIC)
def test_what_no_repository_can_do_is_said_before_one_is_opened(name: str) -> None:
    op, case, why = STATIC[name]
    assert why in (adapter(op).reject(case) or "")


@pytest.mark.parametrize("op", ["norm", "activation", "attention", "rotary", "moe"])
@torch.inference_mode()
def test_our_own_pass_the_check_that_others_must_pass(op: str) -> None:
    facts = {"kinds": {"swiglu_clamped"}, "formats": {"dense"}} if op == "moe" else {"head_dim": 64}
    case = Case("cpu", "float32", facts=facts)
    ran = [i.name for i in home(op).IMPLS if i.reject(case) is None and compare(op, i.load(), case, {}) < 1e-4]
    assert len(ran) >= (1 if op == "activation" else 2)


WRONG = {
    "ten percent off": ("return out.copy_(F.silu(gate) * up)", "return out.copy_(F.silu(gate) * up * 1.1)"),
    "NaN": ("return out.copy_(F.silu(gate) * up)", "return out.copy_(F.silu(gate) * up).fill_(float('nan'))"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_seen(name: str, tmp_path: Path) -> None:
    case = Case("cpu", "float32")
    files = {"__init__.py": repos.ACTIVATION["__init__.py"].replace(*WRONG[name])}
    fn = adapter("activation").adapt(repos.load(files, tmp_path), case)
    assert not compare("activation", fn, case, {}) < 0.05


def test_the_error_is_the_largest_difference_as_a_part_of_a_number_and_of_their_usual_size() -> None:
    calls = sample("activation", Case("cpu", "float32"), 3, {"inner": 8})

    def near(x: torch.Tensor, kind: str, limit: float) -> torch.Tensor:
        out = home("activation").IMPLS[-1].load()(x, kind, limit)
        rms = sum(v * v for v in out.flatten().tolist()) ** 0.5 / out.numel() ** 0.5
        out[1, 2] += 0.25 * (abs(out[1, 2].item()) + rms)
        out[0, 3] -= 0.125 * (abs(out[0, 3].item()) + rms)
        return out

    assert error(near, home("activation").IMPLS[-1].load(), calls) == pytest.approx(0.25, rel=1e-5)


MISBEHAVED = {
    "writes into its input": (lambda x, kind, limit: x.zero_()[..., :8], "writes into its inputs"),
    "raises": (lambda x, kind, limit: 1 / 0, "ZeroDivisionError"),
    "another shape": (lambda x, kind, limit: x.clone(), r"gives \(3, 16\) float32 where the reference gives \(3, 8\)"),
    "another dtype": (lambda x, kind, limit: x[..., :8].double(), "float64"),
    "no tensor": (lambda x, kind, limit: None, "NoneType"),
}


@pytest.mark.parametrize("name", MISBEHAVED)
def test_what_breaks_the_rules_of_an_op_is_refused(name: str) -> None:
    fn, why = MISBEHAVED[name]
    calls = sample("activation", Case("cpu", "float32"), 3, {"inner": 8})
    with pytest.raises(KernelError, match=why):
        error(fn, home("activation").IMPLS[-1].load(), calls)


def test_samples_count_the_bytes_of_what_they_give() -> None:
    case = Case("cpu", "bfloat16")
    assert sample("norm", case, 3, {"width": 10}).nbytes == 4 * 3 * 10 * 2
    assert sample("activation", case, 3, {"inner": 5}).nbytes == 3 * 15 * 2
