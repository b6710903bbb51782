"""What a header says about one tensor, and how its bytes become a torch tensor."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slipstream.errors import CheckpointError
from slipstream.ops.formats.blocks import BLOCKS

if TYPE_CHECKING:
    import torch

    from slipstream.ops.formats import Weight

# Dense types as safetensors spells them: bytes of one element, and the name in torch.
DENSE = {
    "F64": (8, "float64"),
    "F32": (4, "float32"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "I64": (8, "int64"),
    "I32": (4, "int32"),
    "I16": (2, "int16"),
    "I8": (1, "int8"),
    "U64": (8, "uint64"),
    "U32": (4, "uint32"),
    "U16": (2, "uint16"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
}
MAX_READ = 1 << 30  # Linux reads at most 2 GiB in one call


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and what it is; nothing of it has been read.

    Attributes:
        name: the name that Hugging Face gives it, also in a GGUF file.
        dtype: a key of DENSE, or a GGUF block type in upper case ("Q4_1").
        shape: logical shape, outermost first; (out, in) for a matrix.
        nbytes: size in the file.
        offset: position of the first byte in `file`.
        row_permute: number of heads whose rows GGUF's llama conversion interleaved; undone by every read.
        add: added to every value when read (-1 for gemma norms in GGUF, which are stored as weight + 1).
        parts: for a weight of safetensors that is packed into one of `formats.MADE` (then `dtype` is that format's name,
            and `shape` the logical one): the tensors that hold its data and its scales. Empty for all others.
        runs: where only a part of a tensor is meant, of `nbytes` and `shape`: offset and bytes of each run that makes it up.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int
    row_permute: int | None = None
    add: float = 0.0
    parts: tuple[TensorInfo, ...] = ()
    runs: tuple[tuple[int, int], ...] = ()

    @property
    def is_quantized(self) -> bool:
        """Whether values are packed: into GGUF's blocks, or into data and scales."""
        return self.dtype in BLOCKS or bool(self.parts)

    @property
    def format(self) -> str:
        """The name in `ops.formats`."""
        if self.dtype == "MXFP4":  # GGUF's order of the same bits, put into ours when read
            return "mxfp4"
        return self.dtype if self.is_quantized else "dense"

    @property
    def group(self) -> int:
        """How many weights share a scale that stands apart; 0 where none does."""
        return self.shape[-1] // self.parts[1].shape[-1] if self.parts else 0

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """The runs of bytes that it is made of."""
        return self.parts or (self,)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Offset and bytes of each run in the file, one after the other."""
        return self.runs or ((self.offset, self.nbytes),)

    @property
    def rows(self) -> int:
        """Number of innermost rows."""
        n = 1
        for size in self.shape[:-1]:
            n *= size
        return n


Raw = Callable[[TensorInfo], "torch.Tensor"]  # bytes as they stand in the file, uint8 of shape (nbytes,)


def check_name(name: str, path: Path) -> None:
    if not name or len(name) > 512 or not name.isprintable():
        raise CheckpointError(f"{path}: {name[:100]!r} cannot be the name of a tensor")


def read_raw(info: TensorInfo) -> torch.Tensor:
    """The tensor's bytes as they stand in the file, uint8 of shape (nbytes,)."""
    import torch

    out = torch.empty(info.nbytes, dtype=torch.uint8)
    read_into(info, out)
    return out


def read_into(info: TensorInfo, out: torch.Tensor) -> None:
    """The same into memory that is there: `out` is uint8 of shape (nbytes,), without gaps."""
    try:
        with info.file.open("rb", buffering=0) as f:
            view, at = memoryview(out.numpy()), 0  # type: ignore[arg-type]
            for offset, nbytes in info.spans:
                read_at(f.fileno(), view[at : at + nbytes], offset, info.file, info.name)
                at += nbytes
    except OSError as e:
        raise CheckpointError(f"{info.file}: {info.name} cannot be read: {e}") from e


def read_at(descriptor: int, out: memoryview, offset: int, file: Path, what: str) -> None:
    """Fill `out` from an open file.

    Raises:
        CheckpointError: the file ends before; the message names `file`, and says that of `what` not all is there.
    """
    done = 0
    while done < len(out):
        got = os.preadv(descriptor, [out[done : done + MAX_READ]], offset + done)
        if got == 0:
            raise CheckpointError(f"{file}: was cut short while in use: {what} is not all there")
        done += got


def read_dense(info: TensorInfo, raw: Raw = read_raw) -> torch.Tensor:
    """The tensor in its own dtype and logical shape."""
    import torch

    dtype: torch.dtype = getattr(torch, DENSE[info.dtype][1])
    values = unpermute(raw(info).view(dtype).view(info.shape), info.row_permute)
    return values.add_(info.add) if info.add else values


def read_rows(info: TensorInfo, raw: Raw = read_raw) -> torch.Tensor:
    """The packed blocks of a quantized tensor, uint8 of shape (rows, bytes_per_row)."""
    return unpermute(raw(info).view(info.rows, -1), info.row_permute)


def read_weight(info: TensorInfo, raw: Raw = read_raw) -> Weight:
    """Any tensor as it is held in the file: numbers, GGUF's blocks, or data and scales."""
    from slipstream.ops.formats import Weight, packed_shapes

    if info.parts:
        import torch

        data, scales = (read_dense(p, raw) for p in info.parts)
        shapes = packed_shapes(info.format, info.shape, info.group)
        if data.dtype != torch.int8:
            data = data.view(torch.uint8)
            data = (data ^ 128).view(torch.int8) if info.format == "int8" else data  # stored as code + 128
        return Weight(info.format, data.view(shapes[0]), info.shape, scales.view(shapes[1]))
    if not info.is_quantized:
        return Weight("dense", read_dense(info, raw), info.shape)
    rows = read_rows(info, raw)
    if info.format != "mxfp4":
        return Weight(info.format, rows, info.shape)
    from slipstream.ops.formats.blocks import mxfp4_from_gguf

    data, scales = mxfp4_from_gguf(rows)
    shapes = packed_shapes("mxfp4", info.shape)
    return Weight("mxfp4", data.view(shapes[0]), info.shape, scales.view(shapes[1]))


def unpermute(rows: torch.Tensor, heads: int | None) -> torch.Tensor:
    """Undo GGUF's reordering of query and key rows for interleaved rotation.

    Within a head, GGUF row 2i is row i of the first half and row 2i + 1 row i of the second half.
    """
    if heads is None:
        return rows
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, -1).transpose(1, 2).reshape(rows.shape)
