"""The logits of a whole gpt-oss on a GPU against those of transformers, with the same weights.

Claims: gpu.logits.20b (relative error), gpu.top1.20b (the same most likely token, the same tokens before it). A checkpoint of the
published shapes is written, with random weights in MXFP4; transformers dequantizes it to bfloat16. As in a trained model there is
a most likely token, since the head knows a successor of every token (how far it leads is recorded too), and routers are sure
of their experts: else rounding picks another one for some tokens, and transformers disagrees with itself as much.

    python benchmarks/gpu_logits.py 20b [--folder /dev/shm]
    python benchmarks/gpu_logits.py tiny --device cpu       # the same script, tried without a GPU; records nothing
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from gpu_weights import config, write
from record import record
from torch import Tensor

PROMPTS = (509, 256, 190, 69)  # tokens; each but the last is longer than the window
MOST_ERROR, LEAST_TOP1 = 2e-2, 0.98


@torch.inference_mode()
def ours(folder: Path, device: str, prompts: list[list[int]]) -> tuple[list[Tensor], dict[str, str]]:
    from slipstream.batch import build_batch
    from slipstream.cache.pages import Pages
    from slipstream.checkpoint.load import load
    from slipstream.checkpoint.open import open_checkpoint
    from slipstream.config import EngineConfig
    from slipstream.engine.runner import Runner
    from slipstream.plan import make_plan
    from slipstream.request import Chunk

    checkpoint = open_checkpoint(folder)
    plan = make_plan(
        EngineConfig(device=device, dtype="bfloat16", max_model_len=1024, kv_cache_memory_bytes=1 << 29), checkpoint
    )
    load(plan.model, plan.loads, checkpoint, plan.device)
    runner, pages = Runner(plan, plan.model), Pages(plan.groups, plan.num_pages, plan.page_size)
    chunks = []
    for i, tokens in enumerate(prompts):
        assert pages.reserve(i, 0, len(tokens))
        chunks.append(Chunk(i, 0, tuple(tokens), pages.tables(i), sample=True))
    whole = frozenset(range(len(prompts)))
    batch = build_batch(chunks, plan.groups, plan.page_size, plan.device, whole)
    logits = plan.model(batch, runner.storage).float()
    return list(logits.split([len(p) for p in prompts])), {c.op: c.name for c in plan.choices}


@torch.inference_mode()
def theirs(folder: Path, device: str, prompts: list[list[int]]) -> list[Tensor]:
    from transformers import AutoModelForCausalLM, Mxfp4Config

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True), device_map=device,
        attn_implementation="eager",
    )  # fmt: skip
    return [model(torch.tensor([p], device=device)).logits[0].float() for p in prompts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=("20b", "tiny"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", default=None, help="where to write the checkpoint; default: for temporary files")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=asked.folder))
    try:
        write(folder, asked.size, asked.device, sure=True)
        source, vocab = torch.Generator().manual_seed(1), config(asked.size)["vocab_size"]
        prompts = [torch.randint(vocab, (n,), generator=source).tolist() for n in PROMPTS]
        got, choices = ours(folder, asked.device, prompts)
        want = theirs(folder, asked.device, prompts)
    finally:
        shutil.rmtree(folder)
    error = max(((g - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True))
    tokens = torch.cat([w.argmax(-1) for w in want])
    top1 = (torch.cat([g.argmax(-1) for g in got]) == tokens).float().mean().item()
    best = torch.cat([w.topk(2).values for w in want])
    lead = ((best[:, 0] - best[:, 1]).median() / torch.cat(want).std()).item()
    print({"error": error, "top1": top1, "median_lead_in_std": lead, "distinct": len(tokens.unique())}, flush=True)
    if not (error < MOST_ERROR and top1 >= LEAST_TOP1):
        raise SystemExit("the logits are not those of transformers")
    if asked.size != "tiny":
        more = {
            "versions": ("torch", "transformers"),
            "choices": choices,
            "machine": torch.cuda.get_device_name(),
            "tokens": len(tokens),
        }
        record("gpu.logits.20b", error, "relative error", limit=MOST_ERROR, **more)
        record("gpu.top1.20b", top1, "agreement", limit=LEAST_TOP1, median_lead_in_std=round(lead, 2), **more)


if __name__ == "__main__":
    main()
