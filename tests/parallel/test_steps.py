"""What rank 0 sends is what others receive, whether it fits into one message or not. Two ranks as threads of one process."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from slipstream.parallel.steps import ROOM, receive, send
from slipstream.request import Chunk, PageTable, Step


@pytest.mark.timeout(60)
def test_all_arrives_in_order(tmp_path: Path) -> None:
    sizes = (0, 1, ROOM - 20, *range(ROOM - 14, ROOM - 6), ROOM + 1, 5 * ROOM)
    step = Step(
        3, (), (7,), tuple(Chunk(i, 200 + i, (5,), (PageTable(0, tuple(range(i))),) * 2, True) for i in range(99))
    )
    words: list[Any] = [*(b"x" * n for n in sizes), step, {"a": None}]
    store, came = dist.FileStore(str(tmp_path / "store"), 2), []

    def work(rank: int) -> None:
        group: Any = dist.ProcessGroupGloo(store, rank, 2)
        for word in words:
            if rank:
                came.append(receive(group))
            else:
                send(word, group)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert came == words
