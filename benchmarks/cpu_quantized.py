"""SmolLM2-135M on a CPU in bfloat16 and quantized to mxfp4, int8 and int4, in the same run.

Claims: mxfp4.cpu.memory (peak memory while running, of the weights that MXFP4 covers, as a part of what bfloat16 takes for
them; at most 0.35), mxfp4.cpu.decode (tokens a second at batch 1, bfloat16 as the baseline; at least 1.0 times). The
table has for every format: bytes of the weights, perplexity of texts/harbour.txt (windows of 512), tokens a second, peak.

Each format runs in a process of its own, in turn. Peak memory is the process's high-water mark, reset after loading, over
a prompt of 512 tokens, 16 prompts together and 128 decoded tokens; what both hold besides the covered weights cancels out.
Before anything is timed, the folder that `slipstream quantize` wrote must answer as the same format made while loading.

    python benchmarks/cpu_quantized.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cpu_decode import ENVIRONMENT, MODEL, prompts, timed, write_folder
from record import record

TEXT = Path(__file__).parent / "texts/harbour.txt"
FORMATS = ("bf16", "mxfp4", "int8", "int4")


def work(path: str) -> dict[str, Any]:
    from slipstream import LLM, SamplingParams
    from slipstream.evaluation import perplexity

    llm = LLM(path, max_model_len=1024, kv_cache_memory_bytes=1 << 28)
    greedy = SamplingParams(max_new_tokens=32, temperature=0, ignore_eos=True)
    answer = llm.generate([prompts(1, 40)[0]], greedy)[0].outputs[0].token_ids

    def generate(ids: list[int], new: int) -> None:
        params = SamplingParams(max_new_tokens=new, temperature=0, ignore_eos=True)
        assert len(llm.generate([ids], params)[0].outputs[0].token_ids) == new

    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    generate(prompts(1, 512)[0], 1)
    llm.generate(prompts(16, 24), greedy)
    generate(prompts(1, 32)[0], 128)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    covered = [i for i in llm.plan.loads if i.held in FORMATS]
    return {
        "answer": list(answer),
        "peak": peak,
        "weights": llm.plan.weights_bytes,
        "covered": sum(2 * s[0] * s[1] for i in covered for s in [i.shape]),
        "perplexity": perplexity(llm, TEXT.read_text()),
        "choices": {c.op: c.name for c in llm.plan.choices},
        **timed(generate),
    }


def load_time_answer(path: str, made: str) -> list[int]:
    from slipstream import LLM, SamplingParams

    llm = LLM(path, quantization=made, max_model_len=1024, kv_cache_memory_bytes=1 << 28)
    params = SamplingParams(max_new_tokens=32, temperature=0, ignore_eos=True)
    return list(llm.generate([prompts(1, 40)[0]], params)[0].outputs[0].token_ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        print(json.dumps(work(asked.worker)))
        return

    from slipstream import quantize
    from slipstream.sources import resolve

    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in FORMATS}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in FORMATS}
        folders["bf16"].mkdir()
        write_folder(resolve(MODEL), folders["bf16"])
        for name in FORMATS[1:]:
            quantize(folders["bf16"], folders[name], to=name)
        same = {name: load_time_answer(str(folders["bf16"]), name) for name in FORMATS[1:]}
        for _ in range(asked.rounds):
            for name in FORMATS:
                command = [sys.executable, __file__, "--worker", str(folders[name])]
                done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
                if done.returncode:
                    raise SystemExit(done.stderr)
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    for name, answer in same.items():
        if runs[name][0]["answer"] != answer:
            raise SystemExit(f"{name}: the folder answers {runs[name][0]['answer']}, made while loading {answer}")

    def median(name: str, what: str) -> float:
        return statistics.median(r[what] for r in runs[name])

    table = {
        name: {
            "weights_bytes": runs[name][0]["weights"],
            "perplexity": round(runs[name][0]["perplexity"], 3),
            "decode_tok_s": round(median(name, "decode"), 2),
            "prefill_tok_s": round(median(name, "prefill"), 1),
            "peak_bytes": int(median(name, "peak")),
        }
        for name in FORMATS
    }
    if table["mxfp4"]["perplexity"] > 1.5 * table["bf16"]["perplexity"]:
        raise SystemExit(f"mxfp4 has lost the text: {table}")
    print(f"{'format':8}{'weights MB':>12}{'perplexity':>12}{'decode tok/s':>14}{'prefill tok/s':>15}{'peak MB':>10}")
    for name, row in table.items():
        print(
            f"{name:8}{row['weights_bytes'] / 1e6:12.1f}{row['perplexity']:12.2f}{row['decode_tok_s']:14.1f}"
            f"{row['prefill_tok_s']:15.0f}{row['peak_bytes'] / 1e6:10.0f}"
        )
    common: dict[str, Any] = {"versions": ("torch",), "family": "cpu", "table": table}
    covered = runs["mxfp4"][0]["covered"]
    held = median("mxfp4", "peak") - (median("bf16", "peak") - covered)
    record("mxfp4.cpu.memory", held / covered, "of bfloat16", limit=round(17 / 64, 4), covered_bfloat16_bytes=covered,
           choices=runs["mxfp4"][0]["choices"], **common)  # fmt: skip
    decode, baseline = median("mxfp4", "decode"), median("bf16", "decode")
    record("mxfp4.cpu.decode", decode, "tok/s", baseline={"bfloat16": round(baseline, 2)}, ratio=decode / baseline,
           choices=runs["mxfp4"][0]["choices"], **common)  # fmt: skip
    if held / covered > 0.35 or decode < baseline:
        raise SystemExit("below what is claimed: 0.35 of the memory, and at least bfloat16's speed")


if __name__ == "__main__":
    main()
