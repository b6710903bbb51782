"""A Triton kernel repository used in gpt-oss through the path of hub kernels, and measured beside our own kernels.

Writes a repository with a Triton RMSNorm (`rms_norm_fn`, with the addition) and the activation of gpt-oss, pins it, and runs random
gpt-oss-20b shapes in MXFP4 with it:

- hub.proof: calls of the norm in a generation, counted as `explain --used` does, through CUDA graphs. Weights are still MXFP4, all
  other choices are as without it, and greedy tokens are compared with those of our own kernels.
- hub.norm and hub.activation: microseconds a call at batch 1 to 256, its and ours, each checked against the reference first. The
  picture is docs/hub_kernel.png. In the model itself our experts' kernel has the activation inside, so there is no call of one.

    python benchmarks/hub_kernel.py                            # wants `kernels`; and matplotlib for the pictures
    python benchmarks/hub_kernel.py --draw                     # the pictures alone, from the records
    python benchmarks/hub_kernel.py --device cpu --tiny        # the same script, tried without a GPU; records nothing
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from base64 import b64encode
from dataclasses import asdict
from pathlib import Path
from typing import Any

from record import ROOT, record

from slipstream import LLM, SamplingParams
from slipstream.bench.kernels import KernelReport, Line, bench_kernels, plot
from slipstream.cli.main import run as command
from slipstream.errors import ConfigError

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PACKAGES = ("torch", "triton", "kernels")
TRITON = """
import torch
import triton
import triton.language as tl


