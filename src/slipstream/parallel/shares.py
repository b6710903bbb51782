"""Which part of a model a rank has. Plain integers; no torch.

Attention is cut by heads, feed-forward layers by their inner width, embedding and head by the vocabulary; experts by their inner
width too, or they are spread whole. Parts differ by one unit at most, where sizes do not divide: a unit is a head, or as many
heads or inner columns as a block of weights that share a scale covers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from slipstream.config import ModelConfig
from slipstream.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Ranks:
    """Where this process stands among `size` that share a model."""

    rank: int = 0
    size: int = 1


ALONE = Ranks()


@dataclass(frozen=True, slots=True)
class Unit:
    """What is not cut apart: this many, and why."""

    size: int = 1
    why: str = ""


ONE = Unit()


@dataclass(frozen=True, slots=True)
class Units:
    """Of query heads, and of columns inside a feed-forward layer or an expert."""

    heads: Unit = ONE
    inner: Unit = ONE


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part.

    Attributes:
        heads: query heads.
        kv_heads: for each key head here, which of the model's it is. One is on several ranks where ranks outnumber them; it is
            here more than once where the query heads of this rank do not fill whole groups.
        inner, expert_inner: columns inside a dense feed-forward layer, and inside an expert.
        experts: whole ones; all of them where they are cut inside.
        vocab: rows of embedding and head.
    """

    heads: range
    kv_heads: tuple[int, ...]
    inner: range
    expert_inner: range
    experts: range
    vocab: range


@dataclass(frozen=True, slots=True)
class Cut:
    """What of a parameter is here: these ranges of `dim`, one after the other.

    Attributes:
        dim: counted from the end: 1 is the last one (inputs of a matrix), 2 the one before (its outputs), 3 the experts of a stack.
        ranges: empty ranges are nothing; None is all of it.
        zero: it is all here, as zeros: another rank has it, and what ranks compute is added up.
    """

    dim: int = 1
    ranges: tuple[range, ...] | None = None
    zero: bool = False

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """What is left of this shape."""
        if self.ranges is None:
            return whole
        at = len(whole) - self.dim
        return (*whole[:at], sum(map(len, self.ranges)), *whole[at + 1 :])

    def within(self, rows: range) -> Cut:
        """The same of some rows of a matrix alone, counted from the first of them."""
        if self.ranges is None or self.dim != 2:
            return self
        found = (range(max(r.start, rows.start) - rows.start, min(r.stop, rows.stop) - rows.start) for r in self.ranges)
        return Cut(2, tuple(r for r in found if len(r)), self.zero)


WHOLE = Cut()


