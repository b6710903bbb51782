"""Linear layers and embeddings, whose weights may stay in the blocks in which they arrived."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slipstream.ops.formats.blocks import dequantize_rows
from slipstream.layers.ops import Ops
from slipstream.ops.formats import Weight
from slipstream.ops.linear import LinearKernel


class Linear(nn.Module):
    """y = x W^T + b. `accept` hands the weight to the kernel that was chosen for its format.

    Args:
        ops: the chosen callables.
        in_features, out_features: (tokens, in_features) -> (tokens, out_features).
        bias: whether there is one.
    """

    def __init__(self, ops: Ops, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.ops = ops
        self.in_features, self.out_features = in_features, out_features
        self.weight: nn.Parameter | None = _meta(out_features, in_features, dtype=ops.dtype)
        self.bias = _meta(out_features, dtype=ops.dtype) if bias else None
        self.kernel: LinearKernel | None = None
        self.packed: tuple[Tensor, ...] = ()

    def accept(self, weight: Weight, *, shared: bool = False) -> None:
        """Take the weight in; the parameter gives way to what the kernel made of it."""
        self.kernel = self.ops.linear(weight.format, self.out_features, self.in_features, shared)
        self.packed = self.kernel.prepare(weight, self.ops.dtype)
        self.weight = None

    def forward(self, x: Tensor) -> Tensor:  # (tokens, in) -> (tokens, out)
        return self.kernel(x, self.packed, self.bias)  # type: ignore[misc]


class Embedding(nn.Module):
    """Token vectors; rows that are stored in blocks are turned into numbers as they are looked up."""

    def __init__(self, ops: Ops, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.ops = ops
        self.format = "dense"
        self.weight: nn.Parameter | Tensor = _meta(vocab_size, hidden_size, dtype=ops.dtype)

    def accept(self, weight: Weight, *, shared: bool = False) -> None:
        del self.weight
        self.format = weight.format
        self.weight = weight.data.to(self.ops.dtype) if weight.format == "dense" else weight.data

    def forward(self, token_ids: Tensor) -> Tensor:  # (tokens,) -> (tokens, hidden)
        if self.format == "dense":
            return F.embedding(token_ids, self.weight)
        return dequantize_rows(self.weight[token_ids], self.format, self.ops.dtype)


def _meta(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
