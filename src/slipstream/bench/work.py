"""What a step must read and compute at least, from the plan alone.

A step of `tokens` tokens, of which `rows` want logits, reads

    bytes = dense + experts * touched / E + head + tokens * hidden * width + KV

dense: every weight that is no expert's, head or embedding, as it is held in memory; experts: those of all experts; head: the
output matrix, also where it is the embedding; `hidden * width`: a row of the embedding. With routing that is uniform, a token
misses an expert with probability 1 - k / E, so `touched = E * (1 - (1 - k / E) ** tokens)` experts are read. KV: keys and values
that queries can see, which in a layer with a window are its last ones. It computes

    flops = 2 * (tokens * (dense + experts * k / E) + rows * head) + 4 * heads * head_dim * visible

in parameters of matrices; `visible` is the sum of keys that each query sees, over all layers: a product with keys, and one
with values. In the last layer, what comes after it has `rows` in the place of `tokens`.
What is written, activations, norms and the sampler are left out, so no machine can be faster than this says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from slipstream.plan import Plan


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes read and floating point operations."""

    bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def __mul__(self, times: float) -> Work:
        return Work(self.bytes * times, self.flops * times)

    def seconds(self, bandwidth: float, flops: float) -> float:
        """At least, where reading (bytes a second) and computing (operations a second) go on side by side."""
        return max(self.bytes / bandwidth, self.flops / flops)

    def is_read(self, bandwidth: float, flops: float) -> bool:
        """Whether it is reading that takes longer."""
        return self.bytes / bandwidth >= self.flops / flops


def decode_work(plan: Plan, batch: int, context: float) -> Work:
    """A step in which each of `batch` sequences computes one token, which sees `context` keys with its own."""

    def seen(window: int | None) -> float:
        return context if window is None else min(context, window)

    kv = sum(batch * seen(g.window) * g.bytes_per_token(plan.dtype.itemsize) for g in plan.groups)
    return _weights(plan, batch, batch) + Work(kv, _attention(plan, lambda window: batch * seen(window)))


def prefill_work(plan: Plan, length: int, prompts: int = 1) -> Work:
    """Prompts of this length, each to its first new token, in one step."""

    def seen(window: int | None) -> float:
        full = min(window or length, length)
        return prompts * (full * (full + 1) / 2 + (length - full) * full)

    kv = sum(prompts * length * g.bytes_per_token(plan.dtype.itemsize) for g in plan.groups)
    return _weights(plan, prompts * length, prompts) + Work(kv, _attention(plan, seen))


def _attention(plan: Plan, visible: Callable[[int | None], float]) -> float:
    config = plan.model_config
    return sum(4 * config.num_heads * config.head_dim * len(g.layers) * visible(g.window) for g in plan.groups)


def _weights(plan: Plan, tokens: int, rows: int) -> Work:
    config = plan.model_config
    share = config.num_experts_per_tok / config.num_experts if config.num_experts else 0.0
    last = tuple(f"layers.{config.num_layers - 1}.{part}." for part in ("attention.out", "mlp"))
    read = float(tokens * config.hidden_size * plan.dtype.itemsize)
    flops = 0.0
    held = {item.to: size for item, size in zip(plan.loads, plan.held, strict=True)}
    for item in plan.loads:
        size, matrix = held[item.to], item.to.endswith(".weight") and len(item.shape) > 1
        given = rows if item.to.startswith(last) else tokens
        count = math.prod(item.shape) if matrix else 0
        if item.to == "embed.weight":
            continue
        if item.to == "head.weight":
            read += size or held["embed.weight"]
            flops += 2 * rows * count
        elif len(item.shape) == 3 or (len(item.shape) == 2 and not matrix):  # a stack, or the biases of one
            read += size * (1 - (1 - share) ** given)
            flops += 2 * given * share * count
        else:
            read += size
            flops += 2 * given * count
    return Work(read, flops)
