"""transformers in the place of our engine: the same weights, or the same shapes, on the same device, through `generate`."""

from __future__ import annotations

import contextlib
import gc
import io
import time
from pathlib import Path
from typing import Any

import torch

from slipstream.bench.machine import wait
from slipstream.bench.measure import Answers, Prompts
from slipstream.errors import CapacityError, CheckpointError, ConfigError
from slipstream.plan import Plan, dtype_name


class Transformers:
    """All prompts as one batch of `AutoModelForCausalLM.generate`, with its defaults.

    It loads what the plan was made for, in the plan's dtype. What it makes of packed weights is its own choice, so `holds` says it.

    Raises:
        ConfigError: it is not installed, or cannot be given the same weights.
        CheckpointError: it cannot read the checkpoint.
        CapacityError: it does not fit into memory.
    """

    repeats_itself = False  # that is for others to promise

    def __init__(self, path: Path, plan: Plan) -> None:
        self.vocab_size, self.device = plan.model_config.vocab_size, plan.device
        self.refuse(plan)
        self.model = self._load(path, plan)
        self.model.eval()

    @staticmethod
    def refuse(plan: Plan) -> None:
        """Before anything is measured."""
        installed()
        packed = sorted({s.format for item in plan.loads for s in item.sources if s.is_quantized})
        if plan.asked.weights == "random" and packed:
            raise ConfigError(
                f"against: random weights are drawn as {', '.join(packed)} here, and transformers would draw floats; measure on a "
                "checkpoint, or take a model that is not packed"
            )

    def _load(self, path: Path, plan: Plan) -> Any:
        import transformers

        transformers.logging.set_verbosity_error()
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # progress bars, which it draws into pipes too
                return _made(transformers, path, plan)
        except torch.OutOfMemoryError as e:
            raise CapacityError(f"transformers does not fit this model into memory: {e}") from e
        except (OSError, ValueError, ImportError, KeyError, RuntimeError) as e:
            raise CheckpointError(f"against: transformers cannot load {path}: {e}") from e

    @property
    def holds(self) -> str:
        """What it made of the weights."""
        size = self.model.get_memory_footprint() / 2**30
        return f"{dtype_name(next(self.model.parameters()).dtype)}, {size:.2f} GiB"

    def run(self, prompts: Prompts, new_tokens: int) -> Answers:
        from transformers import GenerationConfig

        ids = torch.tensor(prompts, device=self.device)
        asked = GenerationConfig(
            max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0, use_cache=True
        )
        wait(self.device)
        start = time.perf_counter()
        try:
            with torch.inference_mode():
                out = self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=asked)
        except torch.OutOfMemoryError as e:
            raise CapacityError(f"transformers has no memory for {len(prompts)} prompts together: {e}") from e
        wait(self.device)
        return Answers(time.perf_counter() - start, out[:, ids.shape[1] :].tolist())


def _made(transformers: Any, path: Path, plan: Plan) -> Any:
    auto = transformers.AutoModelForCausalLM
    if plan.asked.weights == "random":
        with torch.device(plan.device):
            return auto.from_config(transformers.AutoConfig.from_pretrained(path), dtype=plan.dtype)
    folder, files = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    return auto.from_pretrained(folder, dtype=plan.dtype, **files).to(plan.device)


def installed() -> None:
    """Raises ConfigError if there is no transformers."""
    try:
        import transformers  # noqa: F401
    except ImportError as e:
        raise ConfigError("against: transformers is not installed here; pip install transformers") from e


def release(device: torch.device) -> None:
    """Give back what is no longer held, so that the next one has room."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
