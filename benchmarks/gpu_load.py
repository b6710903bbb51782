"""How fast gpt-oss gets onto a GPU: bytes a second while loading, and the time from a process's start to its first token.

Claims: gpu.load, gpu.first_token. A checkpoint of the published names, shapes and dtypes is written (random numbers, and a
tokenizer of as many tokens), so that it lies in the page cache. Then, each in processes of its own, and in the same run:
how fast as many threads read those files, in blocks of the better of two sizes, and how fast pinned memory is copied to the
card. The slower of both is the limit of loading. The first start on a card compiles the kernels and is told by itself; the claim is
of later ones.
Before anything counts, what lies on the card is compared with the files, byte for byte.

    python benchmarks/gpu_load.py 20b [--folder /dev/shm] [--cold]
    python benchmarks/gpu_load.py tiny --device cpu         # the same script, tried without a GPU; records nothing
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GB = 1e9
RUNS = 3
PROMPT = "The tide comes in twice a day because the moon"


def write_tokenizer(folder: Path, size: int) -> None:
    """Byte-level BPE: the bytes, then pairs of them, then pairs and a byte, until there are `size` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in bytes_ for b in bytes_]
    merges = [*pairs, *((a + b, c) for a, b in pairs for c in bytes_[:4])][: max(0, size - len(bytes_))]
    vocab = {t: i for i, t in enumerate([*bytes_, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def drop(folder: Path) -> None:
    """Out of the page cache, so that the next read comes from the disk."""
    for file in folder.iterdir():
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def child(folder: Path, device: str, check: bool) -> None:
    """One load in this process; prints what it took."""
    began = time.perf_counter()
    import torch

    imported = time.perf_counter() - began
    from slipstream.checkpoint.load import load
    from slipstream.checkpoint.open import open_checkpoint
    from slipstream.config import EngineConfig
    from slipstream.plan import make_plan

    checkpoint = open_checkpoint(folder)
    asked = EngineConfig(device=device, max_model_len=4096, kv_cache_memory_bytes=1 << 30)
    plan = make_plan(asked, checkpoint)
    if plan.device.type == "cuda":
        torch.cuda.synchronize()
    planned = time.perf_counter() - began - imported
    start = time.perf_counter()
    load(plan.model, plan.loads, checkpoint, plan.device)
    took = time.perf_counter() - start
    loaded = time.time()
    if check:
        compare(plan, checkpoint)
    print(json.dumps({
        "load_s": took, "import_s": imported, "plan_s": planned, "loaded_at": loaded, "bytes": checkpoint.total_bytes,
        "choices": {c.op: c.name for c in plan.choices},
    }))  # fmt: skip


def compare(plan: Any, checkpoint: Any) -> None:
    """Every run of bytes that was transferred, once more on its way to the card, against the files."""
    import torch

    from slipstream.checkpoint.tensors import read_raw
    from slipstream.checkpoint.transfer import Card, Transfer

    embedding = checkpoint.read("model.embed_tokens.weight")
    if not torch.equal(plan.model.embed.held.data.cpu(), embedding):
        raise SystemExit("the embedding on the card is not that of the file")
    if plan.device.type != "cuda":
        return
    stored = [t for info in checkpoint.tensors.values() if ".layers.1." in info.name for t in info.stored]
    card = Card(plan.device)
    arrivals = Transfer([[t] for t in stored], card)
    with card.aside():
        for _, complete in arrivals.arrive():
            for i in complete:
                if not torch.equal(arrivals.take(i)[stored[i]].cpu(), read_raw(stored[i])):
                    raise SystemExit(f"{stored[i].name} on the card is not that of the file")
    card.finish()


def load_once(folder: Path, device: str, check: bool = False) -> dict[str, Any]:
    command = [sys.executable, __file__, "child", "--folder", str(folder), "--device", device]
    began = time.time()
    done = subprocess.run([*command, *(["--check"] if check else [])], stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["start_to_loaded_s"] = found.pop("loaded_at") - began
    return found


PROGRAM = """
import sys
from slipstream import LLM, SamplingParams
folder, prompt, device = sys.argv[1:]
params = SamplingParams(temperature=0, max_new_tokens=4, ignore_eos=True)
for text in LLM(folder, device=device, max_model_len=4096).stream(prompt, params):
    print(text, end="", flush=True)
"""


def first_token(folder: Path, device: str) -> float:
    """Seconds from the start of a process to the first byte that it prints."""
    began = time.perf_counter()
    command = [sys.executable, "-c", PROGRAM, str(folder), PROMPT, device]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0)
    assert run.stdout is not None
    if not run.stdout.read(1):
        raise SystemExit("it printed nothing")
    took = time.perf_counter() - began
    run.stdout.read()
    if run.wait():
        raise SystemExit(f"it ended with {run.returncode}")
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=("20b", "tiny", "child"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--folder", default=None, help="where to write the checkpoint; default: that of temporary files"
    )
    parser.add_argument("--cold", action="store_true", help="also load once from the disk")
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.size == "child":
        return child(Path(asked.folder), asked.device, asked.check)
    from gpu_weights import config, write
    from record import record

    folder = Path(tempfile.mkdtemp(dir=asked.folder))
    try:
        write(folder, asked.size, asked.device)
        write_tokenizer(folder, config(asked.size)["vocab_size"])
        from slipstream.bench.start import copy_rate, read_rate
        from slipstream.checkpoint.transfer import BLOCK, READERS

        files = sorted(folder.glob("*.safetensors"))
        runs = [load_once(folder, asked.device, check=i == 0) for i in range(RUNS)]
        read = max(read_rate(files, READERS, block) for block in (4 << 20, BLOCK) for _ in range(RUNS))
        copy = copy_rate(asked.device)
        size, took = runs[0]["bytes"], statistics.median(r["load_s"] for r in runs)
        more: dict[str, Any] = {
            name: round(statistics.median(r[name] for r in runs), 3)
            for name in ("load_s", "import_s", "plan_s", "start_to_loaded_s")
        }
        more |= {"read_gb_s": round(read / GB, 1), "copy_gb_s": round(copy / GB, 1), "file_gb": round(size / GB, 3)}
        if asked.cold:
            drop(folder)
            cold = read_rate(files, READERS, BLOCK)
            drop(folder)
            more |= {
                "cold_s": round(load_once(folder, asked.device)["load_s"], 3), "cold_read_gb_s": round(cold / GB, 2)
            }  # fmt: skip
            read_rate(files, READERS, BLOCK)
        limit = min(read, copy)
        print({"gb_s": size / took / GB, "of_limit": size / took / limit, **more}, flush=True)
        recorded = asked.size != "tiny"
        packages, choices = ("torch", "tokenizers"), runs[0]["choices"]
        if recorded:
            import torch

            card = torch.cuda.get_device_name()
            record("gpu.load", size / took / GB, "GB/s", limit=round(limit / GB, 1), versions=packages, choices=choices, machine=card,
                   fraction=round(size / took / limit, 3), **more)  # fmt: skip
        first, *tokens = [first_token(folder, asked.device) for _ in range(1 + RUNS)]  # the first compiles the kernels
        print({"first_start_s": first, "first_token_s": tokens})
        if recorded:
            record("gpu.first_token", statistics.median(tokens), "s", limit=round(size / limit, 2), versions=packages,
                   choices=choices, machine=card, runs=[round(t, 2) for t in tokens], first_start_s=round(first, 2))  # fmt: skip
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
