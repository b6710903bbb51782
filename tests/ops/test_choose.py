"""choose(): which implementation is taken, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest

from slipstream.errors import KernelError
from slipstream.ops.choose import Case, Impl, choose

CPU = Case("cpu", "float32")
CUDA = Case("cuda", "bfloat16", (9, 0), {"window": 128})


def impl(name: str, why: str | None = None) -> Impl:
    return Impl(name, lambda: f"{name} loaded", lambda case: why)


def unloadable(name: str, why: str | None = None) -> Impl:
    def load() -> Any:
        raise AssertionError(f"{name} must not be loaded")

    return Impl(name, load, lambda case: why)


def test_the_first_that_can_run_is_taken_and_only_it_is_loaded() -> None:
    impls = (unloadable("hub", "not installed"), impl("triton"), unloadable("torch"), unloadable("reference"))
    choice = choose("norm", impls, CPU)
    assert (choice.op, choice.name, choice.fn) == ("norm", "triton", "triton loaded")
    assert choice.reason == "the first of the list that can run"
    assert choice.rejected == (
        ("hub", "not installed"),
        ("torch", "triton stands before it"),
        ("reference", "triton stands before it"),
    )


def test_the_own_reason_counts_more_than_the_place() -> None:
    choice = choose("norm", (impl("torch"), unloadable("hub", "needs CUDA")), CPU)
    assert choice.rejected == (("hub", "needs CUDA"),)


def test_the_only_one() -> None:
    choice = choose("norm", (impl("reference"),), CPU)
    assert (choice.name, choice.reason, choice.rejected) == ("reference", "the only one", ())


def test_reject_is_asked_with_the_case() -> None:
    seen: list[Case] = []

    def reject(case: Case) -> str | None:
        seen.append(case)
        return "wide" if case.get("window", 0) > 64 else None

    asks = Impl("asks", lambda: None, reject)
    assert choose("attention", (asks, impl("torch")), CUDA).rejected == (("asks", "wide"),)
    assert choose("attention", (asks, impl("torch")), CPU).name == "asks"
    assert seen == [CUDA, CPU]
    assert CUDA.get("window") == 128 and CUDA.get("sinks") is None and CUDA.get("sinks", 3) == 3


def test_forced() -> None:
    choice = choose("norm", (unloadable("triton"), unloadable("hub", "no"), impl("reference")), CPU, force="reference")
    assert (choice.name, choice.reason) == ("reference", "forced")
    assert choice.rejected == (("triton", "reference was forced"), ("hub", "no"))


def test_forced_but_unknown() -> None:
    with pytest.raises(KernelError, match=r"norm: no implementation is called 'cuda'; known are triton, reference"):
        choose("norm", (impl("triton"), impl("reference")), CPU, force="cuda")


def test_forced_but_cannot_run() -> None:
    with pytest.raises(KernelError) as e:
        choose("norm", (unloadable("triton", "needs a GPU"), unloadable("reference")), CPU, force="triton")
    assert "norm: 'triton' was forced but cannot run on cpu with float32: " in str(e.value)
    assert "triton: needs a GPU; reference: triton was forced" in str(e.value)


def test_none_can_run() -> None:
    with pytest.raises(KernelError) as e:
        choose("moe", (unloadable("triton", "too old"), unloadable("hub", "offline")), CUDA)
    message = "moe: no implementation can run on cuda with bfloat16, window=128: triton: too old; hub: offline"
    assert str(e.value) == message


def test_none_there_is() -> None:
    with pytest.raises(KernelError, match="there is none"):
        choose("moe", (), CPU)


def test_the_reference_is_not_taken_on_cuda() -> None:
    impls = (unloadable("triton", "too old"), unloadable("reference"))
    with pytest.raises(KernelError, match="reference: the reference is never taken on CUDA unless it is forced"):
        choose("norm", impls, CUDA)
    # Elsewhere, and where it is forced, it is.
    assert choose("norm", (impl("triton", "too old"), impl("reference")), CPU).name == "reference"
    assert choose("norm", (impl("triton", "too old"), impl("reference")), CUDA, force="reference").reason == "forced"
    # The rule is about the reference only.
    assert choose("norm", (impl("torch"), unloadable("reference")), CUDA).name == "torch"


def test_what_is_not_taken_unasked_is_taken_if_forced() -> None:
    impls = (unloadable("torch", "no"), Impl("reference", lambda: "loaded", lambda case: None, lambda case: "too slow"))
    with pytest.raises(KernelError, match="reference: too slow"):
        choose("norm", impls, CPU)
    assert choose("norm", impls, CPU, force="reference").fn == "loaded"
