"""What each tensor of a checkpoint becomes: converted, repacked without loss, or copied as it is."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from slipstream.checkpoint.open import Checkpoint
from slipstream.checkpoint.rules import rows
from slipstream.checkpoint.save import Entry
from slipstream.checkpoint.tensors import TensorInfo, read_dense, read_raw
from slipstream.errors import CheckpointError
from slipstream.ops.formats import Weight, decode, joined
from slipstream.quantization.pieces import Errors, Piece, convert, entries_of, pieces_of, raw
from slipstream.quantization.select import Selection, eligible, module_of, row_width

_COPIED = 64 << 20  # bytes that are copied at a time
_FLOATS = ("F64", "F32", "F16", "BF16")
_EXPERT = re.compile(r"(.*\.experts)\.0\.(gate_proj|down_proj)\.(weight|bias)")
_OTHER_EXPERT = re.compile(r".*\.experts\.\d+\.(gate|up|down)_proj\.(weight|bias)")
# A stack of gpt-oss in the parts that its GGUF form has: their names; rows of part i are i, i + n, i + 2n, ...
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class Job:
    """One step of the work.

    Attributes:
        entries: the tensors that it writes.
        pieces: makes their bytes; takes where errors are noted.
        read: bytes of the source.
        packed: module -> (format, weights that share a scale) of what is packed when it is done.
        covered: how many weights these are.
        converted: whether the job changes numbers.
    """

    entries: tuple[Entry, ...]
    pieces: Callable[[Errors], Iterator[Piece]]
    read: int
    packed: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    covered: int = 0
    converted: bool = False


@dataclass(frozen=True)
class Work:
    """Makes the jobs of one checkpoint.

    Attributes:
        group: of int4.
        dtype: of the floats that GGUF's blocks become where they are not converted; floats stay as they are.
    """

    checkpoint: Checkpoint
    selection: Selection
    group: int
    dtype: torch.dtype

    def takes(self, info: TensorInfo) -> bool:
        """Whether it is converted. What is packed already is so only if its module is named."""
        if info.format == self.selection.format or not self.selection.takes(info.name, info.shape):
            return False
        return not info.parts or self.selection.names(info.name)

    def packs(self, info: TensorInfo) -> bool:
        """Whether it is packed in the end."""
        return self.takes(info) or bool(info.parts) or (info.format == "mxfp4" and eligible(info.name, info.shape))

    def published(self) -> bool:
        """Whether the experts of gpt-oss, and nothing else, are MXFP4 in the end: then they are written as published."""
        if self.selection.model_type != "gpt_oss":
            return False
        infos = list(self.checkpoint.tensors.values())
        formats = {self.selection.format if self.takes(i) else i.format for i in infos if self.packs(i)}
        experts = all(".experts." in i.name for i in infos if self.packs(i))
        whole = all(self.packs(i) for i in infos if (m := _OTHER_EXPERT.fullmatch(i.name)) and m[2] == "weight")
        return formats == {"mxfp4"} and experts and whole

    def jobs(self) -> list[Job]:
        """In the order of the source."""
        published = self.published()
        found: list[Job] = []
        infos = self.checkpoint.tensors
        stacks = {
            module_of(n) for n, i in infos.items() if len(i.shape) == 3 and eligible(n, i.shape) and self.packs(i)
        }
        for name, info in infos.items():
            module = module_of(name)
            if published and _OTHER_EXPERT.fullmatch(name):
                if first := _EXPERT.fullmatch(name):
                    kind = "gate_up_proj" if first[2] == "gate_proj" else "down_proj"
                    found.append(self._assemble(first[1], kind, first[3]))
            elif module in stacks:
                found += [self._stack(info)] if published else self._split(info)
            elif not published and module.endswith("_bias") and module.removesuffix("_bias") in stacks:
                found.append(self._split_bias(info))
            elif self.packs(info):
                found.append(self._matrix(info))
            else:
                found.append(self._copy(info))
        return found

    def _matrix(self, info: TensorInfo) -> Job:
        format, group = self._format(info)
        module = module_of(info.name)
        entries = entries_of(module, format, info.shape, group)

        def pieces(errors: Errors) -> Iterator[Piece]:
            return pieces_of(entries, self._rows(info, errors), info.shape)

        return Job(entries, pieces, info.nbytes, {module: (format, group)}, prod(info.shape), self.takes(info))

    def _format(self, info: TensorInfo) -> tuple[str, int]:
        """The format in the end, and the weights that share a scale."""
        if not self.takes(info):
            return info.format, info.group if info.format == "int4" else 0
        if not info.is_quantized and info.dtype not in _FLOATS:
            raise CheckpointError(f"{info.file}: {info.name} is {info.dtype}, which cannot be converted; leave it out")
        return self.selection.format, self.group

    def _rows(self, info: TensorInfo, errors: Errors) -> Iterator[Weight]:
        if not self.takes(info):
            yield self.checkpoint.read_weight(info.name)
            return
        floats = self.checkpoint.dequantize(info.name, torch.float32) if info.is_quantized else read_dense(info)
        yield from convert(floats, module_of(info.name), self.selection.format, self.group, errors)

    def _experts(self, info: TensorInfo) -> Iterator[Tensor | Weight]:
        """The matrices of a stack, (out, in): floats if they are to be converted, else as they are packed."""
        for e in range(info.shape[0]):
            if not info.parts:
                yield read_dense(_expert(info, e)).T
                continue
            data, scales = (read_dense(_expert(p, e)) for p in info.parts)
            weight = Weight("mxfp4", data, info.shape[1:], scales)
            if self.takes(info):
                yield decode(weight, torch.float32)
            else:
                yield weight

    def _convert(self, matrix: Tensor | Weight, module: str, errors: Errors) -> Iterator[Weight]:
        if isinstance(matrix, Weight):
            return iter((matrix,))
        return convert(matrix, module, self.selection.format, self.group, errors)

    def _stack(self, info: TensorInfo) -> Job:
        """As published: experts stay in one tensor."""
        module, format = module_of(info.name), self._format(info)
        width = row_width(info.name, info.shape)
        outer = (info.shape[0], prod(info.shape[1:]) // width, width // 32)
        entries = Entry(f"{module}_blocks", "U8", (*outer, 16)), Entry(f"{module}_scales", "U8", outer)

        def pieces(errors: Errors) -> Iterator[Piece]:
            for matrix in self._experts(info):
                yield from pieces_of(entries, self._convert(matrix, module, errors), info.shape)

        return Job(entries, pieces, info.nbytes, {module: format}, prod(info.shape), self.takes(info))

    def _split(self, info: TensorInfo) -> Iterator[Job]:
        """A job for each expert, whose parts stand alone in it."""
        module, (format, group) = module_of(info.name), self._format(info)
        parent, _, kind = module.rpartition(".")
        parts, width = _PARTS[kind], row_width(info.name, info.shape)
        shape = prod(info.shape[1:]) // width // len(parts), width
        for e in range(info.shape[0]):
            names = [f"{parent}.{e}.{part}" for part in parts]
            entries = [entries_of(n, format, shape, group) for n in names]

            def pieces(errors: Errors, e: int = e, entries: list[tuple[Entry, ...]] = entries) -> Iterator[Piece]:
                one = replace(_expert(info, e, keep=True), parts=tuple(_expert(p, e, keep=True) for p in info.parts))
                (matrix,) = self._experts(one)
                for i, mine in enumerate(entries):
                    part = _every(matrix, i, len(parts), shape)
                    yield from pieces_of(mine, self._convert(part, module, errors), shape)

            packed = dict.fromkeys(names, (format, group))
            size = prod(info.shape[1:])
            yield Job(
                tuple(itertools.chain(*entries)), pieces, info.nbytes // info.shape[0], packed, size, self.takes(info)
            )

    def _split_bias(self, info: TensorInfo) -> Job:
        parent, _, kind = info.name.removesuffix("_bias").rpartition(".")
        parts = _PARTS[kind]
        experts, width = info.shape
        shape = (width // len(parts),)
        entries = tuple(Entry(f"{parent}.{e}.{p}.bias", info.dtype, shape) for e in range(experts) for p in parts)

        def pieces(errors: Errors) -> Iterator[Piece]:
            values = read_dense(info).view(experts, -1, len(parts)).transpose(1, 2).reshape(len(entries), -1)
            return ((entry.name, raw(row)) for entry, row in zip(entries, values, strict=True))

        return Job(entries, pieces, info.nbytes)

    def _assemble(self, parent: str, kind: str, leaf: str) -> Job:
        """What GGUF keeps apart, put together as published: experts in one tensor, rows of gate and up in turn."""
        parts, tensors = _PARTS[kind], self.checkpoint.tensors
        count = sum(bool(re.fullmatch(rf"{re.escape(parent)}\.\d+\.{parts[0]}\.{leaf}", n)) for n in tensors)
        names = [[f"{parent}.{e}.{p}.{leaf}" for p in parts] for e in range(count)]
        absent = [n for row in names for n in row if n not in tensors]
        if absent:
            raise CheckpointError(f"{self.checkpoint.path}: {absent[0]} is missing, though other experts have one")
        infos = [[tensors[n] for n in row] for row in names]
        if len({(i.shape, self._dtype(i)) for row in infos for i in row}) != 1:
            raise CheckpointError(f"{self.checkpoint.path}: the experts of {parent} differ in shape or dtype")
        read = sum(i.nbytes for row in infos for i in row)
        first, module = infos[0][0].shape, f"{parent}.{kind}"
        outer = (count, first[0] * len(parts))
        if leaf == "bias":
            entry = Entry(f"{module}_bias", self._dtype(infos[0][0]), outer)

            def biases(errors: Errors) -> Iterator[Piece]:
                for row in infos:
                    both = torch.stack([self._floats(i) for i in row], 1)
                    yield entry.name, raw(both)

            return Job((entry,), biases, read)
        entries = (
            Entry(f"{module}_blocks", "U8", (*outer, first[1] // 32, 16)),
            Entry(f"{module}_scales", "U8", (*outer, first[1] // 32)),
        )

        def blocks(errors: Errors) -> Iterator[Piece]:
            for row in infos:
                whole = [joined(rows, list(self._rows(i, errors)), i.shape) for i in row]
                alternating = joined(lambda ts: torch.stack(tuple(ts), 1), whole, first)
                yield from pieces_of(entries, (alternating,), first)

        size, made = outer[0] * outer[1] * first[1], any(self.takes(i) for row in infos for i in row)
        return Job(entries, blocks, read, {module: ("mxfp4", 0)}, size, made)

    def _copy(self, info: TensorInfo) -> Job:
        if self.checkpoint.kind == "safetensors":
            return Job((Entry(info.name, info.dtype, info.shape),), lambda _: _bytes(info), info.nbytes)

        def pieces(errors: Errors) -> Iterator[Piece]:
            yield info.name, raw(self._floats(info))

        return Job((Entry(info.name, self._dtype(info), info.shape),), pieces, info.nbytes)

    def _floats(self, info: TensorInfo) -> Tensor:
        """What stays as it is, and of GGUF's blocks the floats that they become."""
        return self.checkpoint.dequantize(info.name, self.dtype) if info.is_quantized else read_dense(info)

    def _dtype(self, info: TensorInfo) -> str:
        return _DTYPES[self.dtype] if info.is_quantized else info.dtype


_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def _expert(info: TensorInfo, e: int, keep: bool = False) -> TensorInfo:
    """Where matrix e of a stack lies; with `keep` as a stack of one."""
    nbytes = info.nbytes // info.shape[0]
    shape = (1, *info.shape[1:]) if keep else info.shape[1:]
    return replace(info, shape=shape, nbytes=nbytes, offset=info.offset + e * nbytes)


def _every(matrix: Tensor | Weight, first: int, step: int, shape: tuple[int, ...]) -> Tensor | Weight:
    """Rows first, first + step, ... of a matrix."""
    if isinstance(matrix, Weight):
        return matrix.map(lambda t: t[first::step], shape)
    return matrix[first::step]


def _bytes(info: TensorInfo) -> Iterator[Piece]:
    for at in range(0, info.nbytes, _COPIED):
        size = min(_COPIED, info.nbytes - at)
        yield info.name, raw(read_raw(replace(info, nbytes=size, offset=info.offset + at)))
