"""Ranks of one machine that reach into each other's GPU memory, for sums too small for a library to be quick at.

A rank allocates memory, and opens that of the others by the handles of CUDA's IPC, which go through the ranks' store. NVLink
multicast is not used. Whether it works is tried before it is relied on, and all ranks take it or none. Not tried on cards yet.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from slipstream.errors import KernelError
from slipstream.ops.reduce import RANKS, ROWS, WORDS, Slots
from slipstream.parallel.shares import Ranks

PATIENCE = 10.0  # seconds for a first sum
SHAPES = ((1, 2880), (ROWS, 2048))  # of those that are tried
_LAZY_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_char * 64),)


class Peers:
    """Memory that all ranks see. `slots` are what kernels take."""

    def __init__(self, ranks: Ranks, store: dist.Store, device: torch.device) -> None:
        """Raises OSError, KernelError: it cannot be had on this machine."""
        self._device = device
        self._aside = torch.cuda.Stream(device, priority=-1)  # those of this kind are nobody else's here
        self._opened: list[ctypes.c_uint64] = []
        key = f"peers/{ranks.rank}"
        try:
            self._driver = ctypes.CDLL("libcuda.so.1")
            count = torch.ones(ROWS, dtype=torch.int32, device=device)  # makes the device's context the current one
            self._own = ctypes.c_uint64()
            nbytes = 2 * ranks.size * ROWS * WORDS * 8
            self._call("cuMemAlloc_v2", ctypes.byref(self._own), ctypes.c_size_t(nbytes))
            self._call("cuMemsetD8_v2", self._own, ctypes.c_ubyte(0), ctypes.c_size_t(nbytes))
            torch.cuda.synchronize(device)
            handle = _Handle()
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), self._own)
        except BaseException:
            store.set(key, "")  # nobody waits for it
            raise
        store.set(key, bytes(handle).hex())
        places = [self._own.value if r == ranks.rank else self._open(store, r) for r in range(ranks.size)]
        table = torch.tensor(places, dtype=torch.int64, device=device)
        stop = torch.zeros(1, dtype=torch.int32, device=device)
        self.slots = Slots(ranks.rank, ranks.size, table, count, stop)

    def _open(self, store: dist.Store, rank: int) -> int:
        said = store.get(f"peers/{rank}").decode()
        if not said:
            raise KernelError(f"rank {rank} has no memory to share")
        there = ctypes.c_uint64()
        handle = _Handle.from_buffer_copy(bytes.fromhex(said))
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(there), handle, ctypes.c_uint(_LAZY_PEER_ACCESS))
        self._opened.append(there)
        return there.value

    def _call(self, name: str, *arguments: object) -> None:
        if code := getattr(self._driver, name)(*arguments):
            text = ctypes.c_char_p()
            self._driver.cuGetErrorName(code, ctypes.byref(text))
            raise KernelError(f"{name}: {(text.value or b'error %d' % code).decode()}")

    def end(self) -> None:
        """Nobody on this card waits any more."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._aside):
            self.slots.stop.copy_(torch.ones(1, dtype=torch.int32))  # no kernel, which might wait for those that wait

    def free(self) -> None:
        """Nothing that was recorded with them runs again."""
        self.end()
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            for there in self._opened:
                self._call("cuIpcCloseMemHandle", there)
            self._call("cuMemFree_v2", self._own)

    def refuse(self) -> str | None:
        """Why sums cannot be relied on. All ranks call it at the same time."""
        from slipstream.ops.reduce.triton import reduce

        for rows, width in SHAPES:
            numbers = torch.arange(rows * width, device=self._device).view(rows, width) % 13
            mine, want = numbers + self.slots.rank, numbers * self.slots.size + sum(range(self.slots.size))
            found: Tensor = reduce(mine.bfloat16(), self.slots)
            done, began = torch.cuda.Event(), time.monotonic()
            done.record()
            while not done.query():
                if time.monotonic() - began > PATIENCE:
                    self.end()
                    return f"no sum came within {PATIENCE:.0f} s"
                time.sleep(0.001)
            if not torch.equal(found, want.bfloat16()):
                return "a sum of known numbers was wrong"
        return None


def join(
    ranks: Ranks, store: dist.Store, device: torch.device, all_agree: Callable[[bool], bool]
) -> tuple[Peers | None, str]:
    """All ranks together. Else None, and why.

    Args:
        all_agree: whether all ranks say yes.
    """
    if ranks.size > RANKS:
        return None, ""
    peers, why = None, ""
    try:
        peers = Peers(ranks, store, device)
        _compile(peers.slots)
    except (OSError, RuntimeError, ImportError, KernelError) as e:
        why = f"the cards' memory is not shared: {type(e).__name__}: {e}"
    if not all_agree(not why):
        return None, why or "another rank cannot share its card's memory"
    assert peers is not None
    why = peers.refuse() or ""
    return (peers, "") if all_agree(not why) else (None, why or "a sum on another rank fails")


def _compile(slots: Slots) -> None:
    """So that no rank waits for another one's compiler. These sums have numbers of their own, and wait for nobody."""
    from slipstream.ops.reduce.triton import reduce

    counts, stop = torch.full_like(slots.counts, -3), torch.ones_like(slots.stop)
    alone = Slots(slots.rank, slots.size, slots.table, counts, stop)
    for rows, width in SHAPES:
        reduce(torch.zeros(rows, width, dtype=torch.bfloat16, device=stop.device), alone)
    torch.cuda.synchronize(stop.device)
