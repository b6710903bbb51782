"""What every test shares: one thread, no Hub by accident, GPU tests skipped without a GPU, and the small real model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch, tokenizers and huggingface_hub are imported, as they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    needed = 2 if item.get_closest_marker("multi_gpu") else 1 if item.get_closest_marker("gpu") else 0
    if needed:
        import torch

        if torch.cuda.device_count() < needed:
            pytest.skip(f"needs {needed} CUDA device(s), found {torch.cuda.device_count()}")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF of SmolLM2-135M-Instruct (Q4_1), downloaded once a machine."""
    from slipstream.sources import resolve

    return resolve("smollm2-135m-instruct")
