"""What will run where, decided before anything is loaded: each choice with its reason, and the bytes it takes.

    plan = make_plan(asked, checkpoint)

builds the model on the meta device, chooses every op's implementation, matches the checkpoint's headers, and divides
the memory. Nothing is read but headers, and no tensor has memory yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from slipstream.cache.budget import choose_page_size, divide_pages
from slipstream.cache.spec import CacheGroup
from slipstream.checkpoint.load import Load
from slipstream.checkpoint.open import Checkpoint
from slipstream.checkpoint.support import check_layers, refuse_quantized
from slipstream.config import EngineConfig, ModelConfig
from slipstream.errors import CapacityError, KernelError
from slipstream.hardware import Hardware, find_hardware
from slipstream.layers.mlp import MoE
from slipstream.layers.ops import ExpertsChoice, Ops
from slipstream.layers.transformer import Transformer
from slipstream.models import architecture
from slipstream.ops import activation, attention, attention_input, linear, moe, norm, router, sampling
from slipstream.ops.choose import Case, Choice, choose
from slipstream.ops.tuned import Tuned, tuned
from slipstream.plan.fit import Fit
from slipstream.plan.memory import Memory, cublas_bytes, graphs_bytes, sizes, workspace_bytes
from slipstream.plan.weights import held_bytes, plan_loads

# Implementations that bring numbers to the host in the middle of a step, or build their inputs there.
WAITING = {
    ("moe", "loop"),
    ("moe", "reference"),
    ("attention", "sdpa"),
    ("attention", "reference"),
    ("linear", "reference"),
}


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
                {"op": c.op, "implementation": c.name, "reason": c.reason,
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


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_plan(asked: EngineConfig, checkpoint: Checkpoint, model_config: ModelConfig | None = None) -> Plan:
    """Decide everything for this model on this machine.

    Raises:
        ConfigError: the device is not there.
        CheckpointError: the checkpoint does not fit its architecture.
        KernelError: no implementation can run an op, or a forced one cannot.
        CapacityError: it does not fit into memory; the message has the numbers.
    """
    config = model_config or ModelConfig.from_hf(checkpoint.config)
    home = architecture(config.model_type)
    rename = getattr(home, "rename", str)
    refuse_quantized(checkpoint, config.quantization)
    check_layers(checkpoint, config.num_layers, rename)
    why: dict[str, str] = {}
    hardware = find_hardware(asked, why)
    dtype = _dtype(asked, config, checkpoint, hardware, why)
    if asked.batch_invariant:
        why["batch_invariant"] = "asked for: every op runs in a way that gives a row the same bits in any batch"
    known = tuned(hardware.device, hardware.name, why)
    choices, ops_table = _choose(asked, config, hardware, dtype, known)
    model = home.build(ops_table, config)
    loads = plan_loads(asked, checkpoint, config, model, home, ops_table, hardware.device.split(":")[0], why)
    choices += _linear_choices(asked, loads, hardware, dtype)
    choices += _experts_choice(asked, model, ops_table, loads, hardware, dtype, known)

    groups = home.cache_spec(config)
    held = tuple(held_bytes(item, ops_table) for item in loads)
    weights = sum(held)
    page_size = choose_page_size(asked, groups, why)
    graphs = _cuda_graphs(asked, hardware, choices, why)
    gpu = hardware.device.startswith("cuda")
    attends = next(c.name for c in choices if c.op == "attention")

    def divide(asked: EngineConfig, weights: int, free_bytes: int, why: dict[str, str]) -> Memory:
        sequences, batched = sizes(asked, hardware, why)
        workspace = workspace_bytes(config, batched, sequences, dtype)
        recorded = graphs_bytes(config, sequences, dtype, groups, page_size) if graphs else 0
        if gpu:  # a stream for steps, and one on which they are recorded
            product = cublas_bytes(hardware.capability)
            workspace, recorded = workspace + product, recorded + graphs * product
        if any(g.window is None for g in groups):
            longest = asked.max_model_len or config.max_position_embeddings
            sums = attention.scratch_bytes(attends, sequences, config.num_heads, config.head_dim, longest)
            workspace, recorded = workspace + sums, recorded + graphs * sums
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
            other_bytes=weights + workspace + recorded,
            # Where it is not in pages, attention wants the keys of a prompt once for each query head, and scores or a mask.
            bytes_per_token=0
            if attends in attention.PAGED
            else (2 * config.num_heads * config.head_dim + batched) * dtype.itemsize,
            why=why,
        )
        return Memory(sequences, batched, max_len, num_pages, workspace, recorded)

    def repacked(quantization: str) -> int:
        other, device = replace(asked, quantization=quantization), hardware.device.split(":")[0]
        loads = plan_loads(other, checkpoint, config, model, home, ops_table, device, {})
        _experts_choice(other, model, ops_table, loads, hardware, dtype, known)
        return sum(held_bytes(item, ops_table) for item in loads)

    try:
        memory = divide(asked, weights, hardware.free_bytes, why)
    except CapacityError as e:
        sequences, batched = sizes(asked, hardware, {})
        sized = replace(asked, max_num_seqs=sequences, max_num_batched_tokens=batched)
        longest = config.max_position_embeddings
        fit = Fit(
            sized, longest, hardware.free_bytes, gpu, weights, lambda a, w, free: divide(a, w, free, {}), repacked
        )
        raise fit.advise(e) from None
    kv = sum(n * page_size * g.bytes_per_token(dtype.itemsize) for g, n in zip(groups, memory.num_pages, strict=True))
    return Plan(
        asked=asked,
        model_config=config,
        hardware=hardware,
        device=torch.device(hardware.device),
        dtype=dtype,
        choices=tuple(choices),
        ops=ops_table,
        model=model,
        loads=loads,
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
        async_scheduling=_async_scheduling(asked, hardware, why),
        why=why,
    )


def _cuda_graphs(asked: EngineConfig, hardware: Hardware, choices: list[Choice], why: dict[str, str]) -> bool:
    """Whether decoding steps are recorded and replayed."""
    if not hardware.device.startswith("cuda"):
        return False
    waits = [f"{c.op}[{c.name}]" for c in choices if (c.op.split("[")[0], c.name) in WAITING]
    if asked.enforce_eager:
        why["cuda_graphs"] = "no: enforce_eager was asked for"
    elif waits:
        why["cuda_graphs"] = f"no: {', '.join(waits)} needs the host in the middle of a step"
    else:
        why["cuda_graphs"] = "decoding steps are recorded once for each size, and replayed"
    return not asked.enforce_eager and not waits


def _async_scheduling(asked: EngineConfig, hardware: Hardware, why: dict[str, str]) -> bool:
    """Whether a step is launched before the one before it is looked at."""
    if asked.async_scheduling is not None:
        why["async_scheduling"] = "asked for"
        return asked.async_scheduling
    gpu = hardware.device.startswith("cuda")
    reasons = "on a CPU the next step would wait for the same cores", "while the GPU runs a step, the next one is made"
    why["async_scheduling"] = reasons[gpu]
    return gpu


def _dtype(
    asked: EngineConfig, config: ModelConfig, checkpoint: Checkpoint, hardware: Hardware, why: dict[str, str]
) -> torch.dtype:
    if asked.dtype != "auto":
        why["dtype"] = "asked for"
        return getattr(torch, asked.dtype)
    blocks = any(t.is_quantized and not t.parts for t in checkpoint.tensors.values())  # GGUF does not say
    name = "bfloat16" if blocks else config.dtype
    why["dtype"] = "quantized weights run in bfloat16" if blocks else "the checkpoint's own"
    if name == "float16" and hardware.device == "cpu":
        name, why["dtype"] = "bfloat16", "float16 has no fast path on CPUs, bfloat16 has the same size"
    return getattr(torch, name)


def _case(asked: EngineConfig, hardware: Hardware, dtype: torch.dtype, **facts: Any) -> Case:
    if asked.batch_invariant:
        facts["batch_invariant"] = True
    return Case(hardware.device.split(":")[0], dtype_name(dtype), hardware.capability, facts)


def _choose(
    asked: EngineConfig, config: ModelConfig, hardware: Hardware, dtype: torch.dtype, known: Tuned
) -> tuple[list[Choice], Ops]:
    case = _case(asked, hardware, dtype)
    sinks = config.model_type == "gpt_oss"
    attend = _case(asked, hardware, dtype, softcap=config.attn_logit_softcapping, sinks=sinks, head_dim=config.head_dim)
    width = max(config.hidden_size, config.num_heads * config.head_dim)
    chosen = {
        "norm": choose("norm", norm.IMPLS, _case(asked, hardware, dtype, width=width)),
        "attention_input": choose("attention_input", attention_input.IMPLS, case),
        "attention": choose("attention", attention.IMPLS, attend, asked.attn_implementation),
        "activation": choose("activation", activation.IMPLS, case),
        "sampling": choose("sampling", sampling.IMPLS, case),
        "pick": choose("pick", sampling.PICK, case),
        "draw": choose("draw", sampling.DRAW, case),
        "router": choose("router", router.IMPLS, _case(asked, hardware, dtype, experts=config.num_experts)),
    }
    if asked.linear_implementation not in (None, *(i.name for i in linear.IMPLS)):
        choose("linear", linear.IMPLS, case, asked.linear_implementation)  # says which there are
    kernels: dict[tuple[Any, ...], Any] = {}

    def kernel(format: str, out_features: int, in_features: int, shared: bool) -> Any:
        key = (format, out_features, in_features, shared)
        if key not in kernels:
            choice = _linear(asked, hardware, dtype, *key)
            kernels[key] = known.linear_kernel(choice, dtype_name(dtype), (out_features, in_features))
        return kernels[key]

    table = Ops(
        add_norm=chosen["norm"].fn, attention_input=chosen["attention_input"].fn, attention=chosen["attention"].fn,
        activation=chosen["activation"].fn, router=chosen["router"].fn, experts=ExpertsChoice(), linear=kernel, dtype=dtype,
        sample=chosen["sampling"].fn, pick=chosen["pick"].fn, draw=chosen["draw"].fn,
        row_by_row=asked.batch_invariant and case.device == "cpu",
    )  # fmt: skip
    if not config.num_experts:
        del chosen["router"]
    if case.device != "cuda" and not asked.async_scheduling:
        del chosen["pick"], chosen["draw"]
    return list(chosen.values()), table


def _linear(
    asked: EngineConfig, hardware: Hardware, dtype: torch.dtype, format: str, out: int, width: int, shared: bool
) -> Choice:
    case = _case(asked, hardware, dtype, format=format, out_features=out, in_features=width, shared=shared)
    force = asked.linear_implementation
    if any(i.name == force and i.reject(case) is not None for i in linear.IMPLS):
        force = None  # not for this weight; that it is for none of them is an error, once all are known
    return choose(f"linear[{format}{', shared' if shared else ''}]", linear.IMPLS, case, force)


def _experts_choice(
    asked: EngineConfig, model: Transformer, table: Ops, loads: tuple[Load, ...], hardware: Hardware,
    dtype: torch.dtype, known: Tuned,
) -> list[Choice]:  # fmt: skip
    layers = [m for m in model.modules() if isinstance(m, MoE)]
    if not layers:
        return []
    stacks = [part for item in loads if item.to.endswith(".weight") and len(item.shape) == 3 for part in item.parts()]
    case = _case(
        asked, hardware, dtype, kinds={m.kind for m in layers}, formats={format for format, _, _ in stacks},
        sizes={shape[1:] for _, _, shape in stacks},
    )  # fmt: skip
    choice = choose("moe", moe.IMPLS, case, asked.moe_implementation)
    formats = {format for format, _, shape in stacks if shape == layers[0].gate_up.shape}
    table.experts.kernel = known.experts_kernel(choice, formats, layers[0].gate_up.shape)
    return [choice]


def _linear_choices(
    asked: EngineConfig, loads: tuple[Load, ...], hardware: Hardware, dtype: torch.dtype
) -> list[Choice]:
    found: dict[tuple[str, str], Choice] = {}
    for item in loads:
        if item.to.endswith(".weight") and len(item.shape) > 1 and item.to != "embed.weight":
            for format, _, shape in item.parts():
                c = _linear(asked, hardware, dtype, format, shape[-2], shape[-1], item.shared)
                found.setdefault((c.op, c.name), c)
    forced = asked.linear_implementation
    if forced is not None and all(c.name != forced for c in found.values()):
        reasons = "; ".join(f"{c.op}: {why}" for c in found.values() for name, why in c.rejected if name == forced)
        raise KernelError(f"linear_implementation: {forced!r} can run none of the weights: {reasons}")
    return list(found.values())
