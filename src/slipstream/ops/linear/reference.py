"""x @ weight.T + bias, in float32, for every format: packed weights are held packed and decoded at every call."""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.ops.formats import MADE, Weight, decode
from slipstream.ops.formats.blocks import BLOCKS

_FORMATS = ("dense", *MADE, *BLOCKS)


class Reference:
    def prepare(self, weight: Weight, dtype: torch.dtype) -> tuple[Tensor, ...]:
        data = weight.data.to(dtype) if weight.format == "dense" else weight.data
        kind = torch.tensor([_FORMATS.index(weight.format), *weight.shape])
        return (kind, data) if weight.scales is None else (kind, data, weight.scales)

    def __call__(self, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
        (kind, *shape), data, scales = packed[0].tolist(), packed[1], packed[2] if len(packed) == 3 else None
        weight = decode(Weight(_FORMATS[kind], data, tuple(shape), scales), torch.float32)
        out = x.float() @ weight.T
        return (out if bias is None else out + bias.float()).to(x.dtype)
