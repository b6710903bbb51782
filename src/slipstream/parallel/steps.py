"""Steps, from rank 0 to all others: one message where torch sends two, as most are a few kilobytes."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

ROOM = 16 << 10  # bytes of the first message
_COUNT = 8  # of them say how long all of it is


def send(words: Any, group: dist.ProcessGroup) -> None:
    data = pickle.dumps(words, pickle.HIGHEST_PROTOCOL)
    message = np.zeros(ROOM, np.uint8)
    first, rest = data[: ROOM - _COUNT], data[ROOM - _COUNT :]
    message[:_COUNT] = np.frombuffer(len(data).to_bytes(_COUNT, "little"), np.uint8)
    message[_COUNT : _COUNT + len(first)] = np.frombuffer(first, np.uint8)
    group.broadcast(torch.from_numpy(message), 0).wait()
    if rest:
        group.broadcast(torch.frombuffer(bytearray(rest), dtype=torch.uint8), 0).wait()


def receive(group: dist.ProcessGroup) -> Any:
    """From rank 0, which is this same program on a machine of this launch."""
    message = torch.empty(ROOM, dtype=torch.uint8)
    group.broadcast(message, 0).wait()
    data = message.numpy().tobytes()
    count, data = int.from_bytes(data[:_COUNT], "little"), data[_COUNT:]
    if count > len(data):
        rest = torch.empty(count - len(data), dtype=torch.uint8)
        group.broadcast(rest, 0).wait()
        data += rest.numpy().tobytes()
    return pickle.loads(data[:count])
