"""Random blocks of the formats that the gguf library decodes but does not make."""

from __future__ import annotations

import numpy as np

from slipstream.ops.formats.blocks import BLOCKS

SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,)}  # bytes where a float16 stands


def super_blocks(format: str, out: int, width: int, seed: int, size: float = 0.01) -> np.ndarray:
    """(out, bytes_per_row): any bytes, but float16 scales between `size` and twice as much."""
    _, values, nbytes = BLOCKS[format]
    draw = np.random.default_rng(seed)
    data = draw.integers(0, 256, (out, width // values, nbytes), dtype=np.uint8)
    for at in SCALES[format]:
        scales = draw.uniform(size, 2 * size, data.shape[:2]).astype(np.float16)
        data[..., at : at + 2] = scales[..., None].view(np.uint8)
    return data.reshape(out, -1)
