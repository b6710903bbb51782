"""From the words of the command line to a model that is ready, and what its run cost."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from slipstream.cli.options import EngineOptions
from slipstream.cli.show import Bar, size

if TYPE_CHECKING:
    from slipstream.llm import LLM
    from slipstream.request import RequestOutput


def load_llm(model: str, options: EngineOptions, **more: Any) -> LLM:
    """The model, fetched if it is not here yet. A wrong option is told before anything is fetched.

    Args:
        more: options of the engine that are none of the command's.
    """
    engine = options.changes()
    if "WORLD_SIZE" in os.environ:
        from slipstream.parallel.launcher import refuse_other_size

        refuse_other_size(engine.get("tensor_parallel_size", 1))
    with Bar() as bar:
        from slipstream.sources import resolve

        path = resolve(model, progress=bar, weights=engine.get("weights") != "random")
        from slipstream.llm import LLM

        return LLM(
            path,
            progress=lambda done, total: bar(f"loading {model}", done, total),
            compiling=lambda done, total: bar("compiling kernels for this card, once", done, total, "kernels"),
            **engine,
            **more,
        )


def usage(llm: LLM, output: RequestOutput) -> dict[str, Any]:
    """What an answer cost: tokens, seconds, bytes. Tokens a second are those after the first, of all answers together.

    A value is None where there is nothing to measure.
    """
    m = output.metrics
    tokens = sum(len(c.token_ids) for c in output.outputs)
    begun = m is not None and m.first_token > 0
    later = tokens - len(output.outputs)
    seconds = m.finished - m.first_token if m is not None and begun and m.finished else 0.0
    return {
        "prompt_tokens": len(output.prompt_token_ids),
        "new_tokens": tokens,
        "time_to_first_token_seconds": m.first_token - m.arrived if m is not None and begun else None,
        "tokens_per_second": later / seconds if later > 0 and seconds > 0 else None,
        "peak_memory_bytes": _peak_memory(llm),
    }


def summary(used: dict[str, Any]) -> str:
    """`usage` in one line."""
    first, rate = used["time_to_first_token_seconds"], used["tokens_per_second"]
    parts = [f"{used['prompt_tokens']} prompt tokens", f"{used['new_tokens']} new tokens"]
    if first is not None:
        parts.append(f"first token after {first * 1000:.0f} ms" if first < 1 else f"first token after {first:.2f} s")
    if rate is not None:
        parts.append(f"{rate:.1f} tokens/s")
    return ", ".join([*parts, f"peak memory {size(used['peak_memory_bytes'])}"])


def _peak_memory(llm: LLM) -> int:
    """Bytes: of the GPU where the model runs on one, else of this process."""
    if llm.plan.device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(llm.plan.device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
