"""How ranks that have found each other speak: torch.distributed with NCCL on GPUs and gloo on CPUs, and shared memory of cards."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from slipstream.parallel.collectives import Wires, gather_into
from slipstream.parallel.peers import join
from slipstream.parallel.shares import Ranks

FOREVER = timedelta(days=999)  # between two requests; who is gone is noticed otherwise


def connect(ranks: Ranks, store: dist.Store, device: torch.device, here: bool, reduce: str | None) -> Wires:
    """Args:
    here: all ranks are on this machine, so nobody else needs to reach the sockets of gloo.
    reduce: the implementation of sums that was asked for.
    """
    name = "GLOO_SOCKET_IFNAME"
    if here and name not in os.environ and sys.platform == "linux":
        os.environ[name] = "lo"
        try:
            return _connect(ranks, store, device, here, reduce)
        finally:
            del os.environ[name]
    return _connect(ranks, store, device, here, reduce)


def _connect(ranks: Ranks, store: dist.Store, device: torch.device, here: bool, reduce: str | None) -> Wires:
    peers, why = None, None
    options: dict[str, Any] = {"store": store, "rank": ranks.rank, "world_size": ranks.size, "timeout": FOREVER}
    if device.type == "cuda":
        # Else torch ends this process when another rank, or its store, is gone; we want to say which one it was.
        for name in ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ENABLE_MONITORING"):
            os.environ.setdefault(name, "0")
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, **options)
        # Channels take memory when they are first used: before what is free gets divided, and before a graph records them.
        for count in (1, 1 << 22):
            x = torch.zeros(count, device=device)
            dist.all_reduce(x)
            gather_into(x.new_empty(ranks.size * count), x)
        torch.cuda.synchronize(device)
        if here and reduce != "collective":
            peers, why = join(ranks, store, device, partial(_all_agree, device))
    else:
        dist.init_process_group("gloo", **options)
    words = dist.new_group(backend="gloo", timeout=FOREVER)
    return Wires(dist.group.WORLD, words, peers, why or None, 1 if here else 2)


def _all_agree(device: torch.device, good: bool) -> bool:
    found = torch.tensor(int(good), device=device)
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return bool(found)
