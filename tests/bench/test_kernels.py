"""The comparison of one op's candidates: what is wrong is not timed, and what is timed is on the sizes that were asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from slipstream.bench import kernels
from slipstream.bench.kernels import Line, bench_kernels, plot
from slipstream.config import ModelConfig
from slipstream.errors import ConfigError, KernelError, TrustError
from slipstream.ops.sample import Sample
from tests.ops import repositories as repos

CPU = {"device": "cpu", "repeats": 1, "batches": [1, 3]}
OFF = repos.ACTIVATION["__init__.py"].replace("out.copy_(F.silu(gate) * up)", "out.copy_(F.silu(gate) * up + 1)")


def line(lines: tuple[Line, ...], name: str) -> Line:
    return next(found for found in lines if found.name == name)


def test_candidates_of_ours_and_of_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("kernels")
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path / "home"))
    right, wrong = (
        repos.publish(files, tmp_path / name)
        for name, files in (("right", repos.ACTIVATION), ("wrong", {"__init__.py": OFF}))
    )
    pins = repos.pin(tmp_path, right, wrong)
    report = bench_kernels(
        "activation", names=("reference", str(right), str(wrong)), lock=pins["kernels_lock"],
        policy=pins["kernels_policy"], **CPU,
    )  # fmt: skip
    assert [found.name for found in report.timed] == [str(right), "reference"]
    assert set(report.timed[0].seconds) == {1, 3} and all(t > 0 for t in report.timed[0].seconds.values())
    assert report.timed[0].error is not None and report.timed[0].error < 1e-5
    refused = line(report.lines, str(wrong))
    assert "is wrong" in (refused.why or "") and not refused.seconds and (refused.error or 0) > 0.1
    with pytest.raises(TrustError):
        bench_kernels("activation", names=(str(right),), **CPU)


def test_what_cannot_run_here_says_why() -> None:
    report = bench_kernels("norm", **CPU)
    assert [found.name for found in report.timed] == ["torch"]
    assert line(report.lines, "triton").why == "is for CUDA devices"
    assert "kernels-policy.toml" in (line(report.lines, "kernels-community/liger-kernels:LigerRMSNorm").why or "")


@pytest.mark.parametrize(
    ("op", "want"),
    [
        ("norm", {"width": 60}),
        ("activation", {"inner": 28, "kind": "silu"}),
        ("attention", {"heads": 6, "kv_heads": 2, "head_dim": 16}),
        ("moe", {"experts": 5, "top_k": 3, "hidden": 60, "inner": 28, "format": "dense"}),
        ("rotary", {"heads": 6, "kv_heads": 2, "head_dim": 16, "rotated": 16}),
    ],
)
def test_sizes_are_those_of_the_model(op: str, want: dict[str, object]) -> None:
    config = ModelConfig.from_hf(
        {
            "model_type": "qwen3_moe", "hidden_size": 60, "intermediate_size": 44, "num_hidden_layers": 3, "vocab_size": 97,
            "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
            "num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 28, "rms_norm_eps": 1e-6,
        }
    )  # fmt: skip
    report = bench_kernels(op, model=config, **CPU)
    assert report.shape.items() >= want.items()
    other = next(iter({"width", "inner", "heads"} & want.keys()))
    assert bench_kernels(op, model=config, shape={other: 12}, **CPU).shape[other] == 12


def test_times_and_bytes_are_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = kernels.sample

    def sample(op: str, case: object, tokens: int, shape: dict[str, object]) -> Sample:
        asked.append(tokens)
        return real(op, case, tokens, shape)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "sample", sample)
    monkeypatch.setattr(kernels, "seconds", lambda run, device, repeats: 0.5)
    found = bench_kernels("norm", shape={"width": 10}, device="cpu", batches=[2, 5]).timed[0]
    assert asked == [2, 5]
    assert found.bytes_per_second == {2: 2 * 10 * 4 * 4 / 0.5, 5: 5 * 10 * 4 * 4 / 0.5}


def test_mistakes() -> None:
    for options, error, why in (
        ({"op": "linear"}, ConfigError, "there is no 'linear'"),
        ({"op": "norm", "shape": {"inner": 3}}, ConfigError, "norm has no inner; it has width"),
        ({"op": "norm", "names": ("fast",)}, KernelError, "known are triton, torch, reference"),
        ({"op": "norm", "names": ("triton",)}, KernelError, "no candidate can be timed: triton: is for CUDA"),
        ({"op": "norm", "dtype": "int8"}, ConfigError, "dtype: must be one of"),
    ):
        with pytest.raises(error, match=why):
            bench_kernels(**{**CPU, **options})  # type: ignore[arg-type]


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = bench_kernels("norm", names=("torch", "reference"), **CPU)
    plot(report, tmp_path / "norm.png")
    assert (tmp_path / "norm.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ConfigError, match="cannot be written"):
        plot(report, tmp_path / "norm.xyz")


def test_a_picture_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ConfigError, match="slipstream\\[plot\\]"):
        plot(bench_kernels("norm", **CPU), tmp_path / "norm.png")
