"""What gpt-oss takes on a GPU: the weights, and the highest moment of loading them.

Claims: gpu.weights_gib.20b, gpu.weights_gib.120b. A checkpoint of the published names, shapes and dtypes is written (random
numbers), planned and loaded as users would; torch's allocator says what is held, and what the peak was. Before that
counts, one layer of experts is compared with its weights decoded in float64, and a prompt must give finite logits.

    python benchmarks/gpu_weights.py 20b [--folder /dev/shm]
    python benchmarks/gpu_weights.py tiny --device cpu      # the same script, tried without a GPU; records nothing
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import record
from safetensors.torch import save_file

GIB = 2**30
SIZES = ("20b", "120b", "tiny")
TINY = {
    "num_hidden_layers": 2, "num_local_experts": 4, "hidden_size": 320, "intermediate_size": 96, "vocab_size": 999,
    "num_attention_heads": 6, "num_key_value_heads": 2, "eos_token_id": 5, "pad_token_id": 6,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
FILE_GIB = {"20b": 12.82, "120b": None, "tiny": None}
MOST_GIB = {"20b": 13.1, "120b": 61.5, "tiny": 1.0}


def config(size: str) -> dict[str, Any]:
    """The config.json that OpenAI publishes; for `tiny` with small numbers in it."""
    from slipstream.sources import shapes

    published = shapes.folder("gpt-oss-120b" if size == "120b" else "gpt-oss-20b") / "config.json"
    return json.loads(published.read_text()) | (TINY if size == "tiny" else {})


def write(folder: Path, size: str, device: str, *, sure: bool = False) -> int:
    """The checkpoint, one shard a layer. Every layer has the same random numbers: they count for nothing here.

    Args:
        sure: the routers are as sure as trained ones. Random ones often have two experts so close that rounding decides
            which of them is the last to be picked, and its answer is another one altogether. Here the experts are in groups
            of as many as are picked, and the signs of a token's first inputs say which group is picked; within it, who has
            which share is random.
    """
    c = config(size)
    hidden, inner, heads, kv = (
        c["hidden_size"],
        c["intermediate_size"],
        c["num_attention_heads"],
        c["num_key_value_heads"],
    )
    n, dim = c["num_local_experts"], c["head_dim"]
    torch.manual_seed(0)

    def floats(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, device=device) * shape[-1] ** -0.5).bfloat16().cpu()

    def stack(rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = torch.randint(256, (n, rows, width // 32, 16), dtype=torch.uint8, device=device)
        scales = torch.randint(118, 123, (n, rows, width // 32), dtype=torch.uint8, device=device)
        return blocks.cpu(), scales.cpu()

    gate_up, down = stack(2 * inner, hidden), stack(hidden, inner)
    router, embedding = floats(n, hidden), floats(c["vocab_size"], hidden)
    if sure:
        signs = group_signs(n // c["num_experts_per_tok"])  # (groups, inputs)
        router *= 0.15
        router[:, : signs.shape[1]] = 0.25 * signs.repeat_interleave(c["num_experts_per_tok"], 0)
        down[1].sub_(6)
        embedding = torch.randn(embedding.shape).bfloat16()
        embedding[:, : signs.shape[1]] = 4 * signs[torch.arange(len(embedding)) % len(signs)]
        embedding *= 8  # a layer adds a little to what there is, as trained ones do
    layer = {
        "input_layernorm.weight": torch.ones(hidden).bfloat16(),
        "post_attention_layernorm.weight": torch.ones(hidden).bfloat16(),
        "self_attn.sinks": floats(heads),
        "self_attn.q_proj.weight": floats(heads * dim, hidden), "self_attn.q_proj.bias": floats(heads * dim),
        "self_attn.k_proj.weight": floats(kv * dim, hidden), "self_attn.k_proj.bias": floats(kv * dim),
        "self_attn.v_proj.weight": floats(kv * dim, hidden), "self_attn.v_proj.bias": floats(kv * dim),
        "self_attn.o_proj.weight": floats(hidden, heads * dim), "self_attn.o_proj.bias": floats(hidden),
        "mlp.router.weight": router, "mlp.router.bias": 0 * floats(n) if sure else floats(n),
        "mlp.experts.gate_up_proj_blocks": gate_up[0], "mlp.experts.gate_up_proj_scales": gate_up[1],
        "mlp.experts.gate_up_proj_bias": floats(n, 2 * inner),
        "mlp.experts.down_proj_blocks": down[0], "mlp.experts.down_proj_scales": down[1],
        "mlp.experts.down_proj_bias": floats(n, hidden),
    }  # fmt: skip
    shards = [{f"model.layers.{i}.{k}": v for k, v in layer.items()} for i in range(c["num_hidden_layers"])]
    ends = {"model.embed_tokens.weight": embedding, "lm_head.weight": floats(c["vocab_size"], hidden)}
    if sure:
        ends["lm_head.weight"] += 2 / hidden * embedding.roll(1, 0)  # knows a successor of every token
    shards.append({**ends, "model.norm.weight": torch.ones(hidden).bfloat16()})
    index = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / name)
        index |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(c))
    return sum(t.nbytes for shard in shards for t in shard.values())


@torch.inference_mode()
def group_signs(groups: int) -> torch.Tensor:
    """Another row of ones and minus ones for each of a power of two of groups: (groups, log2(groups))."""
    bits = torch.arange(groups)[:, None] >> torch.arange(groups.bit_length() - 1) & 1
    return (1 - 2 * bits).bfloat16()


def check(plan: Any, checkpoint: Any) -> float:
    """Experts of layer 0 against their decoded weights in float64, then a prompt through the whole model."""
    from slipstream.cache.pages import Pages
    from slipstream.engine.runner import Runner
    from slipstream.ops.formats import decode
    from slipstream.request import Chunk, SamplingParams, Start, Step

    c, device = plan.model_config, plan.device
    x = torch.randn(3, c.hidden_size, device=device, dtype=plan.dtype)
    mlp = plan.model.layers[0].mlp
    ids, weights = mlp.route(x)
    got = mlp(x).double().cpu()
    name = "model.layers.0.mlp.experts."
    gate_up, down = (
        decode(checkpoint.read_weight(f"{name}{p}_proj_blocks"), torch.float32) for p in ("gate_up", "down")
    )
    bias, down_bias = (checkpoint.read(f"{name}{p}_proj_bias").double() for p in ("gate_up", "down"))
    want = torch.zeros_like(got)
    for t in range(len(x)):
        for e, share in zip(ids[t].tolist(), weights[t].double().cpu(), strict=True):
            h = gate_up[e].double() @ x[t].double().cpu() + bias[e]
            gate, up = h[::2].clamp(max=7.0), h[1::2].clamp(-7.0, 7.0)
            h = gate * torch.sigmoid(1.702 * gate) * (up + 1)
            want[t] += share * (down[e].double() @ h + down_bias[e])
    error = ((got - want).norm() / want.norm()).item()
    if not error < 0.02:
        raise SystemExit(f"the experts of layer 0 are off by {error}")
    runner = Runner(plan, plan.model)
    tokens = tuple(range(5, 25))
    pages = Pages(plan.groups, plan.num_pages, plan.page_size)
    assert pages.reserve(0, 0, len(tokens))
    start = Start(0, tokens, SamplingParams(temperature=0), 0, ())
    step = Step(0, (start,), (), (Chunk(0, 0, tokens, pages.tables(0), True),))
    if runner.finish(runner.launch(step)).tokens[0] is None:
        raise SystemExit("a prompt gives logits that are not finite")
    return error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--folder", default=None, help="where to write the checkpoint; default: the folder for temporary files"
    )
    asked = parser.parse_args()
    from slipstream.checkpoint.load import load
    from slipstream.checkpoint.open import open_checkpoint
    from slipstream.config import EngineConfig
    from slipstream.plan import make_plan

    folder = Path(tempfile.mkdtemp(dir=asked.folder))
    try:
        start = time.perf_counter()
        size = write(folder, asked.size, asked.device)
        written = time.perf_counter() - start
        cuda = asked.device.startswith("cuda")
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        start = time.perf_counter()
        checkpoint = open_checkpoint(folder)
        engine = EngineConfig(
            device=asked.device, attn_implementation="reference", max_model_len=4096, kv_cache_memory_bytes=1 << 30
        )
        plan = make_plan(engine, checkpoint)
        load(plan.model, plan.loads, checkpoint, plan.device)
        if cuda:
            torch.cuda.synchronize()
        loaded = time.perf_counter() - start
        held = torch.cuda.memory_allocated() if cuda else plan.weights_bytes
        peak = torch.cuda.max_memory_allocated() if cuda else held
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        error = check(plan, checkpoint)
        result = {
            "file_gib": round(size / GIB, 3), "planned_gib": round(plan.weights_bytes / GIB, 3),
            "peak_over_gib": round((peak - held) / GIB, 3), "host_rise_gib": round(host / GIB, 3),
            "load_s": round(loaded, 2), "write_s": round(written, 2), "expert_error": round(error, 5),
        }  # fmt: skip
        print(result, held / GIB)
        if held / GIB > MOST_GIB[asked.size] or (peak - held) / GIB > 1.5:
            raise SystemExit("more than the claim allows")
        if asked.size != "tiny":
            name = torch.cuda.get_device_name() if cuda else "cpu"
            record(f"gpu.weights_gib.{asked.size}", held / GIB, "GiB", limit=FILE_GIB[asked.size] or result["file_gib"],
                   versions=("torch", "triton"), choices={c.op: c.name for c in plan.choices}, machine=name, **result)  # fmt: skip
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
