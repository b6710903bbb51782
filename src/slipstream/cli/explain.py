"""`slipstream explain`: the plan of a model on this machine, each choice with its reason, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slipstream.cli.options import AsJson, EngineOptions, Model, flat
from slipstream.cli.show import Bar, Table, print_json, print_tables, size
from slipstream.errors import CapacityError

if TYPE_CHECKING:
    from slipstream.checkpoint.open import Checkpoint
    from slipstream.config import EngineConfig
    from slipstream.plan.shards import Sharing

PROMPT, NEW = 16, 8  # tokens that `--used` runs


@flat
def explain(
    model: Model,
    engine: EngineOptions,
    used: Annotated[
        bool,
        typer.Option("--used", help="Load the model, generate a few tokens, and count the calls of what actually ran."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what would run where, and why.

    Prints the plan, with the memory that it takes, without loading the model. Takes the same engine options as
    generate and chat, and fails where they would.
    """
    from slipstream.config import EngineConfig

    if used:
        _explain_used(model, engine, as_json)
        return
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
    if asked.tensor_parallel_size > 1:
        _explain_ranks(model, asked, checkpoint, as_json)
        return
    from slipstream.plan import make_plan

    plan = make_plan(asked, checkpoint).to_dict()
    if as_json:
        print_json({"model": model, **plan})
    else:
        print_tables(_tables(model, plan))


def _explain_used(model: str, engine: EngineOptions, as_json: bool) -> None:
    """What ran, proven by counts. Of several ranks it is the first one's; they all run the same."""
    from slipstream.cli.load import load_llm
    from slipstream.request import SamplingParams

    llm = load_llm(model, engine, count_calls=True)
    plan, vocab = llm.plan, llm.model_config.vocab_size
    assert plan.ops.used is not None
    plan.ops.used.calls.clear()
    most = max(1, min(PROMPT, plan.max_model_len - NEW))
    prompts = [[(7 * i + start) % vocab for i in range(most)] for start in (1, 2)]
    llm.generate(prompts, SamplingParams(max_new_tokens=NEW, temperature=0, ignore_eos=True))
    calls = plan.ops.used.calls
    ran = [
        {"op": c.op, "implementation": c.name, "calls": calls[c.op, c.name], "source": c.source or "slipstream"}
        for c in plan.choices
    ]
    if as_json:
        print_json({"model": model, **plan.to_dict(), "used": ran})
        return
    rows = [
        (str(r["op"]), str(r["implementation"]), f"{r['calls']:,}" if r["calls"] else "none", str(r["source"]))
        for r in ran
    ]
    title = f"Calls for {len(prompts)} prompts of {most} tokens, {NEW} new tokens each"
    title += "; a recorded step counts each time it is replayed" if plan.cuda_graphs else ""
    print_tables([*_tables(model, plan.to_dict()), Table(title, rows, ("op", "implementation", "calls", "from"))])


def _explain_ranks(model: str, asked: EngineConfig, checkpoint: Checkpoint, as_json: bool) -> None:
    """The same for several ranks: none is started, and who has what is told even where it would not fit on this machine."""
    from slipstream.parallel.shares import Ranks
    from slipstream.plan import make_plan
    from slipstream.plan.layout import lay_out
    from slipstream.plan.shards import sharing

    size = asked.tensor_parallel_size
    shared = sharing(lay_out(asked, checkpoint, None, Ranks(0, size), None))
    plan: dict[str, Any] = {}
    failure: CapacityError | None = None
    try:
        plans = {r: make_plan(asked, checkpoint, ranks=Ranks(r, size)) for r in shared.candidates}
        largest = min(plans, key=lambda r: plans[r].num_pages)
        plan = {**plans[largest].to_dict(), "largest_rank": largest}
    except CapacityError as e:
        failure = e
    if as_json:
        print_json({"model": model, **plan, "parallel": shared.to_dict()})
    else:
        tables = _tables(f"{model}, rank {plan['largest_rank']} of {size}, the largest", plan) if plan else []
        print_tables([*tables, *_sharing_tables(shared)])
    if failure is not None:
        raise failure


def _sharing_tables(shared: Sharing) -> list[Table]:
    rows = []
    for group in shared.grouped():
        first = group[0]
        ranges = [" + ".join(f"{a}-{b - 1}" for a, b in first.ranges(r)) for r in range(shared.ranks)]
        each = [size(n * len(group)) for n in first.nbytes]
        shape = " x ".join(f"{n:,}" for n in first.shape)
        same = len(set(each)) == 1
        rows.append(
            (first.pattern, str(len(group)), shape, first.held, first.what, " | ".join(ranges) if any(ranges) else "",
             f"{each[0]} each" if same else " | ".join(each))
        )  # fmt: skip
    weights = [shared.weights(r) for r in range(shared.ranks)]
    rows.append(("all", str(len(shared.shards)), "", "", "", "", " | ".join(map(size, weights))))
    steps = list(shared.steps.items())
    said = []
    named = [{(c.of, c.kind): c for c in found} for _, found in steps]
    for key, one in {key: c for found in named for key, c in found.items()}.items():  # not every step has them all
        said.append((*key, str(one.calls), *(size(found[key].nbytes) if key in found else "-" for found in named)))
    totals = (size(sum(c.calls * c.nbytes for c in found)) for _, found in steps)
    sent = (size(sum(c.sent(shared.ranks) for c in found)) for _, found in steps)
    said += [("all", "", "", *totals), ("sent by a rank, in a ring", "", "", *sent)]
    columns = (
        "of",
        "what",
        "calls",
        *(f"bytes a call, step of {tokens:,} token{'s' * (tokens > 1)}" for tokens, _ in steps),
    )
    return [
        Table(
            "What each rank has", rows, ("parameter", "tensors", "shape", "held", "cut", "each rank's", "bytes a rank")
        ),
        Table("What ranks say to each other in a step", said, columns),
    ]


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
        choices.append((c["op"], c["implementation"], ": ".join(filter(None, (c["reason"], c.get("source"))))))
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
