"""Loading onto a CUDA device: the same bytes as on the CPU in every format, and nothing left of what was interrupted.

Run with: pytest -m gpu tests/gpu
"""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
import torch

from slipstream import LLM
from slipstream.checkpoint.load import load, transfer
from slipstream.checkpoint.open import open_checkpoint
from slipstream.checkpoint.tensors import TensorInfo
from slipstream.checkpoint.transfer import Card, Transfer
from slipstream.errors import CheckpointError
from slipstream.ops.moe.layout import begin
from tests.checkpoint.test_load import plan_of
from tests.checkpoint.test_transfer import KINDS, folder_of, tensors_of
from tests.parity.test_architectures import all_logits

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes(kind: str, tmp_path: Path) -> None:
    """A plan for the CPU both times, so that layers keep weights as they are handed over."""
    path, options = folder_of(kind, tmp_path)
    plans = [plan_of(path, device="cpu", linear_implementation="reference", **options) for _ in range(2)]
    checkpoint = open_checkpoint(path)
    load(plans[0].model, plans[0].loads, checkpoint, plans[0].device)
    others = {n for n, t in tensors_of(plans[1].model).items() if not t.is_meta}  # such as the angles of positions
    done = sum(transfer(plans[1].model, plans[1].loads, checkpoint, Card(CUDA)))
    want, got = (tensors_of(p.model) for p in plans)
    assert want.keys() == got.keys() and len(want) > 20
    for name in want.keys() - others:
        value = want[name]
        assert got[name].dtype == value.dtype
        assert got[name].device == CUDA or value.dtype == torch.int64, name  # the reference notes a shape
        mine, theirs = (t.cpu().contiguous().view(-1).view(torch.uint8) for t in (got[name], value))
        assert torch.equal(mine, theirs), name
    assert done == sum(s.nbytes for i in plans[1].loads if not i.shared for s in i.sources)


@pytest.mark.parametrize("direct", [False, True])
def test_many_blocks_through_few_buffers(direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer that is read into before its copy is done would show: blocks are many, and the stream is kept busy."""
    path = tmp_path / "x"
    data = torch.randint(256, (64 << 20,), dtype=torch.uint8)
    path.write_bytes(data.numpy().tobytes())
    wanted = [[TensorInfo(str(i), "U8", (4 << 20,), 4 << 20, path, i * (4 << 20))] for i in range(16)]
    card = Card(CUDA)
    if not direct:
        monkeypatch.setattr(Card, "direct", False)
    assert card.direct == direct
    arrivals = Transfer(wanted, card, readers=3, block=300_000)
    got = {}
    with card.aside():
        busy = torch.randn(4096, 4096, device=CUDA)
        for _, complete in arrivals.arrive():
            busy = busy @ busy * 1e-3
            got |= {i: arrivals.take(i)[wanted[i][0]] for i in complete}
    card.finish()
    assert torch.equal(torch.cat([got[i] for i in range(16)]).cpu(), data)


def allocated() -> int:
    begin(torch.device("cuda", 0)).join()  # its tables stay
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    path, options = folder_of("qwen3_moe made int4", tmp_path)
    before = allocated()
    plan = plan_of(path, device="cuda", **options)
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(plan.model, plan.loads, open_checkpoint(path), plan.device, stop)
    assert seen and not [t for t in threading.enumerate() if t.name.startswith("slipstream-read")]
    del plan
    assert allocated() == before
    llm = LLM(path, device="cuda", dtype="float32", kv_cache_memory_bytes=8 << 20, max_model_len=64)
    assert torch.cat(all_logits(llm, [[1, 2, 3]])).isfinite().all()


def test_damage_leaves_nothing(tmp_path: Path) -> None:
    path, options = folder_of("llama made int8", tmp_path)
    before = allocated()
    shard = sorted(path.glob("*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-3] ^= 16
    shard.write_bytes(data)
    plan = plan_of(path, device="cuda", **options)
    with pytest.raises(CheckpointError, match=f"{shard.name}: is damaged"):
        load(plan.model, plan.loads, open_checkpoint(path), plan.device)
    del plan
    assert allocated() == before


@pytest.mark.parametrize("kind", ["gpt_oss published", "qwen3_moe made int4", "llama made int8"])
def test_random_weights(kind: str, tmp_path: Path) -> None:
    path, _ = folder_of(kind, tmp_path)
    asked = {"device": "cuda", "kv_cache_memory_bytes": 8 << 20, "max_model_len": 64, "weights": "random"}
    one, same = (all_logits(LLM(path, **asked), [[1, 2, 3], [4]]) for _ in range(2))
    assert torch.cat(one).isfinite().all() and torch.equal(torch.cat(one), torch.cat(same))


def test_buffers_are_not_kept() -> None:
    card = Card(CUDA)
    with card.pinned(1 << 20) as buffer:
        assert buffer.is_pinned()
        there = torch.empty(1 << 20, dtype=torch.uint8, device=CUDA)
        with card.beside():
            there.copy_(buffer.fill_(7), non_blocking=True)
    assert not buffer.is_pinned() and bool((there == 7).all())
