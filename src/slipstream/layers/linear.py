"""Linear layers, stacks of them (experts) and embeddings, whose weights may stay packed as they arrived."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slipstream.layers.ops import Ops
from slipstream.ops.formats import Weight, decode
from slipstream.ops.linear import LinearKernel
from slipstream.ops.moe import Pairs
from slipstream.parallel.collectives import Together, whole


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
        self.weight: nn.Parameter | None = _meta(out_features, in_features, dtype=ops.dtype)
        self.bias = _meta(out_features, dtype=ops.dtype) if bias else None
        self.parts: list[tuple[LinearKernel, tuple[Tensor, ...]]] = []

    def accept(self, *weights: Weight, shared: bool = False) -> None:
        """Take the weight in; the parameter gives way to what the kernel made of it.

        Args:
            weights: more than one where a fused matrix arrived in parts of different formats, one above the other.
            shared: it is the embedding's too.
        """
        for weight in weights:
            kernel = self.ops.linear(weight.format, weight.shape[0], weight.shape[1], shared)
            self.parts.append((kernel, kernel.prepare(weight, self.ops.dtype)))
        self.weight = None

    @property
    def dense(self) -> Tensor | None:
        """The weight, (out, in), where its kernel holds it as plain numbers."""
        held = self.parts[0][1][0] if len(self.parts) == 1 else None
        return held if held is not None and held.layout == torch.strided and held.dtype == self.ops.dtype else None

    def forward(self, x: Tensor) -> Tensor:  # (tokens, in) -> (tokens, out)
        if len(self.parts) == 1:
            kernel, packed = self.parts[0]
            return kernel(x, packed, self.bias)
        out = torch.cat([kernel(x, packed, None) for kernel, packed in self.parts], -1)
        return out if self.bias is None else out.add_(self.bias)

    def left(self, x: Tensor) -> Tensor | Pairs:  # (tokens, in) -> (tokens, out)
        """Where the norm that comes next adds: a sum that is left to it, if the kernel is faster without; or in float32, as x is."""
        kernel, packed = self.parts[0]
        if len(self.parts) > 1:
            return self(x)
        if self.ops.adds and hasattr(kernel, "left"):
            found: Tensor | Pairs = kernel.left(x, packed, self.bias)
            return found
        return self(x) if len(x) > self.ops.wide_rows or isinstance(self.ops.ranks, Together) else self.wide(x)

    def wide(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """In float32 where the kernel can give it: of logits, the best two often are the same number in bfloat16.

        Args:
            out: (tokens, out) float32, for what the kernel gives in float32.
        """
        kernel, packed = self.parts[0]
        wide = getattr(kernel, "wide", None)
        if wide is None or len(self.parts) > 1:
            return self(x)
        found: Tensor = wide(x, packed, self.bias, out)
        return found


class Experts(nn.Module):
    """A stack of linear layers of one shape, called by number, or held as the experts' kernel wants the whole of it.

    Args:
        num_experts, in_features, out_features: (tokens, in_features) -> (tokens, out_features) for each of them.
        gated: gate above up.
        bias: whether each has one.
    """

    def __init__(
        self,
        ops: Ops,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        gated: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.ops, self.gated, self.shape = ops, gated, (num_experts, out_features, in_features)
        self.weight: nn.Parameter | None = _meta(num_experts, out_features, in_features, dtype=ops.dtype)
        self.bias = _meta(num_experts, out_features, dtype=ops.dtype) if bias else None
        self.kernel: LinearKernel | None = None
        self.packed: list[tuple[Tensor, ...]] = []
        self.stack: tuple[Tensor, ...] = ()

    def accept(self, weight: Weight, *, shared: bool = False) -> None:
        """Take a stack (experts, out, in) in."""
        num_experts, out, width = weight.shape
        prepare = self.ops.experts.kernel.prepare
        if prepare is not None:
            self.weight, self.stack = None, prepare(weight, self.ops.dtype, gated=self.gated)
            return
        kernel = self.kernel = self.ops.linear(weight.format, out, width, False)
        self.weight = None
        for e in range(num_experts):
            one = weight.map(lambda t, e=e: t[e], (out, width))  # type: ignore[misc]
            self.packed.append(kernel.prepare(one, self.ops.dtype))

    def forward(self, x: Tensor, expert: int) -> Tensor:  # (tokens, in) -> (tokens, out)
        bias = None if self.bias is None else self.bias[expert]
        return self.kernel(x, self.packed[expert], bias)  # type: ignore[misc]


class Embedding(nn.Module):
    """Token vectors; rows that are packed are turned into numbers as they are looked up."""

    def __init__(self, ops: Ops, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.ops = ops
        self.weight: nn.Parameter | None = _meta(vocab_size, hidden_size, dtype=ops.dtype)
        self.held: Weight | None = None

    def accept(self, weight: Weight, *, shared: bool = False) -> None:
        self.weight, self.held = None, weight

    def forward(self, token_ids: Tensor) -> Tensor:  # (tokens,) -> (tokens, hidden)
        ranks = self.ops.ranks
        if not isinstance(ranks, Together):
            return self._rows(token_ids)
        own = token_ids - ranks.vocab.start
        others = (own < 0) | (own >= len(ranks.vocab))
        return whole(ranks.reduce(self._rows(own.masked_fill(others, 0)).masked_fill(others[:, None], 0)))

    def _rows(self, token_ids: Tensor) -> Tensor:
        held = self.held
        if held is None:
            raise AssertionError("the embedding has not been loaded")
        if held.format == "dense":
            return F.embedding(token_ids, held.data)
        return decode(held.map(lambda t: t[token_ids], (len(token_ids), held.shape[1])), self.ops.dtype)


def _meta(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
