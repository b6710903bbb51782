"""Continuous batching on a CPU: 100 prompts, answers of 16 to 256 tokens, SmolLM2-135M in bfloat16.

Claims, both of tokens a second of `llm.generate_batch` (with the baseline's beside it, from the same run):

- batching.cpu.static: against static batching of ours. The same LLM and as many prompts at once, in the order given; a
  batch ends when its longest answer does, and each row is computed to that length. Only what was asked for is
  counted. Prompts are not padded, so it is static batching at its best.
- batching.cpu.transformers: against transformers' continuous batching of the same weights. `model.generate_batch` has one
  length for all, so the requests go to its manager, as `generate_batch` does it, each with its own length. Settings
  are those that were fastest on 2 cores: paged sdpa, which looks from every query at the keys of every request, so
  that more requests at once are slower (--peer-seqs); small blocks; no look-up of shared blocks; enough blocks for all.

Before anything is timed: in float32, the tokens of continuous batching are those of static batching and of each prompt
alone. Of the timed runs, each answer must have its length, and first tokens must agree (bfloat16 rounds by shape of
batch, so answers part somewhere; how far they agree is in the record). Each side runs in processes of its own,
in turn; the peer, which takes longest, in fewer of the rounds.

    python benchmarks/batching.py [--rounds 3] [--peer-rounds 1] [--prompts 100] [--max-num-seqs 64] [--peer-seqs 16]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpu_decode import ENVIRONMENT, MODEL, write_folder
from record import record

if TYPE_CHECKING:
    from slipstream import LLM, SamplingParams

TEXT = Path(__file__).parent / "texts/harbour.txt"
SHORTEST, LONGEST = 16, 256  # answers, tokens
PROMPTS = (16, 128)  # their lengths, tokens
CHECKED = 10  # prompts compared in float32, of so many tokens each at most:
CHECKED_TOKENS = 40
AGREE = 0.9  # share of first tokens that must be those of the peer; rounding decides the others

Jobs = list[tuple[list[int], int]]  # prompt, new tokens


def make_jobs(count: int, folder: str) -> Jobs:
    """Pieces of one text, each beginning somewhere else, so that no two share a page of the cache."""
    from slipstream.tokenizer import Tokenizer

    ids = Tokenizer.from_folder(folder).encode(TEXT.read_text(encoding="utf-8"))
    source = random.Random(0)
    starts = source.sample(range(len(ids) - PROMPTS[1]), count)
    return [(ids[s : s + source.randint(*PROMPTS)], source.randint(SHORTEST, LONGEST)) for s in starts]


def params(new: int) -> SamplingParams:
    from slipstream import SamplingParams

    return SamplingParams(max_new_tokens=new, temperature=0, ignore_eos=True)


def continuous(llm: LLM, jobs: Jobs) -> list[list[int]]:
    outputs = llm.generate_batch([p for p, _ in jobs], [params(new) for _, new in jobs], progress=False)
    return [o.outputs[0].token_ids for o in outputs]


def static(llm: LLM, jobs: Jobs) -> list[list[int]]:
    answers = []
    size = llm.plan.max_num_seqs
    for part in (jobs[i : i + size] for i in range(0, len(jobs), size)):
        outputs = llm.generate([p for p, _ in part], params(max(new for _, new in part)))
        answers += [o.outputs[0].token_ids[:new] for o, (_, new) in zip(outputs, part, strict=True)]
    return answers


def alone(llm: LLM, jobs: Jobs) -> list[list[int]]:
    return [llm.generate([p], params(new))[0].outputs[0].token_ids for p, new in jobs]


def check(path: str, jobs: Jobs) -> None:
    """In float32, where nothing is near enough to a tie for rounding to decide it."""
    from slipstream import LLM

    few = [(p, min(new, CHECKED_TOKENS)) for p, new in jobs[:CHECKED]]
    # Not all at once, and prompts in pieces; nothing found in the cache that another way has put there.
    llm = LLM(path, dtype="float32", max_num_seqs=4, max_num_batched_tokens=100, enable_prefix_caching=False)
    found = {way.__name__: way(llm, few) for way in (alone, static, continuous)}
    for name, answers in found.items():
        if answers != found["alone"]:
            raise SystemExit(f"{name}: not the tokens of each prompt alone")


def work_ours(path: str, jobs: Jobs, way: str, max_num_seqs: int) -> dict[str, Any]:
    import torch

    from slipstream import LLM

    llm = LLM(path, max_model_len=1024, max_num_seqs=max_num_seqs)
    alone(llm, [(list(range(100, 132)), 8)])
    before = llm.snapshot()
    start = time.perf_counter()
    answers = (static if way == "static" else continuous)(llm, jobs)
    seconds = time.perf_counter() - start
    after = llm.snapshot()
    counts = {n: getattr(after, n) - getattr(before, n) for n in ("steps", "preemptions", "cached_tokens")}
    choices = {c.op: c.name for c in llm.plan.choices}
    return {"answers": answers, "seconds": seconds, **counts, "choices": choices, "threads": torch.get_num_threads()}


def work_transformers(path: str, jobs: Jobs, max_num_seqs: int) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    block = 32
    settings = ContinuousBatchingConfig(
        block_size=block,
        num_blocks=(max_num_seqs + 1) * -(-(PROMPTS[1] + LONGEST + block) // block),
        max_batch_tokens=512,
        max_requests_per_batch=max_num_seqs,
        allow_block_sharing=False,
    )
    with model.continuous_batching_context_manager(
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=LONGEST, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=settings,
        workload_hints=WorkloadHints(PROMPTS[1], LONGEST, len(jobs)),
    ) as manager:

        def answer(jobs: Jobs) -> list[list[int]]:
            names = [manager.add_request(prompt, max_new_tokens=new) for prompt, new in jobs]
            found: dict[str, list[int]] = {}
            while len(found) < len(jobs):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    if result.error is not None:
                        raise SystemExit(f"transformers: {result.error}")
                    found[result.request_id] = result.generated_tokens
                elif result is None and not manager.is_running():
                    raise SystemExit("transformers: its generation loop has ended")
            return [found[name] for name in names]

        answer([(list(range(100, 132)), 8)])
        start = time.perf_counter()
        answers = answer(jobs)
        return {"answers": answers, "seconds": time.perf_counter() - start}


def work(side: str, folder: str, path: str, max_num_seqs: str) -> dict[str, Any]:
    jobs: Jobs = [(p, new) for p, new in json.loads(Path(folder, "jobs.json").read_text())]
    if side == "check":
        check(path, jobs)
        return {}
    if side == "transformers":
        return work_transformers(path, jobs, int(max_num_seqs))
    return work_ours(path, jobs, side, int(max_num_seqs))


def apart(*args: str) -> dict[str, Any]:
    """`work` in a process of its own."""
    command = [sys.executable, __file__, "--worker", *args]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    if done.returncode:
        raise SystemExit(f"{args[0]}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def agreement(a: list[list[int]], b: list[list[int]]) -> dict[str, float]:
    """Share of first tokens, and of all tokens before the two first differ."""
    same = [
        next((i for i, (p, q) in enumerate(zip(x, y, strict=True)) if p != q), len(x))
        for x, y in zip(a, b, strict=True)
    ]
    return {
        "first": round(sum(n > 0 for n in same) / len(same), 4),
        "before_they_part": round(sum(same) / sum(map(len, a)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-rounds", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--peer-seqs", type=int, default=16)
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        print(json.dumps(work(*asked.worker)))
        return

    from slipstream.sources import resolve

    gguf = resolve(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(gguf, Path(folder))
        jobs = make_jobs(asked.prompts, folder)
        Path(folder, "jobs.json").write_text(json.dumps(jobs))
        apart("check", folder, folder, "0")
        sides = {
            "continuous": ("continuous", folder, asked.max_num_seqs, asked.rounds),
            "static": ("static", folder, asked.max_num_seqs, asked.rounds),
            "transformers": ("transformers", folder, asked.peer_seqs, asked.peer_rounds),
            "q": ("continuous", str(gguf), asked.max_num_seqs, 1),
        }
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for turn in range(max(asked.rounds, asked.peer_rounds)):
            for name, (side, path, seqs, rounds) in sides.items():
                if turn < rounds:
                    runs[name].append(apart(side, folder, path, str(seqs)))
                    print(f"{name}: {runs[name][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)

    lengths = [new for _, new in jobs]
    for name, rows in runs.items():
        if any([len(a) for a in row["answers"]] != lengths for row in rows):
            raise SystemExit(f"{name}: answers that are not as long as was asked")
    ours = runs["continuous"][0]
    agree = {name: agreement(ours["answers"], runs[name][0]["answers"]) for name in ("static", "transformers")}
    for name, share in agree.items():
        if share["first"] < AGREE:
            raise SystemExit(f"{name}: {share['first']:.0%} of the first tokens are those of continuous batching")

    tokens = sum(lengths)
    seconds = {name: statistics.median(row["seconds"] for row in rows) for name, rows in runs.items()}
    speed = {name: tokens / taken for name, taken in seconds.items()}
    common: dict[str, Any] = {
        "versions": ("torch", "transformers"),
        "choices": ours["choices"],
        "threads": ours["threads"],
        "prompts": len(jobs),
        "tokens": tokens,
        "max_num_seqs": asked.max_num_seqs,
        "peer_seqs": asked.peer_seqs,
        **{name: ours[name] for name in ("steps", "preemptions", "cached_tokens")},
        "static_steps": runs["static"][0]["steps"],
        "seconds": {name: [round(row["seconds"], 2) for row in rows] for name, rows in runs.items()},
        "agreement": agree,
        "quantized": round(speed["q"], 1),
    }
    for name in ("static", "transformers"):
        record(f"batching.cpu.{name}", speed["continuous"], "tok/s", family="cpu",
               baseline={name: round(speed[name], 1)}, ratio=speed["continuous"] / speed[name], **common)  # fmt: skip


if __name__ == "__main__":
    main()
