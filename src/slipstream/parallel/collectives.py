"""What ranks say to each other while they compute. Every rank calls the same ones in the same order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slipstream.config import ModelConfig
from slipstream.ops.moe import Pairs
from slipstream.ops.reduce import Slots
from slipstream.ops.reduce.reference import reduce as collective
from slipstream.parallel.peers import Peers
from slipstream.parallel.shares import Ranks, Share, part, vocab_part

LOOK = timedelta(seconds=3)  # gloo sometimes waits on for a rank that is gone: how often that is looked up
gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the older name


@dataclass(frozen=True, slots=True)
class Wires:
    """What ranks speak through.

    Attributes:
        tensors: None is the default group of torch.distributed.
        words: for what is said between steps.
        peers: the ranks' memory, where they share it; else why_not may say why.
        machines: 1, or more.
        check: raises if a rank is gone, where that is known.
        stuck: what went on waiting for one that was.
    """

    tensors: dist.ProcessGroup | None = None
    words: dist.ProcessGroup | None = None
    peers: Peers | None = None
    why_not: str | None = None
    machines: int = 1
    check: Callable[[], object] = lambda: None
    stuck: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Parts:
    """Of a sum over ranks, what this one has: the norm that comes next makes the sum, as one kernel.

    Attributes:
        ops: `reduce` and `reduce_norm`.
    """

    own: Tensor | Pairs
    ops: Any
    slots: Slots

    def sum(self) -> Tensor:
        found: Tensor = self.ops.reduce(whole(self.own), self.slots)
        return found

    def add_norm(self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """x + the sum, and the norm of it."""
        found: tuple[Tensor, Tensor] = self.ops.reduce_norm(self.own, x, weight, eps, self.slots, dtype)
        return found


Delta = Tensor | Pairs | Parts  # what is still to be added to the residual, some of it not yet added itself


def whole(x: Delta) -> Tensor:
    """Where no norm comes next."""
    return x if isinstance(x, Tensor) else x.sum()


class Alone:
    """One rank: nothing to say."""

    ranks = Ranks()
    experts = None
    is_silent = False

    def silent(self) -> AbstractContextManager[None]:
        return nullcontext()

    def reduce(self, x: Tensor | Pairs) -> Delta:
        return x

    def gather(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return x


class Together:
    """Ranks of a torch.distributed group.

    Attributes:
        vocab: rows of embedding and head that are here.
        experts: those that are here, where they are spread over the ranks; None where each has a part of them all.
        is_silent: others are not spoken to.
        exchange_from: tokens of a step from which on what they gave comes together by all-to-all.
        counted: of the key heads here, those that a sum over all ranks takes from this one, as others have them too.
        widths: of all queries and of all keys of a token.
    """

    def __init__(
        self,
        wires: Wires,
        config: ModelConfig,
        ranks: Ranks,
        share: Share,
        ops: Any = None,
        exchange_from: int | None = None,
    ) -> None:
        self.ranks, self._group, self._check, self._stuck = ranks, wires.tensors, wires.check, wires.stuck
        self._ops, self._slots = ops, None if wires.peers is None else wires.peers.slots
        self.vocab = share.vocab
        self.experts = share.experts if len(share.experts) < config.num_experts else None
        self._widths = [len(vocab_part(config.vocab_size, Ranks(i, ranks.size))) for i in range(ranks.size)]
        each = config.num_heads // config.num_kv_heads
        kv = share.kv_heads
        self.counted = [h * each in share.heads and h not in kv[:i] for i, h in enumerate(kv)]
        self.widths = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim)
        self.is_silent = False
        self.exchange_from = exchange_from
        homes = [i for i in range(ranks.size) for _ in part(config.num_experts, Ranks(i, ranks.size))]
        self._homes = torch.tensor(homes)  # the rank of each expert

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Others are not spoken to: what comes of a step means nothing. For a rehearsal of this rank alone."""
        self.is_silent = True
        try:
            yield
        finally:
            self.is_silent = False

    def reduce(self, x: Tensor | Pairs) -> Delta:
        """The sum over all ranks, on all of them, or what becomes it. x may be overwritten."""
        if self._slots is not None and self._slots.take(x):
            return Parts(x, self._ops, self._slots)
        return whole(x) if self.is_silent else collective(whole(x), self._speak)

    def _speak(self, say: Callable[..., Any], *words: Any) -> None:
        """Something that all ranks say. On CPUs a rank that is gone does not keep this one waiting."""
        if words[0].is_cuda:
            say(*words, group=self._group)
            return
        work = say(*words, group=self._group, async_op=True)
        while True:
            try:
                work.wait(LOOK)
                return
            except RuntimeError:
                if work.is_completed():  # by now, or with an error of its own
                    work.wait()
                    return
                try:
                    self._check()
                except BaseException:
                    self._stuck.append(work)
                    raise

    def combine(self, x: Tensor | Pairs, ids: Tensor) -> Delta:  # (tokens, hidden), (tokens, top_k)
        """The sum over all ranks of what spread experts gave, on all of them. Of a token that no expert here had, x is zero.

        Args:
            ids: numbers of experts in the whole model.
        """
        if self.exchange_from is None or len(x) < self.exchange_from or self.is_silent:
            return self.reduce(x)
        x, size, rank, tokens = whole(x), self.ranks.size, self.ranks.rank, len(x)
        each = -(-tokens // size)  # tokens that a rank adds up
        self._homes = self._homes.to(x.device)
        had = torch.zeros(size * each, size, dtype=torch.bool, device=x.device)
        had[:tokens].scatter_(1, self._homes[ids.long()], True)
        had = had.view(size, each, size)  # who adds it up, which, who had it
        counts = had.sum(1).tolist()  # all ranks know all of them, as each knows the router's choice
        come, go = counts[rank], [row[rank] for row in counts]
        there = x.new_empty(sum(come), x.shape[1])
        self._speak(dist.all_to_all_single, there, x[had[:, :, rank].reshape(-1)[:tokens]], come, go)
        total = torch.zeros(each, x.shape[1], device=x.device)
        for rows, which in zip(there.split(come), had[rank].unbind(1), strict=True):  # in the order of the ranks
            total[which] += rows.float()
        out = x.new_empty(size * each, x.shape[1])
        self._speak(gather_into, out, total.to(x.dtype))
        return out[:tokens]

    def gather(self, x: Tensor, out: Tensor | None = None) -> Tensor:  # (rows, own vocabulary) -> (rows, vocabulary)
        """Everybody's columns, side by side; in `out` if it is given."""
        rows, most = len(x), max(self._widths)
        if x.shape[1] < most:
            x = torch.nn.functional.pad(x, (0, most - x.shape[1]))
        if out is None:
            out = x.new_empty(rows, sum(self._widths))
        # Of one row and even parts, each can arrive where it belongs.
        straight = rows == 1 and len(set(self._widths)) == 1 and out.dtype == x.dtype
        parts = (out if straight else x.new_empty(rows * len(self._widths), most)).view(len(self._widths), rows, most)
        if not self.is_silent:
            self._speak(gather_into, parts.view(len(self._widths) * rows, most), x.contiguous())
        for theirs, columns in zip(() if straight else parts, out.split(self._widths, 1), strict=not straight):
            columns.copy_(theirs[:, : columns.shape[1]])
        return out
