"""Files onto a card: threads read blocks into pinned memory, and each is copied while the next are read.

Blocks lie at multiples of BLOCK in a file and go round the threads in order, so a disk sees long reads, one after another.
Copies are in the order of one stream, what is made of what arrived in that of another, both beside the one that computes: nothing
waits but a thread for its own buffer. Where hashes are known, whole files are read, and what is copied is what was hashed; where
there are none, and a C compiler is there, some blocks at a time are one call (checkpoint/direct.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import mmap
import os
import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slipstream.checkpoint.direct import SLOTS, Calls, Steps, driver
from slipstream.checkpoint.manifest import Shard, check_digest
from slipstream.checkpoint.tensors import TensorInfo, read_at
from slipstream.errors import CapacityError, CheckpointError
from slipstream.ops.native import missing

# A thread has one buffer: while it is copied, others read. All of them together are to stay in the processor's cache, but a
# block also costs the interpreter some 100 us, which no two threads can spend at once. Into an H100 with 16 cores, from the
# page cache: 29 GB/s with 12 threads and blocks of 12 MiB; 26 with 8 threads, 24 with 8 and 16 MiB, 18 with 16 and 6 MiB.
BLOCK = 12 << 20
DIRECT = 4 << 20  # a block where C reads, which costs the interpreter nothing
AT_ONCE = 8  # such blocks in a call
TOLD = 16  # blocks after which progress is told, if no tensor was complete before
READERS = min(12, max(4, os.cpu_count() or 1))  # a slow disk wants several requests too


class Card:
    """What is asked of a CUDA device here."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream, self.making = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def beside(self) -> contextlib.AbstractContextManager[Any]:
        """What a thread launches in here goes to the stream of the copies."""
        return torch.cuda.stream(self.stream)

    def aside(self) -> contextlib.AbstractContextManager[Any]:
        """What a thread launches in here goes to the stream of what is made of the copies, which go on meanwhile."""
        return torch.cuda.stream(self.making)

    def hand_over(self, landed: Iterable[Tensor], wait: bool) -> None:
        """What this thread launches from here on finds these tensors copied; their memory is not given to others before that is done.

        Args:
            wait: copies that are still to come wait for what this thread has launched so far.
        """
        here = torch.cuda.current_stream(self.device)
        if wait:
            self.stream.wait_stream(here)
        here.wait_stream(self.stream)
        for tensor in landed:
            tensor.record_stream(here)

    @contextlib.contextmanager
    def pinned(self, nbytes: int) -> Iterator[Tensor]:
        """Memory that the card reads by itself; given back at the end, not kept for others as torch's own would be."""
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)  # pinned in two thirds of the time
        buffer = torch.frombuffer(memory, dtype=torch.uint8)
        runtime, code = torch.cuda.cudart(), None
        try:  # Ctrl-C may come as the call ends
            code = runtime.cudaHostRegister(buffer.data_ptr(), nbytes, 0)
            if int(code) != 0:
                raise CapacityError(
                    f"{nbytes:,} bytes of memory cannot be pinned ({code}); raise the limit on locked memory (ulimit -l)"
                )
            yield buffer
        finally:
            self.stream.synchronize()
            if code is None or int(code) == 0:
                runtime.cudaHostUnregister(buffer.data_ptr())

    def free(self) -> int:
        """Bytes that the card has left, without those that torch keeps to use again."""
        return torch.cuda.mem_get_info(self.device)[0]

    @property
    def direct(self) -> bool:
        """Whether C can read and copy for it."""
        return missing("transfer") is None

    def calls(self) -> Calls:
        """For one thread, in `beside`."""
        events = [torch.cuda.Event(blocking=True) for _ in range(SLOTS)]
        for event in events:  # which makes it
            event.record(self.stream)
        copy, record, wait = driver("cuMemcpyHtoDAsync_v2", "cuEventRecord", "cuEventSynchronize")
        return Calls(copy, record, wait, self.stream.cuda_stream, [int(e.cuda_event) for e in events], events)

    def mark(self) -> torch.cuda.Event:
        """A point in the stream that can be waited for, in sleep."""
        event = torch.cuda.Event(blocking=True)
        event.record(self.stream)
        return event

    def finish(self) -> None:
        """Everything is done, and what was only needed meanwhile is free for other streams."""
        self.stream.synchronize()
        self.making.synchronize()
        torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class Piece:
    """What a block holds of one tensor."""

    tensor: int
    begin: int  # in the block
    at: int  # in the tensor
    nbytes: int


@dataclass(slots=True)
class Block:
    file: Path
    begin: int
    end: int
    pieces: list[Piece] = field(default_factory=list)

    def spans(self) -> list[tuple[int, int]]:
        """What of the file is wanted, where pieces leave gaps between them."""
        found: list[tuple[int, int]] = []
        for begin, end in sorted((self.begin + p.begin, self.begin + p.begin + p.nbytes) for p in self.pieces):
            if found and begin <= found[-1][1]:
                found[-1] = found[-1][0], max(end, found[-1][1])
            else:
                found.append((begin, end))
        return found


