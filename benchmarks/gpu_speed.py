"""How fast one GPU runs known models on random weights of their shapes: decoding, a long prompt, many requests.

Claims of gpt-oss-20b: gpu.decode.b1, b8, b32, b64, b256, gpu.prefill.4096, gpu.serve.256. Of batch 1 as a fraction of the measured
bandwidth of the card: gpu.fraction.llama8b (bfloat16), gpu.fraction.qwen30b (MXFP4), gpu.fraction.120b (which wants 80 GB and more).
It is what `slipstream bench` does, in one process for each model: answers are checked, then timed; `limit` is what the card could do
at the rates measured in the same run, by the formulas of `slipstream.bench.work`.

    python benchmarks/gpu_speed.py 20b [--only decode.b1 prefill.4096]
    python benchmarks/gpu_speed.py llama8b
    python benchmarks/gpu_speed.py tiny --device cpu        # the same script, tried without a GPU; records nothing
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import record

from slipstream.bench.report import Figure
from slipstream.bench.run import Asked, Case, decode_case, prefill_case, run, serve_case

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "20b": ("gpt-oss-20b", {}),
    "120b": ("gpt-oss-120b", {}),
    "llama8b": ("llama-3.1-8b", {}),
    "qwen30b": ("qwen3-30b-a3b", {"quantization": "mxfp4"}),
}
CASES: dict[str, Case] = {
    **{f"decode.b{n}": decode_case(n) for n in (1, 8, 32, 64, 256)},
    "prefill.4096": prefill_case(4096),
    "serve.256": serve_case(256, 1024, 256),
}
TINY: dict[str, Case] = {
    "decode.b1": decode_case(1, 9, 8),
    "decode.b5": decode_case(5, 9, 8),
    "prefill.40": prefill_case(40),
    "serve.6": serve_case(6, 20, 8),
}
PACKAGES = ("torch", "triton")


def kept(figure: Figure) -> dict[str, Any]:
    """What a record says beside value and limit."""
    more = {name: round(value, 2) for name, value in figure.more.items() if name not in ("bytes", "flops")}
    return {
        "fraction": round(figure.fraction, 4), "bound_by": figure.bound_by, "runs": [round(r, 2) for r in figure.runs],
        "gb": round(figure.more["bytes"] / 1e9, 3), "tflop": round(figure.more["flops"] / 1e12, 3), **more,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=(*MODELS, "tiny"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(CASES)}; default: all, for 20b")
    asked = parser.parse_args()
    tiny = asked.model == "tiny"
    known = TINY if tiny else CASES
    names = asked.only or (list(known) if asked.model in ("20b", "tiny") else ["decode.b1"])
    if unknown := [n for n in names if n not in known]:
        parser.error(f"--only: there is no {', '.join(unknown)}; there are {', '.join(known)}")
    with tempfile.TemporaryDirectory() as scratch:
        model, options = (scratch, {}) if tiny else MODELS[asked.model]
        if tiny:
            import json

            from gpu_weights import config

            Path(scratch, "config.json").write_text(json.dumps(config("tiny")))
        options = {"device": asked.device, "weights": "random", **options}
        tell = (lambda text: print(text, file=sys.stderr, flush=True)) if tiny else (lambda _: None)
        report = run(Asked(model=model, options=options, tell=tell), [known[n] for n in names])
    machine = report.machine
    rates = {
        "copy_gb_s": round(machine["bandwidth"] / 1e9, 1), "matrices_tflop_s": round(machine["flops"] / 1e12, 1),
        "weights_gib": round(report.plan["bytes"]["weights"] / 2**30, 3), "set": dict(report.chosen),
    }  # fmt: skip
    choices = {c["op"]: c["implementation"] for c in report.plan["choices"]}
    for name, figure in zip(names, report.figures, strict=True):
        more = {**rates, **kept(figure)}
        if tiny:
            print(name, figure.value, figure.unit, figure.limit, more)
        elif asked.model == "20b":
            record(f"gpu.{name}", figure.value, figure.unit, limit=round(figure.limit, 1), versions=PACKAGES, choices=choices,
                   machine=machine["name"], **more)  # fmt: skip
        elif name == "decode.b1":
            more |= {"tokens_per_second": round(figure.value, 1), "tokens_per_second_limit": round(figure.limit, 1)}
            del more["fraction"]
            record(f"gpu.fraction.{asked.model}", figure.fraction, "of the measured bandwidth", limit=1.0, versions=PACKAGES,
                   choices=choices, machine=machine["name"], **more)  # fmt: skip
        else:
            print(name, figure)
    for text in report.notes:
        print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
