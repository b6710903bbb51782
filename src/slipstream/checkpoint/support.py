"""What no rule can match, told from headers alone. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable

from slipstream.checkpoint.open import Checkpoint
from slipstream.errors import CheckpointError

Rename = Callable[[str], str | None]
_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,9})\.")


def refuse_quantized(checkpoint: Checkpoint, method: str | None) -> None:
    """Turn away, before a model is built, weights that no implementation can multiply by.

    Args:
        method: the quant_method that config.json names.

    Raises:
        CheckpointError: the weights are quantized in a way that cannot be run.
    """
    packed = ("_proj_blocks", "_proj_scales")
    mxfp4 = any(t.dtype == "MXFP4" or n.endswith(packed) for n, t in checkpoint.tensors.items())
    if mxfp4 or method == "mxfp4":
        raise CheckpointError(
            f"{checkpoint.path}: the experts are quantized to MXFP4, which is not supported yet; widening them "
            "would take four times the memory; take a bfloat16 form of this model"
        )
    if method is not None:
        raise CheckpointError(
            f"{checkpoint.path}: the weights are quantized by {method[:80]!r}, which is not supported; take the model "
            "in bfloat16 or a GGUF of it"
        )


def check_layers(checkpoint: Checkpoint, num_layers: int, rename: Rename) -> None:
    """Tell a config.json of another model size before a model is built. Raises CheckpointError."""
    found = max((int(m[1]) + 1 for n in checkpoint.tensors if (m := _LAYER.search(rename(n) or ""))), default=0)
    if found != num_layers:
        raise CheckpointError(f"{checkpoint.path}: config.json says {num_layers} layers, the tensors are of {found}")