def cut(tensors: Sequence[TensorInfo], whole: Mapping[Path, int], size: int, lanes: int) -> Iterator[Block]:
    """The blocks to read, in their order, each made when it is asked for.

    Args:
        whole: files that are read from end to end, and their sizes; of others only what is wanted.
        size: of a block.
        lanes: files that are read side by side.
    """
    wanted: dict[Path, list[int]] = {file: [] for file in whole}
    for i, t in enumerate(tensors):
        wanted.setdefault(t.file, []).append(i)
    files = sorted(wanted)
    for some in (files[i : i + lanes] for i in range(0, len(files), lanes)):
        blocks: dict[tuple[int, int], Block] = {}  # by where they come in a file, and by the file
        for rank, file in enumerate(some):
            for piece in (p for i in wanted[file] for p in _pieces(i, tensors[i], size)):
                begin, stop = piece.begin, piece.begin + piece.nbytes
                block = blocks.setdefault((begin // size, rank), Block(file, begin, stop))
                block.begin, block.end = min(block.begin, begin), max(block.end, stop)
                block.pieces.append(piece)
            for k in range(-(-whole.get(file, 0) // size)):
                block = blocks.setdefault((k, rank), Block(file, 0, 0))
                block.begin, block.end = k * size, min(whole[file], (k + 1) * size)
        for _, block in sorted(blocks.items()):
            block.pieces = [Piece(p.tensor, p.begin - block.begin, p.at, p.nbytes) for p in block.pieces]
            yield block


def _pieces(number: int, tensor: TensorInfo, size: int) -> Iterator[Piece]:
    """A tensor in blocks of that size, where they begin in its file."""
    at = 0
    for offset, nbytes in tensor.spans:
        end = offset + nbytes
        for k in range(offset // size, -(-end // size) if nbytes else 0):
            begin, stop = max(offset, k * size), min(end, (k + 1) * size)
            yield Piece(number, begin, at + begin - offset, stop - begin)
        at += nbytes


Arrived = tuple[int, list[int]]  # bytes of a block that were wanted, and whose tensors are complete with it


class Transfer:
    """The way of many tensors onto a card. Iterate over `arrive()` once, in `card.aside()`, and `take` what is complete.

    Args:
        wanted: the runs of bytes that belong together, as `TensorInfo.stored` has them.
        shards: files that have a manifest, and what it says of them.

    Raises:
        CheckpointError: while it arrives: a file is damaged, ended early, or changed.
    """

    def __init__(
        self, wanted: Sequence[Sequence[TensorInfo]], card: Card, shards: Mapping[Path, Shard] | None = None, *,
        readers: int = READERS, block: int | None = None,
    ) -> None:  # fmt: skip
        self.card, self.readers = card, readers
        self._shards = dict(shards or {})
        self._direct = not self._shards and card.direct
        self.block = block or (DIRECT if self._direct else BLOCK)
        self._tensors = [t for item in wanted for t in item]
        self._owner = [i for i, item in enumerate(wanted) for _ in item]
        numbers = itertools.count()
        self._items = [[next(numbers) for _ in item] for item in wanted]
        self._left = [sum(t.nbytes for t in item) for item in wanted]
        self._landed: dict[int, Tensor] = {}
        self._lock = threading.Condition()
        self._stopped, self._placed = False, False
        self._untold = 0  # bytes that arrived
        self._news: queue.SimpleQueue[Arrived | None] = queue.SimpleQueue()
        self._digests = {file: hashlib.sha256() for file in self._shards}
        self._hashed = dict.fromkeys(self._shards, 0)

    def arrive(self) -> Generator[Arrived, None, None]:
        """Give a block's bytes, and the numbers of those in `wanted` of which nothing is missing any more."""
        with contextlib.ExitStack() as stack:
            try:
                self._files = {
                    file: stack.enter_context(file.open("rb", buffering=0)).fileno()
                    for file in {t.file for t in self._tensors} | self._shards.keys()
                }
                before = {file: _state(fd) for file, fd in self._files.items()}
            except OSError as e:
                raise CheckpointError(f"{e.filename}: cannot be read: {e}") from e
            whole = {file: before[file][0] for file in self._shards}
            lanes = self.readers if whole else 1  # a file is hashed in order, so by one thread at a time
            self._blocks = cut(self._tensors, whole, self.block, lanes)
            self._placed = self._take_places()
            yield 0, [i for i, nbytes in enumerate(self._left) if not nbytes]
            first = list(itertools.islice(self._blocks, self.readers))
            self._blocks = itertools.chain(first, self._blocks)
            yield from self._run(len(first))
            for file, fd in self._files.items():
                if _state(fd) != before[file]:
                    raise CheckpointError(f"{file}: changed while it was read; wait for what writes it, then try again")
            for file, digest in self._digests.items():
                check_digest(file, digest.hexdigest(), self._shards[file])

    def take(self, item: int) -> dict[TensorInfo, Tensor]:
        """The bytes of a complete one; they are its own from here on."""
        there = {}
        for i in self._items[item]:
            there[self._tensors[i]] = self._land(i)  # one of no bytes has no place yet
            del self._landed[i]
        self.card.hand_over(there.values(), wait=not self._placed)
        return there

    def _take_places(self) -> bool:
        """Before anything is copied, as far as there is room for the model beside them: to take memory beside copies is slow.

        Whether there was room for all: then copies need not wait for what is made of those before them.
        """
        room = self.card.free() - sum(t.nbytes for t in self._tensors)
        with self.card.beside(), contextlib.suppress(torch.OutOfMemoryError):  # others may take memory of the same card
            for i, t in enumerate(self._tensors):
                room -= t.nbytes
                if room < 0:
                    return False
                if t.nbytes:
                    self._land(i)
            return True
        return False

    def _run(self, running: int) -> Iterator[Arrived]:
        if not running:
            return
        each = self.block * (SLOTS if self._direct else 1)
        with (
            self.card.pinned(running * each) as buffers,  # at once: each by itself would wait for the others
            ThreadPoolExecutor(running, "slipstream-read") as pool,
        ):
            try:
                reading = [pool.submit(self._read, buffer) for buffer in buffers.split(each)]
                while running:
                    news = self._news.get()
                    if news is None:
                        running -= 1
                    else:
                        yield news
                for one in reading:
                    one.result()
            finally:
                self._stop()

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            self._lock.notify_all()

    def _read(self, buffer: Tensor) -> None:
        """A thread's work."""
        try:
            with self.card.beside():
                calls = self.card.calls() if self._direct else None
                while not self._stopped:
                    with self._lock:  # neighbours in a file
                        some = list(itertools.islice(self._blocks, AT_ONCE if self._direct else 1))
                    if not some:
                        return
                    done = 0 if calls is None else self._bring(some, buffer, calls)
                    for block in some[:done]:
                        self._tell(block)
                    for block in some[done:]:
                        self._bring_one(block, buffer)
        except BaseException:
            self._stop()
            raise
        finally:
            self._news.put(None)

    def _bring(self, blocks: Sequence[Block], buffer: Tensor, calls: Calls) -> int:
        """Blocks in one call, to and fro between the two halves of the buffer; how many are on their way to the card."""
        steps, ends = Steps(), []
        for i, block in enumerate(blocks):
            slot, start = i % SLOTS, i % SLOTS * self.block
            steps.wait(slot)  # for the copies of the block that had it before
            for begin, end in block.spans():
                steps.read(self._files[block.file], begin, start + begin - block.begin, end - begin)
            for p in block.pieces:
                steps.copy(self._land(p.tensor).data_ptr() + p.at, start + p.begin, p.nbytes)
            steps.record(slot)
            ends.append(len(steps))
        done = calls.run(steps, buffer.data_ptr())
        if done < len(steps):  # what failed is done once more, where it can be said what is wrong
            self.card.mark().synchronize()
        return sum(end <= done for end in ends)

    def _bring_one(self, block: Block, buffer: Tensor) -> None:
        view = memoryview(buffer.numpy())[: block.end - block.begin]  # type: ignore[arg-type]
        self._fill(block, view)
        for p in block.pieces:
            to = self._land(p.tensor)[p.at : p.at + p.nbytes]
            to.copy_(buffer[p.begin : p.begin + p.nbytes], non_blocking=True)
        mark = self.card.mark()
        self._hash(block, view)
        self._tell(block)
        mark.synchronize()

    def _fill(self, block: Block, view: memoryview) -> None:
        what = self._tensors[block.pieces[0].tensor].name if block.pieces else "a tensor"
        spans = [(block.begin, block.end)] if block.file in self._shards else block.spans()
        try:
            for begin, end in spans:
                part = view[begin - block.begin : end - block.begin]
                read_at(self._files[block.file], part, begin, block.file, what)
        except OSError as e:
            raise CheckpointError(f"{block.file}: cannot be read: {e}") from e

    def _land(self, i: int) -> Tensor:
        """The place of a tensor on the card."""
        if (place := self._landed.get(i)) is not None:
            return place
        with self._lock:
            if i not in self._landed:
                self._landed[i] = torch.empty(self._tensors[i].nbytes, dtype=torch.uint8, device=self.card.device)
            return self._landed[i]

    def _hash(self, block: Block, data: memoryview) -> None:
        if block.file not in self._digests:
            return
        with self._lock:  # the block before has its thread already, so its turn comes
            self._lock.wait_for(lambda: self._stopped or self._hashed[block.file] == block.begin)
            if self._stopped:
                return
        self._digests[block.file].update(data)
        with self._lock:
            self._hashed[block.file] = block.end
            self._lock.notify_all()

    def _tell(self, block: Block) -> None:
        complete = []
        with self._lock:
            for p in block.pieces:
                item = self._owner[p.tensor]
                self._left[item] -= p.nbytes
                if not self._left[item]:
                    complete.append(item)
            self._untold += sum(p.nbytes for p in block.pieces)
            if not complete and self._untold < TOLD * self.block:
                return
            nbytes, self._untold = self._untold, 0
        self._news.put((nbytes, complete))


def _state(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns
