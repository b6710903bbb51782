"""What will run where, decided before anything is loaded: each choice with its reason, and the bytes it takes.

    plan = make_plan(asked, checkpoint)

builds the model on the meta device, chooses every op's implementation, matches the checkpoint's headers, and divides
the memory. Nothing is read but headers, and no tensor has memory yet.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from slipstream.cache.budget import choose_page_size, divide_pages
from slipstream.cache.spec import CacheGroup
from slipstream.checkpoint.load import Load
from slipstream.checkpoint.open import Checkpoint
from slipstream.config import EngineConfig, ModelConfig
from slipstream.config.kernels import is_repository
from slipstream.errors import CapacityError
from slipstream.hardware import Hardware
from slipstream.layers.ops import Ops
from slipstream.layers.transformer import Transformer
from slipstream.ops import attention
from slipstream.ops.choose import Choice
from slipstream.parallel.collectives import Wires
from slipstream.parallel.shares import Ranks
from slipstream.plan.choices import async_scheduling, cuda_graphs, dtype_name
from slipstream.plan.fit import Fit
from slipstream.plan.layout import lay_out
from slipstream.plan.memory import cublas_bytes, graphs_bytes, sizes, workspace_bytes
from slipstream.plan.weights import held_bytes

log = logging.getLogger(__name__)
__all__ = ["Plan", "dtype_name", "make_plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """Every decision. `why` maps a decision to its reason; `choices` holds the implementations with those passed over."""

    asked: EngineConfig
    model_config: ModelConfig
    hardware: Hardware
    device: torch.device
    dtype: torch.dtype
    choices: tuple[Choice, ...]
    ops: Ops
    model: Transformer  # on the meta device
    loads: tuple[Load, ...]
    held: tuple[int, ...]  # bytes in memory of each of the loads
    groups: tuple[CacheGroup, ...]
    num_pages: tuple[int, ...]
    page_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    weights_bytes: int
    kv_bytes: int
    workspace_bytes: int
    graphs_bytes: int
    cuda_graphs: bool
    async_scheduling: bool
    why: dict[str, str] = field(default_factory=dict)

    @property
    def stored_pages(self) -> tuple[int, ...]:
        """Pages in memory: graphs need one more in each group, for rows that only fill a step up."""
        return tuple(n + self.cuda_graphs for n in self.num_pages)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, for --json and for benchmark records."""
        return {
            "device": str(self.device),
            "hardware": self.hardware.name,
            "dtype": dtype_name(self.dtype),
            "architecture": self.model_config.model_type,
            "choices": [
                {"op": c.op, "implementation": c.name, "reason": c.reason, **({"source": c.source} if c.source else {}),
                 "rejected": [{"implementation": n, "why": w} for n, w in c.rejected]}
                for c in self.choices
            ],
            "weights": [
                {"arrived": a, "held": h, "parameters": n, "bytes": b} for (a, h), (n, b) in self._weights().items()
            ],
            "cache_groups": [
                {"name": g.name, "window": g.window, "layers": len(g.layers), "pages": n,
                 "bytes_per_token": g.bytes_per_token(self.dtype.itemsize),
                 "bytes": n * self.page_size * g.bytes_per_token(self.dtype.itemsize)}
                for g, n in zip(self.groups, self.num_pages, strict=True)
            ],
            "page_size": self.page_size,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "bytes": {
                "weights": self.weights_bytes, "kv_cache": self.kv_bytes, "workspace": self.workspace_bytes,
                "graphs": self.graphs_bytes,
                "total": self.weights_bytes + self.kv_bytes + self.workspace_bytes + self.graphs_bytes,
                "free": self.hardware.free_bytes,
            },
            "why": self.why,
        }  # fmt: skip

    def _weights(self) -> dict[tuple[str, str], tuple[int, int]]:
        found: dict[tuple[str, str], tuple[int, int]] = {}
        for item, size in zip(self.loads, self.held, strict=True):
            held = item.held.replace("dense", dtype_name(self.dtype))
            held = held + " (shared with the embedding)" if item.shared and item.held == "dense" else held
            n, b = found.get((item.arrived, held), (0, 0))
            found[item.arrived, held] = (n + 1, b + size)
        return found


