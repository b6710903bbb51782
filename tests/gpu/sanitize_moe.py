"""Small calls of every kernel of the experts, for compute-sanitizer, from the root of the tree:

for tool in memcheck racecheck; do PYTHONPATH=src:. compute-sanitizer --tool $tool python tests/gpu/sanitize_moe.py; done

What racecheck reports at the first line of `grouped` and at its warp_specialize is how Triton tells warps what to run: a byte for
each in shared memory, read and written on either side of barrier 1, which the checker does not follow. Other lines would be ours.
"""

from __future__ import annotations

import torch

from slipstream.ops.moe.triton import TABLE
from tests.ops.test_moe_triton import ALONE, alone, grouped, late, tiled

SIZES = (160, 96, 3, 2)
for name in ("few", "up to 12", "up to 40", "more"):
    assert tiled(TABLE[name], "mxfp4", 2 if name == "few" else 33, "silu", torch.bfloat16, "cuda", SIZES) < 6e-3
for one in ALONE:
    assert alone(one, "mxfp4", 2, "swiglu_clamped", torch.bfloat16, "cuda", SIZES) < 6e-3
for way in (*ALONE, TABLE["few"]):
    assert late(way, True, dtype=torch.bfloat16, device="cuda", sizes=(160, 96, 40, 3)) == 0
for size in (64, 128):
    assert grouped(size, "mxfp4", 97, "swiglu_clamped", torch.bfloat16, "cuda", SIZES) < 6e-3
torch.cuda.synchronize()
print("checked")
