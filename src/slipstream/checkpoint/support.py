"""What no rule can match, told from headers alone. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable

from slipstream.checkpoint.open import Checkpoint
from slipstream.checkpoint.packed import declared
from slipstream.errors import CheckpointError

Rename = Callable[[str], str | None]
_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,9})\.")


def refuse_quantized(checkpoint: Checkpoint, method: str | None) -> None:
    """Turn away, before a model is built, weights that are quantized in a way that is not read.

    Args:
        method: the quant_method that config.json names; None leaves nothing to refuse.

    Raises:
        CheckpointError: it says which way, and what to try.
    """
    if method is not None:
        declared({"quantization_config": {"quant_method": method}} | checkpoint.config, checkpoint.path)


def check_layers(checkpoint: Checkpoint, num_layers: int, rename: Rename) -> None:
    """Tell a config.json of another model size before a model is built. Raises CheckpointError."""
    if checkpoint.kind == "random":
        return
    found = max((int(m[1]) + 1 for n in checkpoint.tensors if (m := _LAYER.search(rename(n) or ""))), default=0)
    if found != num_layers:
        raise CheckpointError(f"{checkpoint.path}: config.json says {num_layers} layers, the tensors are of {found}")