@dataclass(frozen=True, slots=True)
class _Memory:
    """How it is divided."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    num_pages: tuple[int, ...]
    workspace_bytes: int
    graphs_bytes: int


def make_plan(
    asked: EngineConfig,
    checkpoint: Checkpoint,
    model_config: ModelConfig | None = None,
    ranks: Ranks | None = None,
    wires: Wires | None = None,
) -> Plan:
    """Decide everything for this model on this machine, and for this rank of those that share it.

    Args:
        wires: through which the ranks speak to each other.

    Raises:
        ConfigError: the device is not there.
        CheckpointError: the checkpoint does not fit its architecture.
        KernelError: no implementation can run an op, or a forced one cannot.
        CapacityError: it does not fit into memory; the message has the numbers.
    """
    laid = lay_out(asked, checkpoint, model_config, ranks or Ranks(), wires)
    config, hardware, dtype, why = laid.config, laid.hardware, laid.dtype, laid.why
    groups = laid.home.cache_spec(laid.local)
    held = tuple(held_bytes(item, laid.ops) for item in laid.loads)
    weights = sum(held)
    page_size = choose_page_size(asked, groups, why)
    graphs = cuda_graphs(asked, hardware, laid.choices, why)
    gpu = hardware.device.startswith("cuda")
    attends = next(c.name for c in laid.choices if c.op == "attention")

    def divide(asked: EngineConfig, weights: int, free_bytes: int, why: dict[str, str]) -> _Memory:
        sequences, batched = sizes(asked, hardware, why)
        wide = laid.ops.wide_rows
        workspace = workspace_bytes(config, batched, sequences, dtype, wide)
        spare = graphs_bytes(config, sequences, dtype, groups, page_size, laid.ranks.size, wide) if graphs else 0
        if gpu:  # a stream for steps, and one on which they are recorded
            product = cublas_bytes(hardware.capability)
            workspace, spare = workspace + product, spare + graphs * product
        if any(g.window is None for g in groups):
            longest = asked.max_model_len or config.max_position_embeddings
            sums = attention.scratch_bytes(attends, sequences, laid.local.num_heads, config.head_dim, longest)
            workspace, spare = workspace + sums, spare + graphs * sums
        max_len, num_pages = divide_pages(
            asked,
            groups,
            page_size=page_size,
            sequences=sequences,
            chunk=batched,
            longest=config.max_position_embeddings,
            dtype_bytes=dtype.itemsize,
            free_bytes=free_bytes,
            gpu=gpu,
            other_bytes=weights + workspace + spare,
            # Where it is not in pages, attention wants the keys of a prompt once for each query head, and scores or a mask.
            bytes_per_token=0
            if attends in attention.PAGED or is_repository(attends)
            else (2 * laid.local.num_heads * config.head_dim + batched) * dtype.itemsize,
            why=why,
        )
        return _Memory(sequences, batched, max_len, num_pages, workspace, spare)

    try:
        memory = divide(asked, weights, hardware.free_bytes, why)
    except CapacityError as e:
        sequences, batched = sizes(asked, hardware, {})
        sized = replace(asked, max_num_seqs=sequences, max_num_batched_tokens=batched)
        longest = config.max_position_embeddings
        fit = Fit(
            sized, longest, hardware.free_bytes, gpu, weights, lambda a, w, free: divide(a, w, free, {}), laid.repacked
        )
        raise fit.advise(e) from None
    for c in laid.choices:
        log.info("%s runs %s, %s", c.op, c.name, c.source or "our own")
    kv = sum(n * page_size * g.bytes_per_token(dtype.itemsize) for g, n in zip(groups, memory.num_pages, strict=True))
    return Plan(
        asked=asked,
        model_config=config,
        hardware=hardware,
        device=torch.device(hardware.device),
        dtype=dtype,
        choices=tuple(laid.choices),
        ops=laid.ops,
        model=laid.model,
        loads=laid.loads,
        held=held,
        groups=groups,
        num_pages=memory.num_pages,
        page_size=page_size,
        max_model_len=memory.max_model_len,
        max_num_seqs=memory.max_num_seqs,
        max_num_batched_tokens=memory.max_num_batched_tokens,
        weights_bytes=weights,
        kv_bytes=kv,
        workspace_bytes=memory.workspace_bytes,
        graphs_bytes=memory.graphs_bytes,
        cuda_graphs=graphs,
        async_scheduling=async_scheduling(asked, hardware, why),
        why=why,
    )
