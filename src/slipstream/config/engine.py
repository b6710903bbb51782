"""What the user asks of the engine, checked value by value."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass
from typing import Any

from slipstream.config.kernels import KernelsAsked, read_kernels
from slipstream.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the user asked of the engine. None is "decide it in the plan, and say why".

    Attributes:
        device: cpu, cuda, cuda:N, mps.
        dtype: auto, float32, bfloat16 or float16: of activations, and of weights that are not quantized.
        quantization: auto holds every weight as the checkpoint has it, and is an error where that cannot run; dequantize widens
            packed weights to dtype; mxfp4, int8 and int4 quantize linear layers and experts while they load.
        weights: checkpoint reads them; random draws them on the device, in the shapes and formats of config.json, so that a model
            can be measured before it is downloaded. What it writes is noise.
        tensor_parallel_size: ranks that share the model, each with a part of every layer; a GPU each, or a process each on a CPU.
        enable_expert_parallel: those ranks have whole experts, instead of a part of each; attention stays shared by heads.
        max_model_len: longest prompt + answer, tokens.
        max_num_seqs: requests that run together; None is 256 on a GPU with much free memory, else 64.
        max_num_batched_tokens: tokens computed in one step; None is 8192 there, else 2048.
        kv_cache_memory_bytes: bytes for keys and values; None plans them from what is free.
        gpu_memory_utilization: the part of the free memory that the plan may use (weights, KV, workspace); on a CPU at
            most half of it.
        page_size: tokens in one page of the KV cache; None takes what suits the model's windows.
        enable_prefix_caching: keep full pages of what was computed, for requests that begin alike, until their room is needed.
        scheduling_policy: fcfs serves requests in the order in which they come; priority goes by SamplingParams.priority.
        batch_invariant: a request's logits have the same bits alone and in any batch, in chunks or not, with or without what
            the cache holds; slower, and an error where an op has no implementation that keeps it.
        enforce_eager: run every step kernel by kernel, without CUDA graphs.
        async_scheduling: launch a step before the tokens of the one before it are looked at, so that the device need not wait;
            None does so on a GPU.
        attn_implementation: force one of the implementations that `explain` lists, or the kernels of a repository (org/name).
        linear_implementation: the same for every weight that it takes; an error if it takes none. Not of a repository.
        moe_implementation: force one for the experts of a mixture, as attn_implementation does.
        reduce_implementation: force one for small sums over ranks.
        kernels: builtin runs none but our own; auto also those of the repositories that we know (ops/candidate.py) where they are
            pinned, right and not slower; reference runs plain torch; {"norm": "org/name:Layer", ...} forces what it names.
        use_kernels: another word for kernels: true is auto, false is builtin.
        kernels_lock: the file that pins repositories; None looks for kernels.lock where the program runs.
        kernels_policy: the file that says which repositories may run; None looks for its usual place.
        count_calls: count the calls of every implementation, for `explain --used`.
        num_threads: CPU threads of each rank; None leaves torch's own choice, and ranks on a CPU share the cores.
        seed: from which requests without a seed of their own draw theirs, and random weights theirs (None is then 0).
    """

    device: str = "auto"
    dtype: str = "auto"
    quantization: str = "auto"
    weights: str = "checkpoint"
    tensor_parallel_size: int = 1
    enable_expert_parallel: bool = False
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    page_size: int | None = None
    enable_prefix_caching: bool = True
    scheduling_policy: str = "fcfs"
    batch_invariant: bool = False
    enforce_eager: bool = False
    async_scheduling: bool | None = None
    attn_implementation: str | None = None
    linear_implementation: str | None = None
    moe_implementation: str | None = None
    reduce_implementation: str | None = None
    kernels: Any = None
    use_kernels: bool | None = None
    kernels_lock: str | None = None
    kernels_policy: str | None = None
    count_calls: bool = False
    num_threads: int | None = None
    seed: int | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> EngineConfig:
        names = {f.name for f in dataclasses.fields(cls)}
        for name in kwargs.keys() - names:
            near = {"block_size": "page_size", "torch_dtype": "dtype"}.get(name) or next(
                iter(difflib.get_close_matches(name, names, 1)), None
            )
            hint = f"; did you mean {near}?" if near else f"; known are {', '.join(sorted(names))}"
            raise ConfigError(f"{name}: unknown engine option{hint}")
        return object.__new__(cls)

    def __post_init__(self) -> None:
        self._one_of("dtype", ("auto", "float32", "bfloat16", "float16"))
        self._one_of("scheduling_policy", ("fcfs", "priority"))
        self._one_of("weights", ("checkpoint", "random"))
        self._one_of("quantization", ("auto", "dequantize", "mxfp4", "int8", "int4"))
        if not isinstance(self.device, str) or not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,4})?", self.device):
            raise ConfigError(f"device: must be auto, cpu, cuda, cuda:N or mps, got {self.device!r}")
        for name, low in (
            ("max_num_seqs", 1), ("max_num_batched_tokens", 1), ("page_size", 1), ("max_model_len", 1),
            ("kv_cache_memory_bytes", 1), ("num_threads", 1), ("seed", 0), ("tensor_parallel_size", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(f"{name}: must be a whole number of at least {low}, got {value!r}")
        if self.async_scheduling is not None and not isinstance(self.async_scheduling, bool):
            raise ConfigError(f"async_scheduling: must be true or false, got {self.async_scheduling!r}")
        for name in (
            "enable_prefix_caching",
            "batch_invariant",
            "enforce_eager",
            "enable_expert_parallel",
            "count_calls",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: must be true or false, got {getattr(self, name)!r}")
        share = self.gpu_memory_utilization
        if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 < share <= 1 or math.isnan(share):
            raise ConfigError(f"gpu_memory_utilization: must be above 0 and at most 1, got {share!r}")

        asked = self.kernels_asked
        if self.tensor_parallel_size > 1 and asked.word == "auto":
            raise ConfigError(
                "kernels: auto measures kernels on each rank, which could choose differently; name them by op, or take builtin"
            )
        for name in ("kernels_lock", "kernels_policy"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name}: must be the path of a file, got {getattr(self, name)!r}")

    @property
    def kernels_asked(self) -> KernelsAsked:
        """What `kernels`, `use_kernels`, `attn_implementation` and `moe_implementation` say together."""
        return read_kernels(
            self.kernels, self.use_kernels, self.attn_implementation, self.moe_implementation, self.kernels_lock,
            self.kernels_policy,
        )  # fmt: skip

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise ConfigError(f"{name}: must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
