"""Who has what of a model that ranks share, and what they say to each other in a step: known before a rank is started."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from slipstream.checkpoint.load import Load
from slipstream.parallel.collectives import Together
from slipstream.parallel.exchange import had
from slipstream.parallel.shares import Cut
from slipstream.plan.choices import dtype_name
from slipstream.plan.layout import Layout
from slipstream.plan.memory import sizes
from slipstream.plan.weights import held_bytes


@dataclass(frozen=True, slots=True)
class Shard:
    """One parameter over the ranks: what each has of it, and the bytes of that in memory."""

    to: str
    shape: tuple[int, ...]
    held: str
    cuts: tuple[Cut, ...]
    nbytes: tuple[int, ...]

    @property
    def pattern(self) -> str:
        """The name, with * for the number of its layer."""
        return re.sub(r"(?<=layers\.)\d+", "*", self.to)

    @property
    def what(self) -> str:
        """What is cut: rows, columns, experts; "whole" where every rank has all of it."""
        cut = self.cuts[0]
        if cut.ranges is None:
            return "whole, added by rank 0 alone" if self.cuts[-1].zero else "whole"
        bias = self.to.endswith("bias")
        if cut.dim == (2 if bias else 3):
            return "experts"
        return "columns" if cut.dim == 1 and len(self.shape) > 1 and not bias else "rows"

    def ranges(self, rank: int) -> list[tuple[int, int]]:
        """First and one past the last, of each run that this rank has; [] where it has all."""
        found: list[tuple[int, int]] = []
        for r in self.cuts[rank].ranges or ():
            if found and found[-1][1] == r.start:
                found[-1] = found[-1][0], r.stop
            elif len(r):
                found.append((r.start, r.stop))
        return found

    def to_dict(self) -> dict[str, Any]:
        cut = self.cuts[0]
        return {
            "parameter": self.to, "shape": self.shape, "held": self.held, "shard": self.what,
            "dim": None if cut.ranges is None else len(self.shape) - cut.dim,
            "ranks": [{"ranges": self.ranges(r), "bytes": n} for r, n in enumerate(self.nbytes)],
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Collective:
    """What all ranks do together `calls` times in a step, with a tensor of `nbytes` as its result on each."""

    of: str
    kind: str  # all_reduce, all_gather, all_to_all
    calls: int
    nbytes: int

    def sent(self, ranks: int) -> int:
        """Bytes that a rank sends in all calls, if it goes round a ring."""
        rounds = 2 if self.kind == "all_reduce" else 1
        return self.calls * self.nbytes * rounds * (ranks - 1) // ranks


@dataclass(frozen=True, slots=True)
class Sharing:
    """All of it. `steps` maps tokens of a step to its collectives; `candidates` are the ranks that may have the least room."""

    ranks: int
    spread: bool
    shards: tuple[Shard, ...]
    steps: dict[int, tuple[Collective, ...]]
    candidates: tuple[int, ...]

    def weights(self, rank: int) -> int:
        return sum(s.nbytes[rank] for s in self.shards)

    def grouped(self) -> Iterator[list[Shard]]:
        """Shards that differ in the layer alone."""
        found: dict[Any, list[Shard]] = {}
        for s in self.shards:
            found.setdefault((s.pattern, s.shape, s.held, s.cuts, s.nbytes), []).append(s)
        yield from found.values()

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for --json."""
        return {
            "ranks": self.ranks,
            "experts": "spread" if self.spread else "cut",
            "weights_bytes": [self.weights(r) for r in range(self.ranks)],
            "parameters": [s.to_dict() for s in self.shards],
            "steps": [
                {"tokens": tokens, "bytes": sum(c.calls * c.nbytes for c in found),
                 "bytes_sent_by_a_rank": sum(c.sent(self.ranks) for c in found),
                 "collectives": [
                     {"of": c.of, "kind": c.kind, "calls": c.calls, "bytes": c.nbytes,
                      "bytes_sent_by_a_rank": c.sent(self.ranks)} for c in found
                 ]}
                for tokens, found in self.steps.items()
            ],
        }  # fmt: skip


def sharing(laid: Layout) -> Sharing:
    """What all ranks have, given the layout of any of them."""
    size = laid.ranks.size
    rows = tuple(zip(*(laid.loads_of(r) for r in range(size)), strict=True))
    shards = tuple(_shard(laid, items) for items in rows)
    sequences, batched = sizes(laid.asked, laid.hardware, {})
    need = [(sum(s.nbytes[r] for s in shards), len(laid.share(r).kv_heads)) for r in range(size)]
    most = [
        r for r, (a, b) in enumerate(need)
        if not any((x > a and y >= b) or (x >= a and y > b) or ((x, y) == (a, b) and i < r) for i, (x, y) in enumerate(need))
    ]  # fmt: skip
    steps = {tokens: collectives(laid, shards, tokens, sequences) for tokens in sorted({1, batched})}
    return Sharing(size, laid.spread, shards, steps, tuple(most))


def _shard(laid: Layout, items: Sequence[Load]) -> Shard:
    first, floats = items[0], dtype_name(laid.dtype)
    nbytes = tuple(held_bytes(item, laid.ops) for item in items)
    return Shard(first.to, first.shape, first.held.replace("dense", floats), tuple(item.cut for item in items), nbytes)


def collectives(laid: Layout, shards: Sequence[Shard], tokens: int, sequences: int) -> tuple[Collective, ...]:
    """Of a step of so many tokens, in which as many sequences as can be want logits."""
    config = laid.config
    hidden = tokens * config.hidden_size * laid.dtype.itemsize
    found = [Collective("embedding", "all_reduce", 1, hidden)]
    norms = sum(s.to.endswith("attention.q_norm.weight") and s.cuts[0].ranges is not None for s in shards)
    if norms:  # squares of queries and keys
        found.append(Collective("norms over all heads", "all_reduce", norms, 2 * tokens * 4))
    wanted, ranks = min(tokens, sequences), laid.ops.ranks
    layers = [(layer.moe, tokens) for layer in config.layers]
    layers[-1] = layers[-1][0], wanted  # it answers for the rows with logits alone
    sums = [("attention", rows) for _, rows in layers]
    sums += [("experts" if moe else "feed-forward", rows) for moe, rows in sorted(layers, reverse=True)]
    for (name, rows), calls in Counter(sums).items():
        of, nbytes = name + (" of the last layer" if rows < tokens else ""), hidden * rows // tokens
        if (
            name == "experts"
            and isinstance(ranks, Together)
            and ranks.exchange_from is not None
            and rows >= ranks.exchange_from
        ):
            share = had(laid.ranks.size, config.num_experts_per_tok)
            found.append(Collective(of, "all_to_all", calls, round(nbytes * share)))
            found.append(Collective(f"{of}, added up", "all_gather", calls, nbytes))
        else:
            found.append(Collective(of, "all_reduce", calls, nbytes))
    head = next(item for item in laid.loads if item.to == "head.weight")
    part = next(iter(head.parts()))
    kernel = laid.ops.linear(part.format, part.local[0], part.local[1], head.shared)
    width = max(len(laid.share(r).vocab) for r in range(laid.ranks.size)) * laid.ranks.size
    each = 4 if hasattr(kernel, "wide") else laid.dtype.itemsize
    found.append(Collective("logits", "all_gather", 1, wanted * width * each))
    return tuple(found)
