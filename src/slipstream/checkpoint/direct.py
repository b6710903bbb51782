"""Readers whose loop is in C (ops/native/transfer.c): reads, copies and waits of some blocks in one call.

In Python each block costs every reader the interpreter's lock a few times, some 100 us in all, so that blocks have to be large,
and with them the buffers, which then no longer fit the processor's cache. Here they can be small, and a reader has two: it
reads one while the other is copied.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

READ, COPY, RECORD, WAIT = range(4)
SLOTS = 2


class _Card(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("copy", "record", "wait", "stream")),
        ("events", ctypes.c_void_p * SLOTS),
    )


@dataclass(frozen=True, slots=True)
class Calls:
    """How to copy to a card, for one thread.

    Attributes:
        copy: address of a function of CUDA's driver: (address there, address here, bytes, stream) -> 0
        record: (event, stream) -> 0
        wait: (event) -> 0
        events: one for each slot of the buffer.
        held: what has to live as long as this.
    """

    copy: int
    record: int
    wait: int
    stream: int
    events: Sequence[int]
    held: Any = None

    def run(self, steps: Steps, buffer: int) -> int:
        """Do the steps, without the interpreter's lock; how many were done. `buffer`: its address."""
        from slipstream.ops.native import load

        function = load("transfer").slipstream_transfer
        function.restype = ctypes.c_long
        card = _Card(self.copy, self.record, self.wait, self.stream, (ctypes.c_void_p * SLOTS)(*self.events))
        numbers, count = steps.numbers.buffer_info()
        done: int = function(
            ctypes.c_void_p(numbers), ctypes.c_long(count // 5), ctypes.c_void_p(buffer), ctypes.byref(card)
        )
        return done


class Steps:
    """A list of reads into slots of a buffer, copies out of them, and waits between."""

    def __init__(self) -> None:
        self.numbers = array("l")

    def __len__(self) -> int:
        return len(self.numbers) // 5

    def read(self, file: int, offset: int, place: int, nbytes: int) -> None:
        self.numbers.extend((READ, file, offset, place, nbytes))

    def copy(self, to: int, place: int, nbytes: int) -> None:
        self.numbers.extend((COPY, to, 0, place, nbytes))

    def record(self, slot: int) -> None:
        self.numbers.extend((RECORD, slot, 0, 0, 0))

    def wait(self, slot: int) -> None:
        self.numbers.extend((WAIT, slot, 0, 0, 0))


def driver(*names: str) -> list[int]:
    """Addresses of functions of CUDA's own library, which is there where a card is, and stays."""
    library = ctypes.CDLL("libcuda.so.1")
    return [ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in names]
