"""Two cards that share a model against one of them, on random weights of known shapes.

Claims: parallel.tp2.b1 and parallel.tp2.b64 (decoding gpt-oss-120b at batch 1 and 64), parallel.tp2.b256 (beside what expert
parallelism gives), parallel.tp2.bytes.120b and .20b (the part of the weights that the fuller of two ranks holds). The baseline is one
card, measured in the same run by the same code; `limit` is twice what one card allows. Two ranks and one have to give the same tokens
for a small checkpoint before anything is timed: random weights are drawn by each rank for itself, and say nothing of that.
Not tried on cards yet.

    python benchmarks/parallel.py 120b [--only decode.b1 decode.b64]
    python benchmarks/parallel.py 20b --only bytes
    python benchmarks/parallel.py tiny --device cpu        # the same script, tried without a GPU; records nothing
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu_load import write_tokenizer
from gpu_speed import PACKAGES, kept
from gpu_weights import config, write
from record import record

from slipstream import LLM, SamplingParams
from slipstream.bench.report import Report
from slipstream.bench.run import Asked, Case, decode_case, run

MODELS = {"120b": "gpt-oss-120b", "20b": "gpt-oss-20b"}
CASES: dict[str, Case] = {f"decode.b{n}": decode_case(n) for n in (1, 64, 256)}
TINY: dict[str, Case] = {"decode.b1": decode_case(1, 9, 8), "decode.b5": decode_case(5, 9, 8)}
MOST_BYTES = 0.53  # of one rank's, in the fuller of two
LEAST = {"decode.b1": 1.25, "decode.b64": 1.5}  # times one card, for 120b
SIZE = 2


def check(folder: Path, device: str) -> None:
    """The same tokens from one rank and from two, in float32."""
    write(folder, "tiny", "cpu")
    write_tokenizer(folder, config("tiny")["vocab_size"])
    prompts = [[(31 * i + 7 * j) % 900 + 20 for j in range(3 + 11 * i)] for i in range(5)]
    params = SamplingParams(temperature=0, max_new_tokens=24, ignore_eos=True)
    found = []
    for size in (1, SIZE):
        llm = LLM(folder, device=device, dtype="float32", tensor_parallel_size=size, max_model_len=256)
        found.append([o.outputs[0].token_ids for o in llm.generate(prompts, params)])
        del llm
    if found[0] != found[1]:
        raise SystemExit(f"{SIZE} ranks give other tokens than one: {found}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=(*MODELS, "tiny"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of bytes, {', '.join(CASES)}")
    asked = parser.parse_args()
    tiny = asked.model == "tiny"
    known = TINY if tiny else CASES
    names = asked.only or ["bytes", *known]
    if unknown := [n for n in names if n not in known and n != "bytes"]:
        parser.error(f"--only: there is no {', '.join(unknown)}; there are bytes, {', '.join(known)}")
    cases = [n for n in names if n != "bytes"] or [next(iter(known))]
    with tempfile.TemporaryDirectory() as scratch:
        small = Path(scratch, "small")
        small.mkdir()
        check(small, asked.device)
        if tiny:
            Path(scratch, "config.json").write_text(json.dumps(config("tiny")))
        model = scratch if tiny else MODELS[asked.model]
        one, two = (_measure(model, asked.device, size, [known[n] for n in cases]) for size in (1, SIZE))
    part = two.plan["bytes"]["weights"] / one.plan["bytes"]["weights"]
    common: dict[str, Any] = {
        "versions": PACKAGES, "choices": {c["op"]: c["implementation"] for c in two.plan["choices"]},
        "machine": f"{SIZE} x {two.machine['name']}",
    }  # fmt: skip
    if "bytes" in names:
        more = {"gib": [round(r.plan["bytes"]["weights"] / 2**30, 3) for r in (one, two)]}
        if tiny:
            print("bytes", part, more)
        else:
            record(
                f"parallel.tp{SIZE}.bytes.{asked.model}",
                part,
                "of one rank's weights",
                limit=1 / SIZE,
                **common,
                **more,
            )
            print(f"bytes: {part:.3f}, at most {MOST_BYTES}: {'yes' if part <= MOST_BYTES else 'NO'}", file=sys.stderr)
    for name, mine, theirs in zip(cases, two.figures, one.figures, strict=True):
        if name not in names:
            continue
        ratio, claim = mine.value / theirs.value, f"parallel.tp{SIZE}.{name.removeprefix('decode.')}"
        if tiny:
            print(claim, mine.value, mine.unit, f"one rank: {theirs.value}", f"{ratio:.2f}x", kept(mine))
            continue
        claim += "" if asked.model == "120b" else f".{asked.model}"
        record(claim, mine.value, mine.unit, limit=round(SIZE * theirs.limit, 1), ratio=ratio,
               baseline={"one card": round(theirs.value, 2)}, runs=[round(r, 2) for r in mine.runs], **common)  # fmt: skip
        if asked.model == "120b" and name in LEAST:
            print(
                f"{name}: {ratio:.2f}x, at least {LEAST[name]}: {'yes' if ratio >= LEAST[name] else 'NO'}",
                file=sys.stderr,
            )
    for text in {*one.notes, *two.notes}:
        print(text, file=sys.stderr)


def _measure(model: str, device: str, size: int, cases: list[Case]) -> Report:
    options = {"device": device, "weights": "random", "tensor_parallel_size": size}
    return run(Asked(model=model, options=options, tell=lambda text: print(text, file=sys.stderr, flush=True)), cases)


if __name__ == "__main__":
    main()