@triton.jit
def _norm(x, residual, weight, total, out, width, eps, SIZE: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    real = at < width
    h = tl.load(x + row * width + at, mask=real, other=0).to(tl.float32)
    if residual is not None:
        h += tl.load(residual + row * width + at, mask=real, other=0).to(tl.float32)
        h = h.to(total.dtype.element_ty)
        tl.store(total + row * width + at, h, mask=real)
        h = h.to(tl.float32)
    h *= tl.rsqrt(tl.sum(h * h) / width + eps)
    h *= tl.load(weight + at, mask=real, other=0).to(tl.float32)
    tl.store(out + row * width + at, h.to(out.dtype.element_ty), mask=real)


def rms_norm_fn(x, weight, bias=None, residual=None, eps=1e-6, prenorm=False):
    width = x.shape[-1]
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    out, total = torch.empty_like(x), None if residual is None else torch.empty_like(residual)
    size = triton.next_power_of_2(width)
    if x.numel():
        warps = max(1, min(8, size // 512))
        _norm[(x.numel() // width,)](x, residual, weight, total, out, width, eps, SIZE=size, num_warps=warps)
    return (out, x if total is None else total) if prenorm else out


@triton.jit
def _gate(x, out, inner, limit, SIZE: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    gate = tl.load(x + row * 2 * inner + at, mask=at < inner).to(tl.float32)
    up = tl.load(x + row * 2 * inner + inner + at, mask=at < inner).to(tl.float32)
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + row * inner + at, (gate * tl.sigmoid(1.702 * gate) * (up + 1)).to(out.dtype.element_ty), mask=at < inner)


def swiglu_clamped_and_mul(out, x, limit):
    inner = out.shape[-1]
    if out.numel():
        _gate[(out.numel() // inner, triton.cdiv(inner, 1024))](x, out, inner, limit, SIZE=1024)
    return out
"""
PLAIN = """
import torch


def rms_norm_fn(x, weight, bias=None, residual=None, eps=1e-6, prenorm=False):
    total = x if residual is None else x + residual
    y = total.float() * torch.rsqrt(total.float().square().mean(-1, keepdim=True) + eps)
    y = (y * weight.float()).to(x.dtype)
    return (y, total) if prenorm else y


def swiglu_clamped_and_mul(out, x, limit):
    gate, up = x.chunk(2, -1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return out.copy_(gate * torch.sigmoid(1.702 * gate) * (up + 1))
"""  # what the script is tried with where there is no GPU


def publish(folder: Path, device: str) -> Path:
    """A repository as kernel-builder lays it out, with one build."""
    text = TRITON if device == "cuda" else PLAIN
    metadata = {
        "name": "slipstream-demo", "id": "_slipstream_demo_1", "version": 1, "license": "Apache-2.0", "python-depends": [],
        "backend": {"type": device},
        "digest": {
            "algorithm": "sha256", "files": {"__init__.py": b64encode(hashlib.sha256(text.encode()).digest()).decode()}
        },
    }  # fmt: skip
    build = folder / "build" / f"torch-{device}"
    build.mkdir(parents=True)
    (build / "__init__.py").write_text(text)
    (build / "metadata.json").write_text(json.dumps(metadata))
    return folder.resolve()


def generate(model: str, options: dict[str, Any], count: int) -> tuple[LLM, list[list[int]]]:
    llm = LLM(model, **options)
    if llm.plan.ops.used is not None:
        llm.plan.ops.used.calls.clear()
    vocab = llm.model_config.vocab_size
    prompts = [[(31 * i + 7 * j) % vocab for j in range(24)] for i in range(4)]
    outputs = llm.generate(prompts, SamplingParams(max_new_tokens=count, temperature=0, ignore_eos=True))
    return llm, [o.outputs[0].token_ids for o in outputs]


def prove(model: str, options: dict[str, Any], repository: Path, pins: dict[str, str], count: int) -> dict[str, Any]:
    """What ran with the repository's norm, and what else is as it was."""
    options = {
        **options,
        "weights": "random",
        "seed": 0,
        "kv_cache_memory_bytes": 1 << 30,
    }  # both fit beside each other
    llm, tokens = generate(model, {**options, **pins, "kernels": {"norm": str(repository)}, "count_calls": True}, count)
    plan = llm.plan.to_dict()
    assert llm.plan.ops.used is not None
    calls = {f"{op}[{Path(name).name}]": n for (op, name), n in sorted(llm.plan.ops.used.calls.items())}
    source, layers = next(c.source for c in llm.plan.choices if c.op == "norm"), llm.model_config.num_layers
    plain, expected = generate(model, options, count)
    ours = plain.plan.to_dict()
    different = [
        a["op"]
        for a, b in zip(plan["choices"], ours["choices"], strict=True)
        if a["implementation"] != b["implementation"]
    ]
    if (
        different != ["norm"]
        or plan["weights"] != ours["weights"]
        or plan["why"].get("cuda_graphs") != ours["why"].get("cuda_graphs")
    ):
        raise SystemExit(
            f"the repository's norm changed more than the norm: {different}, {plan['weights']}, {plan['why']}"
        )
    if "mxfp4" not in {w["held"] for w in plan["weights"]}:
        raise SystemExit(f"no weight is held in MXFP4: {plan['weights']}")
    norm = next(n for name, n in calls.items() if name.startswith("norm["))
    steps, rest = divmod(norm, 2 * layers + 1)
    if rest or steps < count:
        raise SystemExit(
            f"the norm was called {norm} times, which is not {2 * layers + 1} in each of {count} steps or more"
        )
    same = sum(x == y for a, b in zip(tokens, expected, strict=True) for x, y in zip(a, b, strict=True))
    return {
        "calls": calls, "steps": steps, "source": source, "held": sorted({w["held"] for w in plan["weights"]}),
        "cuda_graphs": plan["why"].get("cuda_graphs", "no"), "same_tokens": same, "tokens": sum(map(len, tokens)),
        "first_different": [next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
                            for a, b in zip(tokens, expected, strict=True)],
    }  # fmt: skip


def compare(
    op: str, names: list[str], asked: argparse.Namespace, pins: dict[str, str], shape: dict[str, Any]
) -> KernelReport:
    report = bench_kernels(
        op, names=names, shape=shape, device=asked.device, batches=BATCHES, lock=pins["kernels_lock"],
        policy=pins["kernels_policy"], repeats=3 if asked.tiny else 50,
    )  # fmt: skip
    for line in report.lines:
        if line.why is not None:
            raise SystemExit(f"{op}: {line.name} was not timed: {line.why}")
    return report


def draw() -> None:
    """The pictures, from the last records."""
    lines = (ROOT / "benchmarks/results/hub.jsonl").read_text().splitlines()
    last = {found["claim"]: found for found in map(json.loads, lines)}
    for op, name in (("norm", "hub_kernel.png"), ("activation", "hub_kernel_activation.png")):
        found = last[f"hub.{op}"]
        timed = tuple(
            Line(name, "", found["errors"][name], {int(b): t / 1e6 for b, t in times.items()})
            for name, times in found["microseconds"].items()
        )
        plot(KernelReport(op, found["machine"], "cuda", found["dtype"], found["shape"], 0, timed), ROOT / "docs" / name)


def short(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--model", default="gpt-oss-20b", help="whose shapes are used")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, and records nothing")
    parser.add_argument("--draw", action="store_true", help="only draw docs/hub_kernel*.png from the last records")
    asked = parser.parse_args()
    if asked.draw:
        draw()
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        repository = publish(folder / "slipstream-demo", asked.device)
        pins = {"kernels_lock": str(folder / "kernels.lock"), "kernels_policy": str(folder / "kernels-policy.toml")}
        files = ["--lock", pins["kernels_lock"], "--policy", pins["kernels_policy"]]
        if command(["kernels", "lock", str(repository), *files, "--yes"]):
            raise SystemExit("the repository could not be pinned")
        model, options = asked.model, {"device": asked.device}
        if asked.tiny:
            from gpu_weights import config

            model = str(folder / "model")
            Path(model).mkdir()
            Path(model, "config.json").write_text(json.dumps(config("tiny")))
        proof = prove(model, options, repository, pins, 8 if asked.tiny else 64)
        own = ("triton", "triton") if asked.device == "cuda" else ("torch", "reference")
        norm = compare("norm", [str(repository), own[0]], asked, pins, {"width": 64 if asked.tiny else 2880})
        act = compare(
            "activation", [str(repository), own[1]], asked, pins,
            {"inner": 64 if asked.tiny else 2880, "kind": "swiglu_clamped"},
        )  # fmt: skip
    print(json.dumps({"proof": proof, "norm": asdict(norm), "activation": asdict(act)}, indent=1, default=str))
    if asked.tiny:
        return
    about: dict[str, Any] = {"versions": PACKAGES, "machine": norm.hardware, "family": "hub"}
    total = sum(n for name, n in proof["calls"].items() if name.startswith("norm["))
    record("hub.proof", total, "calls of the repository's norm", **about, **proof)
    for report in (norm, act):
        theirs, ours = report.lines
        middle = 64
        record(
            f"hub.{report.op}", theirs.seconds[middle] * 1e6, f"us a call at batch {middle}", **about,
            baseline={ours.name: round(ours.seconds[middle] * 1e6, 3)}, ratio=ours.seconds[middle] / theirs.seconds[middle],
            shape=dict(report.shape), dtype=report.dtype, choices={report.op: theirs.source},
            microseconds={short(x.name): {b: round(t * 1e6, 3) for b, t in x.seconds.items()} for x in report.lines},
            errors={short(x.name): x.error for x in report.lines},
        )  # fmt: skip
    try:
        draw()
    except ConfigError as e:
        print(f"{e}; --draw makes the pictures from the records, on any machine")


if __name__ == "__main__":
    main()
