"""Logits of all ranks side by side, whatever their widths. No other process: what others have is put where it would come."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slipstream.config import ModelConfig
from slipstream.errors import RankError
from slipstream.parallel import collectives
from slipstream.parallel.collectives import Together, Wires
from slipstream.parallel.shares import Ranks, share_of
from tests.engine.tiny import LLAMA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize(("vocab", "size"), [(131, 2), (128, 2), (131, 3), (96, 3)])
@pytest.mark.parametrize("given", [True, False], ids=["given", "made"])
def test_logits_stand_side_by_side(
    vocab: int, size: int, rows: int, dtype: torch.dtype, given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig.from_hf({**LLAMA, "vocab_size": vocab, "num_attention_heads": 6, "hidden_size": 48})
    shares = [share_of(config, Ranks(i, size)) for i in range(size)]
    whole = torch.randn(rows, vocab).to(dtype)
    widest = max(len(s.vocab) for s in shares)

    def gather(out: torch.Tensor, x: torch.Tensor, group: Any, async_op: bool) -> Any:
        own = [whole[:, s.vocab.start : s.vocab.stop] for s in shares]
        padded = [torch.cat((part, torch.full((rows, widest - part.shape[1]), 7, dtype=dtype)), 1) for part in own]
        assert x.shape == (rows, widest) and torch.equal(x[:, : own[1].shape[1]], own[1]) and out.is_contiguous()
        out.copy_(torch.cat(padded))
        return SimpleNamespace(wait=lambda most: None)

    monkeypatch.setattr(collectives, "gather_into", gather)
    here = Together(Wires(), config, Ranks(1, size), shares[1])
    out = torch.full((rows, vocab), 9.0) if given else None
    found = here.gather(whole[:, shares[1].vocab.start : shares[1].vocab.stop], out)
    assert torch.equal(found.to(dtype), whole) and (found is out) == given
    assert found.dtype == (torch.float32 if given else dtype)


def test_a_rank_that_is_gone_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gloo waits on for it, once in some fifty kills."""

    class Stuck:
        done = False

        def wait(self, most: object = None) -> None:
            if not self.done:
                raise RuntimeError("Operation timed out!")

        def is_completed(self) -> bool:
            return self.done

    looked: list[int] = []
    work = Stuck()

    def check() -> None:
        looked.append(1)
        if len(looked) == 2:
            raise RankError("rank 1 was killed")
        work.done = len(looked) > 2

    config = ModelConfig.from_hf(LLAMA)
    wires = Wires(check=check)
    here = Together(wires, config, Ranks(0, 2), share_of(config, Ranks(0, 2)))
    monkeypatch.setattr(collectives.dist, "all_reduce", lambda x, group, async_op: work)
    with pytest.raises(RankError, match="rank 1 was killed"):
        here.reduce(torch.ones(2, 3))
    assert wires.stuck == [work]
    assert torch.equal(here.reduce(torch.ones(2, 3)), torch.ones(2, 3)) and len(looked) == 3 and len(wires.stuck) == 1
