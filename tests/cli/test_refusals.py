"""MXFP4 where nothing can multiply by it is an error in every front, which says what is missing and what widening costs."""

from __future__ import annotations

from pathlib import Path

import pytest

from slipstream import LLM
from slipstream.errors import KernelError
from slipstream.hardware import Hardware
from tests.cli.conftest import Run
from tests.engine import tiny
from tests.parity.test_mxfp4 import publish
from tests.parity.tiny import TINY, save


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Floats, with rows of a multiple of 32."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
    return tiny.write(tmp_path_factory.mktemp("dense"), tiny.LLAMA | sizes)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gpt-oss as it is published."""
    path = tmp_path_factory.mktemp("published")
    kind, changes = TINY["gpt_oss"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY, "gpt_oss", (kind, changes | {"hidden_size": 160, "intermediate_size": 96}))
        save("gpt_oss", path)
    publish(path)
    return path


@pytest.fixture
def old_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that Triton does not compile for. Planning stops before anything of it is touched."""
    monkeypatch.setattr(
        "slipstream.plan.layout.find_hardware", lambda asked, why: Hardware("cuda", "old", 1 << 30, (7, 0))
    )


SAYS = ("cannot run here as mxfp4", "compute capability", "would hold", "GiB")
WAY_OUT = {"published": "quantization='dequantize' would hold", "dense": "quantization='auto' would hold"}


@pytest.mark.usefixtures("old_card")
@pytest.mark.parametrize("source", ["published", "dense"])
def test_in_every_front(source: str, request: pytest.FixtureRequest, slipstream: Run) -> None:
    folder = request.getfixturevalue(source)
    asked = {} if source == "published" else {"quantization": "mxfp4"}
    with pytest.raises(KernelError) as e:
        LLM(folder, attn_implementation="reference", **asked)
    says = (*SAYS, WAY_OUT[source])
    assert all(part in str(e.value) for part in says)
    words = ["--attn-implementation", "reference", *(w for k, v in asked.items() for w in (f"--{k}", v))]
    for command in (["generate", folder, "x"], ["chat", folder], ["explain", folder], ["explain", folder, "--json"]):
        ran = slipstream(*command, *words, stdin="x\n")
        assert ran.code == 4 and ran.out == "", command
        assert ran.err.count("\n") == 1 and all(part in ran.err for part in says), ran.err


@pytest.mark.usefixtures("old_card")
def test_widening_that_was_asked_for_goes_on(published: Path, slipstream: Run) -> None:
    ran = slipstream("explain", published, "--attn-implementation", "reference", "--quantization", "dequantize")
    assert ran.code == 0 and "mxfp4 widened" in ran.out and "was asked for" in ran.out
