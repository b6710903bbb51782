"""4 bits with a scale for each 32, 64 or 128 weights, through torch's packed operator for CPUs.

The operator's value is (code - 8) * scale + zero. Codes of int4, Q4_0 and Q4_1 map onto it one for one. Q8_0 is cut into
a high and a low nibble, value = 16 * high + low, and runs as two products; no code is changed. Scales become bfloat16, as
the operator wants them. It is used for any number of tokens: turning the codes into numbers with torch's operators takes
as long as 50 tokens do, and would need the codes a second time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slipstream.ops.formats import Weight
from slipstream.ops.formats.integers import unpack


class Int4:
    def prepare(self, weight: Weight, dtype: torch.dtype) -> tuple[Tensor, ...]:
        out, width = weight.shape
        if weight.scales is not None:
            return _pack(unpack(weight.data), weight.scales, torch.zeros_like(weight.scales), dtype)
        blocks = weight.data.view(out, width // 32, -1)
        if weight.format == "Q8_0":
            scale, codes = _half(blocks, 0), blocks[..., 2:].reshape(out, width).view(torch.int8)
            high = _pack((codes >> 4) + 8, 16 * scale, torch.zeros_like(scale), dtype)
            return *high, *_pack(codes & 15, scale, 8 * scale, dtype)
        scale = _half(blocks, 0)
        zero = _half(blocks, 2) + 8 * scale if weight.format == "Q4_1" else torch.zeros_like(scale)
        packed = blocks[..., -16:]
        codes = torch.cat((packed & 15, packed >> 4), -1).view(out, width)
        return _pack(codes, scale, zero, dtype)

    def held_bytes(self, format: str, shape: tuple[int, ...], dtype: torch.dtype, packed: int) -> int:
        """Half a byte a weight, and a scale and a zero for each group of them; all of it twice for 8 bits.

        Args:
            shape: of a matrix or a stack of them.
            packed: bytes in the format's own layout, which tell how many groups int4 has.
        """
        weights = math.prod(shape)
        groups = (packed - weights // 2) // 2 if format == "int4" else weights // 32
        four = weights // 2 + groups * 2 * dtype.itemsize
        return 2 * four if format == "Q8_0" else four

    def __call__(self, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
        group = x.shape[1] // packed[1].shape[0]
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed[0], group, packed[1])
        if len(packed) == 4:
            out += torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed[2], group, packed[3])
        return out if bias is None else out.add_(bias)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of every block, (out, blocks) float32."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1).float()


def _pack(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    return weight, torch.stack((scale, zero), -1).transpose(0, 1).to(dtype).contiguous()  # (blocks, out, 2)
