"""A rank as a process: the logits of every prompt for each of some folders, from rank 0 into a file.

python -m tests.parallel.one_rank RANK SIZE STORE OUT OPTIONS FOLDER...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist

from slipstream.checkpoint.load import load
from slipstream.checkpoint.open import open_checkpoint
from slipstream.config import EngineConfig
from slipstream.engine.runner import Runner
from slipstream.parallel.shares import Ranks
from slipstream.plan import layout, make_plan
from tests.parity.test_architectures import all_logits

PROMPTS = [[7, 3, 90, 4, 4, 61], list(range(40)), [11]]


def logits(folder: Path, ranks: Ranks, options: dict[str, Any]) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """`least_tokens` among the options takes the place of the plan's own: from how many on experts speak all to all."""
    options = dict(options)
    if (least := options.pop("least_tokens", None)) is not None:
        layout.least_tokens = lambda *_: least
    checkpoint = open_checkpoint(folder)
    asked = EngineConfig(
        **{"device": "cpu", "dtype": "float32", "kv_cache_memory_bytes": 8 << 20, "max_model_len": 128, **options}
    )
    plan = make_plan(asked, checkpoint, ranks=ranks)
    load(plan.model, plan.loads, checkpoint, plan.device)
    runner = Runner(plan, plan.model)
    exchanges = []
    exchange = dist.all_to_all_single

    def counted(there: torch.Tensor, sent: torch.Tensor, come: list[int], go: list[int], **more: Any) -> Any:
        exchanges.append((come, go))
        return exchange(there, sent, come, go, **more)

    dist.all_to_all_single = counted
    found = all_logits(cast(Any, SimpleNamespace(plan=plan, engine=SimpleNamespace(runner=runner))), PROMPTS)
    dist.all_to_all_single = exchange
    load_of_experts = {i: counts.tolist() for i, counts in plan.model.expert_load().items()}
    tokens = sum(map(len, PROMPTS))
    return found, {
        "tokens": tokens,
        "load": load_of_experts,
        "weights": plan.weights_bytes,
        "kv": plan.kv_bytes,
        "pages": plan.num_pages,
        "exchanges": exchanges,
    }


def main() -> None:
    rank, size, store, out, options, *folders = sys.argv[1:]
    torch.set_num_threads(1)
    ranks = Ranks(int(rank), int(size))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=ranks.rank, world_size=ranks.size)
    said = {}
    for folder in folders:
        found, said[folder] = logits(Path(folder), ranks, json.loads(options))
        if not ranks.rank:
            torch.save(found, Path(out) / f"{Path(folder).name}.pt")
    Path(out, f"said-{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
