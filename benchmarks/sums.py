"""Sums over two cards: what goes through shared memory is compared with NCCL, then both are timed, as CUDA graphs of many in a row.

tests/gpu/test_parallel.py and benchmarks/parallel.py run it; by itself: python benchmarks/sums.py
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slipstream.ops.norm.reference import add_norm
from slipstream.ops.norm.triton import add_norm as triton_norm
from slipstream.ops.reduce.triton import reduce, reduce_norm
from slipstream.parallel.connect import connect
from slipstream.parallel.shares import Ranks

ROWS, WIDTH, MANY = (1, 8, 64, 256), 2880, 72


def right(slots: Any, device: torch.device) -> None:
    """Random numbers in both types, and shapes that follow on each other as they like."""
    source = torch.Generator(device).manual_seed(slots.rank)
    for i in range(200):
        dtype = (torch.bfloat16, torch.float32)[i % 2]
        rows, width = ((1, 2880), (5, 64), (256, 2880), (64, 4096), (3, 130))[i % 5]
        own = torch.randn(rows, width, device=device, generator=source).to(dtype)
        want = own.clone()
        dist.all_reduce(want)
        assert torch.equal(reduce(own, slots), want), (i, "two ranks' sum is the same in any order")
        x, weight = (
            torch.randn(n, width, device=device, generator=torch.Generator(device).manual_seed(9 + n))
            for n in (rows, 1)
        )
        x, weight = x.to(dtype), weight[0].to(dtype)
        total, found = reduce_norm(own, x, weight, 1e-5, slots)
        assert torch.equal(total, x + want), i
        exact = add_norm(total.double(), None, weight.double(), 1e-5)[1]
        off = ((found - exact).abs() / (exact.abs() + 1e-3)).max().item()
        assert off < (5e-3 if dtype == torch.bfloat16 else 1e-5), (i, off)


def recorded(run: Callable[[], Tensor]) -> torch.cuda.CUDAGraph:
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        for _ in range(MANY):
            run()
    return graph


def microseconds(graph: torch.cuda.CUDAGraph) -> float:
    """Of one of the many."""
    best = float("inf")
    for _ in range(8):
        dist.barrier()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(5):
            graph.replay()
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - began) / 5)
    return 1e6 * best / MANY


def rank(number: int, port: int) -> None:
    device, size = torch.device("cuda", number), 2
    store = dist.TCPStore("127.0.0.1", port, is_master=not number, wait_for_workers=False)
    wires = connect(Ranks(number, size), store, device, True, None)
    said: dict[str, Any] = {"why_not": wires.why_not, "us": {}}
    if wires.peers is not None:
        right(wires.peers.slots, device)
    for rows in ROWS:
        x, own = (torch.randn(rows, WIDTH, device=device).bfloat16() for _ in range(2))
        weight = torch.ones(WIDTH, device=device).bfloat16()

        def nccl(x: Tensor = x, own: Tensor = own, weight: Tensor = weight) -> Tensor:
            dist.all_reduce(own)
            return triton_norm(x, own, weight, 1e-5)[1]

        def norm(x: Tensor = x, own: Tensor = own, weight: Tensor = weight) -> Tensor:
            return triton_norm(x, own, weight, 1e-5)[1]

        def shared(x: Tensor = x, own: Tensor = own, weight: Tensor = weight) -> Tensor:
            return reduce_norm(own, x, weight, 1e-5, wires.peers.slots)[1]

        ways = {"norm alone": norm, "nccl and norm": nccl}
        if wires.peers is not None:
            ways["shared memory, with norm"] = shared
        said["us"][rows] = {name: round(microseconds(recorded(way)), 2) for name, way in ways.items()}
    if not number:
        print(json.dumps(said), flush=True)
    dist.barrier()
    torch.cuda.synchronize()
    sys.stdout.flush()
    os._exit(0)  # graphs hold the group


def main() -> None:
    if len(sys.argv) > 1:
        rank(int(sys.argv[1]), int(sys.argv[2]))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = [subprocess.Popen([sys.executable, str(Path(__file__)), str(r), str(port)]) for r in range(2)]
    try:
        codes = [r.wait(100) for r in ranks]
    finally:
        for r in ranks:
            r.kill()
    raise SystemExit(max(abs(c) for c in codes))


if __name__ == "__main__":
    main()
