"""Every kernel of a step but the experts', at small sizes, for the checkers that come with CUDA:

PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=src:. compute-sanitizer --tool memcheck python tests/gpu/sanitized.py
PYTHONPATH=src:. compute-sanitizer --tool racecheck python tests/gpu/sanitized.py
"""

from __future__ import annotations

import torch

from tests.ops import test_small_triton as small
from tests.ops.test_attention_triton import LENGTHS, MIXED, World
from tests.ops.test_decode_triton import LENGTHS as SINGLE
from tests.ops.test_decode_triton import Entering
from tests.ops.test_triton import few

BF16 = torch.bfloat16


def main() -> None:
    for tokens in (1, 5, 17):
        assert few(tokens, BF16, "cuda", rows=83, width=1104) < 6e-3
    assert small.add_norm(BF16, "cuda", 3, 96) < 8e-3
    assert small.enter(20, True, BF16, "cuda", (3, 6, 3, 20, 7)) < 0.08
    assert small.route(7, 3, False, True, BF16, "cuda") < 5e-6
    assert small.route_product(5, 600, 7, BF16, "cuda") < 2e-2
    assert small.choose(32, 4, False, True, BF16, "cuda") < 5e-6
    assert small.after_norm(3, 600, 33, 4, True, bias=True, parts=3, dtype=BF16, device="cuda") < 4e-2
    assert small.gate("swiglu_clamped", BF16, "cuda", 2, 523) < 8e-3
    for window in (None, 5):
        assert World(LENGTHS, window=window, dtype=BF16, device="cuda").error(MIXED) < 3e-2
        assert Entering(SINGLE, window=window, dtype=BF16, device="cuda").error(range(len(SINGLE))) < 6e-2
    long = World((1030, 9), heads=16, kv_heads=2, head_dim=64, dtype=BF16, device="cuda")
    assert long.error([(0, 1029, 1030), (1, 8, 9)]) < 3e-2  # splits, and what brings them together
    torch.cuda.synchronize()
    print("all kernels ran, and gave what their references give")


if __name__ == "__main__":
    main()
