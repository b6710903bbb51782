"""slipstream: run open-weight language models. The names below load on first use, so that importing costs little."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slipstream.async_llm import AsyncLLM
    from slipstream.errors import (
        CapacityError,
        CheckpointError,
        ConfigError,
        KernelError,
        RankError,
        RequestError,
        SlipstreamError,
        TrustError,
    )
    from slipstream.llm import LLM
    from slipstream.quantization.quantize import quantize
    from slipstream.request import SamplingParams

__version__ = "0.1.0"

_HOME = {
    "LLM": "slipstream.llm",
    "AsyncLLM": "slipstream.async_llm",
    "quantize": "slipstream.quantization.quantize",
    "SamplingParams": "slipstream.request",
    "SlipstreamError": "slipstream.errors",
    "ConfigError": "slipstream.errors",
    "CheckpointError": "slipstream.errors",
    "KernelError": "slipstream.errors",
    "CapacityError": "slipstream.errors",
    "RankError": "slipstream.errors",
    "RequestError": "slipstream.errors",
    "TrustError": "slipstream.errors",
}
__all__ = [
    "LLM",
    "AsyncLLM",
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "KernelError",
    "RankError",
    "RequestError",
    "SamplingParams",
    "SlipstreamError",
    "TrustError",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'slipstream' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
