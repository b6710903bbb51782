"""`slipstream explain`: the plan of a model on this machine, each choice with its reason, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slipstream.cli.options import AsJson, EngineOptions, Model, flat
from slipstream.cli.show import Bar, Table, print_json, print_tables, size


@flat
def explain(model: Model, engine: EngineOptions, as_json: AsJson = False) -> None:
    """Say what would run where, and why.

    Prints the plan, with the memory that it takes, without loading the model. Takes the same engine options as
    generate and chat, and fails where they would.
    """
    from slipstream.config import EngineConfig

    asked = EngineConfig(**engine.changes())
    from slipstream.checkpoint.open import open_checkpoint, open_random
    from slipstream.sources import resolve

    random = asked.weights == "random"
    with Bar() as bar:
        path = resolve(model, progress=bar, weights=not random)
    checkpoint = open_random(path) if random else open_checkpoint(path)
    if asked.num_threads is not None:
        import torch

        torch.set_num_threads(asked.num_threads)
    from slipstream.plan import make_plan

    plan = make_plan(asked, checkpoint).to_dict()
    if as_json:
        print_json({"model": model, **plan})
    else:
        print_tables(_tables(model, plan))


def _tables(model: str, plan: Mapping[str, Any]) -> list[Table]:
    why = dict(plan["why"])
    sizes, step = plan["bytes"], "max_num_batched_tokens"
    rows = [
        ("device", f"{plan['device']} ({plan['hardware']})", why.pop("device", "")),
        ("dtype", plan["dtype"], why.pop("dtype", "")),
        ("architecture", plan["architecture"], ""),
        ("max_model_len", f"{plan['max_model_len']:,} tokens", why.pop("max_model_len", "")),
        ("max_num_seqs", f"{plan['max_num_seqs']} answers together", why.pop("max_num_seqs", "")),
        (step, f"{plan[step]:,} tokens a step", why.pop(step, "")),
    ]
    memory = [
        ("page_size", f"{plan['page_size']} tokens", why.pop("page_size", "")),
        ("weights", size(sizes["weights"]), why.pop("weights", "")),
        ("KV cache", size(sizes["kv_cache"]), why.pop("kv_cache", "")),
        ("workspace", size(sizes["workspace"]), why.pop("workspace", "activations and logits of the largest step")),
        *([("CUDA graphs", size(sizes["graphs"]), why.pop("cuda_graphs", ""))] if sizes["graphs"] else []),
        ("total", size(sizes["total"]), f"of {size(sizes['free'])} free"),
    ]
    rows += [(name, "", reason) for name, reason in why.items()]
    choices = []
    for c in plan["choices"]:
        choices.append((c["op"], c["implementation"], c["reason"]))
        choices += [("", f"not {r['implementation']}", r["why"]) for r in c["rejected"]]
    weights = [(w["arrived"], w["held"], str(w["parameters"]), size(w["bytes"])) for w in plan["weights"]]
    groups = [
        (g["name"], str(g["layers"]), f"{g['pages']:,}", f"{g['bytes_per_token']:,}", size(g["bytes"]))
        for g in plan["cache_groups"]
    ]
    pages = f"KV cache, {plan['page_size']} tokens a page"
    return [
        Table(f"Plan for {model}", rows, ("what", "choice", "why")),
        Table("Implementations", choices, ("op", "implementation", "why")),
        Table("Weights", weights, ("in the checkpoint", "in memory", "tensors", "size")),
        Table(pages, groups, ("layers", "count", "pages", "bytes a token", "size")),
        Table("Memory", memory, ("for", "size", "why")),
    ]
