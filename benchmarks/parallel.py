"""Two cards that share a model against one of them, on random weights of known shapes. One command, 240 seconds of two H200s.

Claims: parallel.tp2.b1, parallel.tp2.b64 (decoding gpt-oss-120b), parallel.tp2.b256 and parallel.ep2.b256 (experts cut, and experts
spread, with how even their load was), parallel.tp2.bytes.120b and .20b (the part of the weights that the fuller of two ranks holds).
Of one card alone: gpu.fraction.120b. parallel.sums.b1 to b256: microseconds of a sum over both cards with the norm that follows. The
baseline is one card, measured in the same run by the same code; `limit` is twice what one card allows. Two ranks and one have to give
the same tokens for a small checkpoint before anything is timed: random weights say nothing of that.

    python benchmarks/parallel.py [--only check bytes sums 120b.one 120b.tp 120b.ep] [--seconds 235]
    python benchmarks/parallel.py --tiny --device cpu        # the same script, tried without a GPU; records nothing

Every part is a process of its own: one that fails or takes too long is told of, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from gpu_load import write_tokenizer
from gpu_speed import PACKAGES
from gpu_weights import config, write
from record import record

SIZE = 2
PARTS = ("check", "bytes", "sums", "120b.one", "120b.tp", "120b.ep")
BATCHES = {"120b.one": (1, 64, 256), "120b.tp": (1, 64, 256), "120b.ep": (256,)}
TINY_BATCHES = {"120b.one": (1, 5), "120b.tp": (1, 5), "120b.ep": (5,)}
SECONDS = {"check": 70, "bytes": 40, "sums": 40, "120b.one": 90, "120b.tp": 90, "120b.ep": 70}
MOST_BYTES = 0.53  # of one rank's, in the fuller of two
LEAST = {1: 1.25, 64: 1.5}  # times one card
Told = dict[str, Any]


# -- in a part's process: one line of JSON for each thing that is known -------------------------------------------------


def tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def check(asked: argparse.Namespace) -> None:
    """The same tokens from one rank and from two, in float32."""
    from slipstream import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(folder, "tiny", "cpu")
        write_tokenizer(folder, config("tiny")["vocab_size"])
        prompts = [[(31 * i + 7 * j) % 900 + 20 for j in range(3 + 11 * i)] for i in range(5)]
        params = SamplingParams(temperature=0, max_new_tokens=24, ignore_eos=True)
        few = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 128, "dtype": "float32"}
        want = None
        for more in ({}, {"tensor_parallel_size": SIZE}):
            began = time.perf_counter()
            llm = LLM(folder, device=asked.device, **few, **more)
            ready = time.perf_counter() - began
            found = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
            want = want or found
            tell(
                options=more,
                same=found == want,
                ready_s=round(ready, 1),
                sums={c.op: c for c in llm.plan.choices}["reduce"].name if more else None,
            )
            if found != want:
                raise SystemExit(f"{more} gives other tokens than one rank: {found} and {want}")
            del llm


def weigh(asked: argparse.Namespace) -> None:
    """Bytes of weights, as planned: nothing is loaded."""
    from slipstream.checkpoint.open import open_random
    from slipstream.config import EngineConfig
    from slipstream.parallel.shares import Ranks
    from slipstream.plan import make_plan
    from slipstream.plan.layout import lay_out
    from slipstream.plan.shards import sharing
    from slipstream.sources import resolve

    for name in ("20b", "120b"):
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) if asked.tiny else resolve(f"gpt-oss-{name}", weights=False)
            if asked.tiny:
                Path(scratch, "config.json").write_text(json.dumps(config("tiny")))
            options = EngineConfig(device=asked.device, weights="random", max_model_len=4096)
            one = make_plan(options, open_random(path)).weights_bytes
            shared = sharing(lay_out(options, open_random(path), None, Ranks(0, SIZE), None))
            tell(model=name, one=one, ranks=[shared.weights(r) for r in range(SIZE)])


def measure(asked: argparse.Namespace) -> None:
    """Decoding at all batch sizes of a part, by the code of `slipstream bench decode`."""
    from slipstream import LLM
    from slipstream.bench.machine import measure_machine
    from slipstream.bench.measure import Slipstream, Workload
    from slipstream.bench.run import decode_case, settle
    from slipstream.bench.work import decode_work
    from slipstream.config import ModelConfig
    from slipstream.sources import resolve

    batches = (TINY_BATCHES if asked.tiny else BATCHES)[asked.part]
    length, new = (9, 8) if asked.tiny else (128, 128)
    cases = [decode_case(n, length, new, 3 if n < 256 else 2) for n in batches]
    options: dict[str, Any] = {"device": asked.device, "weights": "random"}
    if not asked.part.endswith("one"):
        options |= {"tensor_parallel_size": SIZE, "enable_expert_parallel": asked.part.endswith("ep")}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) if asked.tiny else resolve("gpt-oss-120b", weights=False)
        known = config("tiny" if asked.tiny else "120b")
        if asked.tiny:
            Path(scratch, "config.json").write_text(json.dumps(known))
        options, _ = settle(options, ModelConfig.from_hf(known), cases)
        began = time.perf_counter()
        llm = LLM(path, **options)
    plan = llm.plan
    tell(ready_s=round(time.perf_counter() - began, 1), weights=plan.weights_bytes, why=plan.why,
         choices={c.op: c.name for c in plan.choices},
         why_not={n: w for c in plan.choices if c.op == "reduce" for n, w in c.rejected})  # fmt: skip
    for n, case in zip(batches, cases, strict=True):
        say = lambda text: print(f"{asked.part}: {text}", file=sys.stderr, flush=True)  # noqa: E731
        runs, _ = case.time(Workload(Slipstream(llm), case.input_len, say))
        work = decode_work(plan, n, length + (new + 1) / 2)
        tell(batch=n, runs=runs, bytes=work.bytes, flops=work.flops)
    if plan.asked.enable_expert_parallel:
        tell(load=_evenness(llm))
    if options.get("tensor_parallel_size") is None:
        machine = measure_machine(plan.hardware.name, plan.device, plan.dtype)
        tell(machine=machine.name, bandwidth=machine.bandwidth, matrices=machine.flops)


def _evenness(llm: Any) -> dict[str, float]:
    """Of the pairs of a token and an expert: how much more than its even part the busiest rank, and the busiest expert, had."""
    layers = [counts for counts in llm.engine.expert_load().values() if sum(counts)]
    half = len(layers[0]) // SIZE
    ranks = [SIZE * max(sum(c[:half]), sum(c[half:])) / sum(c) for c in layers]
    return {"busiest_rank": round(statistics.mean(ranks), 3),
            "busiest_expert": round(statistics.mean(len(c) * max(c) / sum(c) for c in layers), 2)}  # fmt: skip


# -- in the process that was started -----------------------------------------------------------------------------------


def run(part: str, asked: argparse.Namespace, seconds: float) -> list[Told]:
    """What a part tells in this time."""
    words = [sys.executable, __file__, "--part", part, "--device", asked.device, *["--tiny"] * asked.tiny]
    # NVLink multicast stays off on shared hosts, whoever starts this.
    off = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
    if part == "sums":
        words = [sys.executable, str(Path(__file__).with_name("sums.py"))]
    began = time.monotonic()
    child = subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, env={**off, **os.environ}, start_new_session=True
    )
    told: list[Told] = []
    late = threading.Timer(max(1.0, seconds), lambda: os.killpg(child.pid, signal.SIGKILL))
    late.start()
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("{"):
            told.append(json.loads(line))
        else:
            print(line, end="", file=sys.stderr)
    code = child.wait()
    late.cancel()
    took = time.monotonic() - began
    print(f"{part}: ended with {code} after {took:.0f} s", file=sys.stderr, flush=True)
    if code:
        told.append({"failed": f"ended with {code} after {took:.0f} of {seconds:.0f} s"})
    return told


def of(told: list[Told], name: str) -> dict[str, Any]:
    """All that was told beside `name`."""
    return next((t for t in told if name in t), {})


def report(told: dict[str, list[Told]], tiny: bool) -> bool:
    """Write the records; whether all that was asked for is there and reaches its mark."""
    good = True
    kept: dict[str, Any] = {
        "versions": PACKAGES,
        "machine": None if tiny else f"{SIZE} x {torch.cuda.get_device_name()}",
    }

    def write_down(claim: str, value: float, unit: str, **more: Any) -> None:
        if tiny:
            print(claim, round(value, 3), unit, more)
        else:
            record(claim, value, unit, **kept, **more)

    def mark(what: str, reached: bool) -> None:
        nonlocal good
        good = good and (reached or tiny)
        print(f"{what}: {'yes' if reached else 'NO'}", file=sys.stderr)

    for line in told.get("bytes", []):
        if "model" in line:
            value, name = max(line["ranks"]) / line["one"], line["model"]
            gib = [round(n / 2**30, 3) for n in (line["one"], *line["ranks"])]
            write_down(f"parallel.tp{SIZE}.bytes.{name}", value, "of one rank's weights", limit=1 / SIZE, gib=gib)
            mark(f"bytes of {name}: {value:.3f}, at most {MOST_BYTES}", value <= MOST_BYTES)
    for line in told.get("sums", []):
        print(f"sums over {SIZE} cards: {line}", file=sys.stderr)
        for rows, us in line.get("us", {}).items():
            if ours := us.get("shared memory, with norm"):
                nccl = us["nccl and norm"]
                write_down(
                    f"parallel.sums.b{rows}", ours, "us", baseline={"NCCL, then the norm": nccl}, ratio=nccl / ours
                )
    one, tp, ep = ({t["batch"]: t for t in told.get(f"120b.{n}", []) if "batch" in t} for n in ("one", "tp", "ep"))
    machine = of(told.get("120b.one", []), "bandwidth")
    if machine and 1 in one and not tiny:  # one card alone is a claim of its own
        rate, least = statistics.median(one[1]["runs"]), one[1]["bytes"] / machine["bandwidth"]
        more = {"tokens_per_second": round(rate, 1), "tokens_per_second_limit": round(1 / least, 1)}
        more["runs"] = [round(r, 2) for r in one[1]["runs"]]
        choices = of(told["120b.one"], "choices")["choices"]
        record("gpu.fraction.120b", rate * least, "of the measured bandwidth", limit=1.0, versions=PACKAGES,
               machine=machine["machine"], choices=choices, **more)  # fmt: skip
    for kind, found in (("tp", tp), ("ep", ep)):
        about = of(told.get(f"120b.{kind}", []), "choices")
        for n, line in found.items():
            value, more = statistics.median(line["runs"]), {"runs": [round(r, 2) for r in line["runs"]]}
            baseline = {"one card": statistics.median(one[n]["runs"])} if n in one else {}
            if kind == "ep" and n in tp:
                baseline["experts cut"] = statistics.median(tp[n]["runs"])
                more["load"] = of(told["120b.ep"], "load").get("load")
            ratio = value / baseline["one card"] if n in one else None
            if n in one and machine:
                seconds = max(one[n]["bytes"] / machine["bandwidth"], one[n]["flops"] / machine["matrices"])
                more["limit"] = round(SIZE * n / seconds, 1)
            write_down(f"parallel.{kind}{SIZE}.b{n}", value, "tok/s", baseline={k: round(v, 2) for k, v in baseline.items()},
                       ratio=ratio, choices=about.get("choices"), **more)  # fmt: skip
            if kind == "tp" and ratio is not None and n in LEAST:
                mark(f"batch {n}: {ratio:.2f}x one card, at least {LEAST[n]}", ratio >= LEAST[n])
    for part, lines in told.items():
        if why := of(lines, "failed").get("failed"):
            mark(f"{part} {why}", False)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes; nothing is recorded")
    parser.add_argument(
        "--only", nargs="+", metavar="PART", choices=PARTS, default=PARTS, help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument("--seconds", type=float, default=235, help="for all of it; what finds no more time is left out")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.part:
        {"check": check, "bytes": weigh}.get(asked.part, measure)(asked)
        sys.stdout.flush()
        os._exit(0)  # all is told: no time of two cards is spent on leaving in order
    end = time.monotonic() + asked.seconds
    told: dict[str, list[Told]] = {}

    def take(part: str) -> None:
        left = end - time.monotonic()
        told[part] = run(part, asked, min(left, SECONDS[part])) if left > 10 else [{"failed": "found no more time"}]

    weighing = threading.Thread(target=take, args=("bytes",))  # beside the others, as it wants no card's time
    if "bytes" in asked.only:
        weighing.start()
    for part in asked.only:
        if part == "bytes" or (part == "sums" and asked.tiny):  # those are of cards alone
            continue
        take(part)
        if part == "check" and of(told[part], "failed"):
            report(told, asked.tiny)
            raise SystemExit("two ranks and one do not agree, so nothing is timed")
    if "bytes" in asked.only:
        weighing.join()
    if not report(told, asked.tiny):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
