"""GGUF's quantized block formats: their sizes, and from blocks back to numbers.

Formats: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and ggml-common.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slipstream.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# name: (number in the file, values in a block, bytes of a block). A table of our own, as importing gguf takes longer
# than opening a file; tests compare it with gguf's.
BLOCKS = {
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "IQ2_XXS": (16, 256, 66),
    "IQ2_XS": (17, 256, 74),
    "IQ3_XXS": (18, 256, 98),
    "IQ1_S": (19, 256, 50),
    "IQ4_NL": (20, 32, 18),
    "IQ3_S": (21, 256, 110),
    "IQ2_S": (22, 256, 82),
    "IQ4_XS": (23, 256, 136),
    "IQ1_M": (29, 256, 56),
    "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66),
    "MXFP4": (39, 32, 17),
}
OURS = (
    "Q4_0",
    "Q4_1",
    "Q8_0",
    "Q4_K",
    "Q5_K",
    "Q6_K",
)  # decoded here, on any device; others by the gguf library on CPUs
CHUNK = 1 << 20  # values turned at a time: the temporaries stay near the cache


def dequantize_rows(rows: torch.Tensor, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """(rows, bytes_per_row) uint8 -> (rows, values_per_row). Computed in float32, then cast to `dtype`."""
    import torch

    _, size, nbytes = BLOCKS[kind]
    width = rows.shape[1] // nbytes * size
    out = torch.empty(rows.shape[0], width, dtype=dtype, device=rows.device)
    turns = (_q4_0, _q4_1, _q8_0, _q4_k, _q5_k, _q6_k)
    turn = dict(zip(OURS, turns, strict=True)).get(kind)
    step = max(1, CHUNK // max(1, width))
    for at in range(0, rows.shape[0], step):
        part = rows[at : at + step]
        values = turn(part.reshape(-1, nbytes)) if turn else _by_library(part, kind)
        out[at : at + step] = values.view(-1, width)
    return out


def mxfp4_from_gguf(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, bytes_per_row) uint8 of MXFP4 -> data (rows, in / 32, 16) and scales (rows, in / 32) as `ops.formats` has them.

    GGUF's block is the scale, then 16 bytes of codes.
    """
    blocks = rows.reshape(rows.shape[0], -1, BLOCKS["MXFP4"][2])
    return in_order(blocks[..., 1:]), blocks[..., 0].contiguous()


def in_order(codes: torch.Tensor) -> torch.Tensor:
    """(..., 16) bytes that hold elements 0 to 15 in their low halves and 16 to 31 in their high halves, the way of GGUF's
    blocks of 32 -> two neighbours in each byte, the first in its low half."""
    import torch

    even, odd = codes[..., ::2], codes[..., 1::2]
    return torch.cat((even & 15 | odd << 4, even >> 4 | odd & 0xF0), -1)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    import torch

    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[:, 2:]).sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[:, 4:]).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, offsets = _six_bits(blocks)
    return _halves(blocks[:, 16:], 32).float().mul_(scales).sub_(offsets).flatten(1)


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    import torch

    scales, offsets = _six_bits(blocks)
    high = blocks[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None] & 1
    return (_halves(blocks[:, 48:], 32) | high << 4).float().mul_(scales).sub_(offsets).flatten(1)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    import torch

    low = _halves(blocks[:, :128], 64)
    high = (
        blocks[:, 128:192].view(-1, 2, 1, 32) >> torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)[:, None]
        & 3
    )
    scales = blocks[:, 192:208].view(torch.int8).float().mul_(_half(blocks, 208))
    return (low.view(-1, 16, 16) | high.view(-1, 16, 16) << 4).float().sub_(32).mul_(scales[..., None]).flatten(1)


def _six_bits(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and offsets of a K-quant's 8 blocks, (blocks, 8, 1) each."""
    import torch

    scales, offsets, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((scales & 63, rest & 15 | scales >> 6 << 4), 1)
    offsets = torch.cat((offsets & 63, rest >> 4 | offsets >> 6 << 4), 1)
    turned = scales.float().mul_(_half(blocks, 0)), offsets.float().mul_(_half(blocks, 2))
    return turned[0][..., None], turned[1][..., None]


def _halves(packed: torch.Tensor, run: int) -> torch.Tensor:
    """(blocks, 128) -> (blocks, 256 / run, run): of each `run` bytes the low halves, then the high halves."""
    import torch

    runs = packed.reshape(packed.shape[0], -1, 1, run)
    return torch.cat((runs & 15, runs >> 4), 2).flatten(1, 2)


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at byte `at` of every block, as float32 of shape (blocks, 1)."""
    import torch

    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """(blocks, 16) -> (blocks, 32): the low halves of all bytes come first, then the high halves."""
    import torch

    return torch.cat((packed & 15, packed >> 4), 1).float()


def _by_library(rows: torch.Tensor, kind: str) -> torch.Tensor:
    import numpy as np
    import torch

    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as e:
        raise CheckpointError(f"{kind} blocks are read by the gguf library: pip install 'slipstream[gguf]'") from e
    with np.errstate(all="ignore"):  # a scale that is no number is for whoever runs the model to notice
        values = dequantize(rows.cpu().contiguous().numpy(), GGMLQuantizationType[kind])
    return torch.from_numpy(values).to(rows.device)
