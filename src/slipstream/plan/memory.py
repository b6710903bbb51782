"""How large steps may be, and the bytes that they take."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from slipstream.cache.spec import CacheGroup
from slipstream.config import EngineConfig, ModelConfig
from slipstream.hardware import Hardware
from slipstream.scheduler import SCORED_TOKENS

LARGE = 32 << 30  # bytes free on a GPU from which on many requests run together


def cublas_bytes(capability: tuple[int, int] | None) -> int:
    """What torch takes for cuBLAS with its first product on a stream, and keeps."""
    return 32 << 20 if capability is not None and capability >= (9, 0) else 4096 * 2048 + 16 * 8192


def sizes(asked: EngineConfig, hardware: Hardware, why: dict[str, str]) -> tuple[int, int]:
    """Sequences that run together, and tokens of one step. A large GPU is busy only with many of both."""
    large = hardware.device.startswith("cuda") and hardware.free_bytes >= LARGE
    found = []
    for name, most, else_ in (("max_num_seqs", 256, 64), ("max_num_batched_tokens", 8192, 2048)):
        value = getattr(asked, name)
        why[name] = "asked for"
        if value is None:
            value = most if large else else_
            why[name] = (
                f"more than {LARGE >> 30} GiB are free on a GPU"
                if large
                else f"a GPU with {LARGE >> 30} GiB free takes {most}"
            )
        found.append(value)
    return found[0], found[1]


def graphs_bytes(
    config: ModelConfig,
    rows: int,
    dtype: torch.dtype,
    groups: Sequence[CacheGroup],
    page: int,
    ranks: int,
    wide_rows: int,
) -> int:
    """What decoding steps hold for good: activations and logits of the largest, and pages that nobody owns. With several ranks
    logits are there twice, as they come and as they belong together."""
    spare = sum(page * g.bytes_per_token(dtype.itemsize) for g in groups)
    return spare + layer_bytes(config, rows, dtype, wide_rows) + (1 + (ranks > 1)) * rows * config.vocab_size * 4


def workspace_bytes(config: ModelConfig, tokens: int, sequences: int, dtype: torch.dtype, wide_rows: int) -> int:
    """Activations of one layer at the largest step, and logits in float32 with what the sampler makes of them."""
    rows = min(sequences, tokens) + min(SCORED_TOKENS, tokens)
    return layer_bytes(config, tokens, dtype, wide_rows) + 3 * rows * config.vocab_size * 4


def layer_bytes(config: ModelConfig, tokens: int, dtype: torch.dtype, wide_rows: int) -> int:
    """Of a step of so many tokens. Of at most `wide_rows` (layers/ops.py) sums, gate and up are float32."""
    wide = 4 if tokens <= wide_rows else dtype.itemsize
    inner = max(config.intermediate_size, config.moe_intermediate_size * max(config.num_experts_per_tok, 1))
    heads = (config.num_heads * 2 + config.num_kv_heads * 4) * config.head_dim
    return tokens * ((6 * config.hidden_size + 2 * inner) * wide + (heads + inner) * dtype.itemsize)
