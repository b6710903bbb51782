"""SmolLM2-135M on a CPU against transformers in bfloat16, in the same run.

Claims: cpu.decode.q (weights as the GGUF has them, 4 and 8 bits), cpu.decode.bf16, cpu.prefill.512 (bfloat16; the
quantized figure beside it), cpu.first_token (from starting Python to the first token printed: the GGUF as `pull` brings
it; the same bfloat16 folder as the peer's beside it). Decode: batch 1, prompt of 32, 128 / (time for 129 new tokens - time for 1).

Each side runs in processes of its own, in turn, so that what else the machine does hits both. Before anything is
timed, the mean negative log-likelihood of a text is compared.

    python benchmarks/cpu_decode.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import record

MODEL = "smollm2-135m-instruct"
TEXT = (
    "The tide goes out twice a day because of the pull of the moon and the turning of the earth. In harbours, sailors "
    "wait for the water to rise before they leave, and children look for crabs among the stones that it uncovered."
)
PEER_FIRST = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer(sys.argv[2], return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=1, do_sample=False)
print(tokenizer.decode(out[0, -1:]), flush=True)
"""
OURS_FIRST = """
import sys
from slipstream import LLM, SamplingParams
for text in LLM(sys.argv[1]).stream(sys.argv[2], SamplingParams(max_new_tokens=1, temperature=0)):
    print(text, flush=True)
"""
# Bytecode is cached on a user's machine, so it is here too.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


def prompts(count: int, length: int) -> list[list[int]]:
    source = random.Random(0)
    return [[source.randrange(100, 40000) for _ in range(length)] for _ in range(count)]


def timed(generate: Any) -> dict[str, Any]:
    """Decode and prefill of `generate(token_ids, new_tokens)`."""

    def seconds(ids: list[int], new: int) -> float:
        start = time.perf_counter()
        generate(ids, new)
        return time.perf_counter() - start

    short, long = prompts(1, 32)[0], prompts(6, 512)
    seconds(short, 8), seconds(long[0], 1)
    decode = [128 / (seconds(short, 129) - seconds(short, 1)) for _ in range(4)]
    prefill = [512 / seconds(ids, 1) for ids in long[1:]]
    return {"decode": statistics.median(decode), "prefill": statistics.median(prefill)}


def work_ours(path: str, force: str | None) -> dict[str, Any]:
    from slipstream import LLM, SamplingParams

    llm = LLM(path, linear_implementation=force, max_model_len=1024)
    scored = llm.generate(TEXT, SamplingParams(max_new_tokens=1, temperature=0, prompt_logprobs=0)).prompt_logprobs
    nll = -statistics.fmean(p.logprob for p in scored if p is not None)

    def generate(ids: list[int], new: int) -> None:
        out = llm.generate([ids], SamplingParams(max_new_tokens=new, temperature=0, ignore_eos=True))
        assert len(out[0].outputs[0].token_ids) == new

    import torch

    choices = {c.op: c.name for c in llm.plan.choices}
    return {"nll": nll, "choices": choices, "threads": torch.get_num_threads(), **timed(generate)}


def work_transformers(path: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from slipstream.tokenizer import Tokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    ids = torch.tensor([Tokenizer.from_folder(path).encode(TEXT)])
    with torch.inference_mode():
        logits = model(ids).logits[0, :-1].float()
    nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()

    def generate(prompt: list[int], new: int) -> None:
        inputs = torch.tensor([prompt])
        out = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
        )
        assert out.shape[1] == len(prompt) + new

    return {"nll": nll, **timed(generate)}


def work(*args: str) -> dict[str, Any]:
    """One side in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--worker", *args], capture_output=True, text=True, env=ENVIRONMENT
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def first_token(code: str, path: str) -> float:
    """Seconds from starting Python to the first thing it prints."""
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", code, path, "The tide"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    ) as process:
        assert process.stdout is not None
        if not process.stdout.read(1):
            raise SystemExit("no token was printed")
        taken = time.perf_counter() - start
        process.stdout.read()
    return taken


def write_folder(gguf: Path, folder: Path) -> None:
    """The same model as a bfloat16 safetensors folder, for the peer and for the bfloat16 claims."""
    import torch
    from safetensors.torch import save_file

    from slipstream.checkpoint.open import open_checkpoint
    from slipstream.tokenizer import Tokenizer

    checkpoint = open_checkpoint(gguf)
    tensors = {name: checkpoint.dequantize(name, torch.bfloat16).contiguous() for name in checkpoint.tensors}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**checkpoint.config, "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_gguf(checkpoint.metadata)
    tokenizer.save(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        side, path, *force = asked.worker
        result = work_ours(path, force[0] if force else None) if side == "ours" else work_transformers(path)
        print(json.dumps(result))
        return

    from slipstream.sources import resolve

    gguf = resolve(MODEL)
    with tempfile.TemporaryDirectory() as scratch:
        write_folder(gguf, Path(scratch))
        sides = {"q": ("ours", str(gguf)), "bf16": ("ours", scratch), "transformers": ("transformers", scratch)}
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for _ in range(asked.rounds):
            for name, args in sides.items():
                runs[name].append(work(*args))
        first: dict[str, list[float]] = {"q": [], "bf16": [], "transformers": []}
        for _ in range(2 * asked.rounds + 1):
            first["q"].append(first_token(OURS_FIRST, str(gguf)))
            first["bf16"].append(first_token(OURS_FIRST, scratch))
            first["transformers"].append(first_token(PEER_FIRST, scratch))

    nll = {name: rows[0]["nll"] for name, rows in runs.items()}
    for name in ("q", "bf16"):
        if abs(nll[name] - nll["transformers"]) > 0.05:
            raise SystemExit(
                f"{name}: mean negative log-likelihood {nll[name]:.4f}, transformers' {nll['transformers']:.4f}"
            )

    def median(name: str, what: str) -> float:
        return statistics.median(r[what] for r in runs[name])

    common: dict[str, Any] = {"versions": ("torch", "transformers"), "nll": {k: round(v, 4) for k, v in nll.items()}}
    common["threads"] = runs["q"][0]["threads"]
    peer = median("transformers", "decode")
    for claim, name in (("cpu.decode.q", "q"), ("cpu.decode.bf16", "bf16")):
        value = median(name, "decode")
        record(claim, value, "tok/s", baseline={"transformers": round(peer, 2)}, ratio=value / peer,
               choices=runs[name][0]["choices"], **common)  # fmt: skip
    peer, value = median("transformers", "prefill"), median("bf16", "prefill")
    record("cpu.prefill.512", value, "tok/s", baseline={"transformers": round(peer, 1)}, ratio=value / peer,
           choices=runs["bf16"][0]["choices"], quantized=round(median("q", "prefill"), 1), **common)  # fmt: skip
    times = {name: statistics.median(values) for name, values in first.items()}
    record("cpu.first_token", times["q"], "s", baseline={"transformers": round(times["transformers"], 3)},
           ratio=times["transformers"] / times["q"], bf16_folder=round(times["bf16"], 3),
           bf16_folder_ratio=round(times["transformers"] / times["bf16"], 3), **common)  # fmt: skip


if __name__ == "__main__":
    main()