def part(total: int, ranks: Ranks, unit: int = 1) -> range:
    """A rank's part of `total`, in whole units; the first ranks have one more where it does not divide."""
    count = -(-total // unit)
    each, more = divmod(count, ranks.size)
    start = ranks.rank * each + min(ranks.rank, more)
    end = start + each + (ranks.rank < more)
    return range(min(start * unit, total), min(end * unit, total))


def share_of(config: ModelConfig, ranks: Ranks, units: Units | None = None, *, spread: bool = False) -> Share:
    """Args:
        spread: experts are whole, each on one rank.

    Raises:
        ConfigError: there is less of something than ranks.
    """
    units = units or Units()
    heads = _part("heads", config.num_heads, ranks, units.heads)
    inner = range(config.intermediate_size)
    if any(not layer.moe for layer in config.layers):
        size = config.intermediate_size
        inner = _part("columns inside a feed-forward layer", size, ranks, _even(size, ranks, units.inner))
    expert_inner, experts = range(config.moe_intermediate_size), range(config.num_experts)
    if spread and not experts:
        raise ConfigError(f"enable_expert_parallel: a {config.model_type} model has no experts")
    if spread:
        experts = _part("experts", config.num_experts, ranks)
    elif experts:
        size = config.moe_intermediate_size
        expert_inner = _part("columns inside an expert", size, ranks, _even(size, ranks, units.inner))
    group = config.num_heads // config.num_kv_heads
    kv = range(heads.start // group, (heads.stop - 1) // group + 1)
    filled = len(kv) == 1 or (heads.start % group == 0 and heads.stop % group == 0)
    kv_heads = tuple(kv) if filled else tuple(h // group for h in heads)
    vocab = vocab_part(config.vocab_size, ranks)
    if config.vocab_size < ranks.size:
        raise ConfigError(
            f"tensor_parallel_size: {ranks.size} ranks are more than the {config.vocab_size} words of the vocabulary"
        )
    return Share(heads, kv_heads, inner, expert_inner, experts, vocab)


def vocab_part(total: int, ranks: Ranks) -> range:
    """A rank's words."""
    return part(total, ranks, _even(total, ranks, ONE).size)


def _even(total: int, ranks: Ranks, unit: Unit) -> Unit:
    """Kernels like sizes of many twos: a larger unit, where that makes the largest part an eighth larger at most."""
    sizes = (math.lcm(unit.size, twos) for twos in (32, 16, 8, 4, 2))
    return Unit(next((n for n in sizes if total >= 8 * n * ranks.size), unit.size), unit.why)


def _part(what: str, total: int, ranks: Ranks, unit: Unit = ONE) -> range:
    found = part(total, ranks, unit.size)
    most = -(-total // unit.size)
    if most < ranks.size:
        why = f", as {unit.why}" if unit.why else ""
        raise ConfigError(
            f"tensor_parallel_size: {ranks.size} ranks cannot share {total} {what}, which make {most} parts at most{why}; "
            f"take {most} ranks or fewer"
        )
    return found


def local_config(config: ModelConfig, share: Share) -> ModelConfig:
    """The sizes of the layers on this rank. `num_experts` stays: every rank's router knows all of them."""
    return replace(
        config,
        vocab_size=len(share.vocab),
        num_heads=len(share.heads),
        num_kv_heads=len(share.kv_heads),
        intermediate_size=len(share.inner),
        moe_intermediate_size=len(share.expert_inner),
    )


def cut_of(to: str, shard: str | None, shape: tuple[int, ...], config: ModelConfig, share: Share, ranks: Ranks) -> Cut:
    """What this rank has of a parameter.

    Args:
        to: its name.
        shard: as its rule says.
        shape: of all of it.
    """
    if ranks.size == 1:
        return WHOLE
    dim, bias = config.head_dim, to.endswith("bias")
    row = 1 if bias else 2  # where outputs are
    if shard == "vocab":
        return Cut(row, (share.vocab,))
    if to.endswith("attention.sinks"):
        return Cut(1, (share.heads,))
    if ".qkv." in to:
        q, k, v = 0, config.num_heads * dim, (config.num_heads + config.num_kv_heads) * dim
        return Cut(row, (_scale(share.heads, dim, q), *(_one(h, dim, at) for at in (k, v) for h in share.kv_heads)))
    if to.endswith((".q_norm.weight", ".k_norm.weight")) and shape[0] != dim:
        ranges: Iterable[range] = [share.heads] if ".q_norm." in to else (range(h, h + 1) for h in share.kv_heads)
        return Cut(1, tuple(_scale(r, dim, 0) for r in ranges))
    if to.endswith("attention.out.weight"):
        return Cut(1, (_scale(share.heads, dim, 0),))
    inner, width = share.inner, config.intermediate_size
    if shard == "expert":
        if len(share.experts) < config.num_experts:
            return Cut(len(shape), (share.experts,))
        inner, width = share.expert_inner, config.moe_intermediate_size
    if ".gate_up." in to:
        return Cut(row, (inner, range(width + inner.start, width + inner.stop)))
    if to.endswith("mlp.down.weight"):
        return Cut(1, (inner,))
    if to.endswith(("attention.out.bias", "mlp.down.bias")):
        return Cut(zero=ranks.rank > 0)
    return WHOLE


def _scale(heads: range, dim: int, first: int) -> range:
    return range(first + heads.start * dim, first + heads.stop * dim)


def _one(head: int, dim: int, first: int) -> range:
    return range(first + head * dim, first + (head + 1) * dim)
