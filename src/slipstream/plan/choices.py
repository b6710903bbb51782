"""Which implementation runs each op, and the other choices that have nothing to do with memory."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from slipstream.checkpoint.load import Load
from slipstream.checkpoint.open import Checkpoint
from slipstream.config import EngineConfig, ModelConfig
from slipstream.errors import KernelError
from slipstream.hardware import Hardware
from slipstream.layers.mlp import MLP, MoE
from slipstream.layers.ops import WIDE_ROWS, ExpertsChoice, Ops
from slipstream.layers.transformer import Transformer
from slipstream.ops import (
    activation,
    attention,
    attention_input,
    candidate,
    linear,
    moe,
    norm,
    reduce,
    router,
    sampling,
)
from slipstream.ops.choose import Case, Choice, Impl, choose
from slipstream.ops.tuned import Tuned
from slipstream.ops.used import Used
from slipstream.parallel.collectives import Wires
from slipstream.parallel.shares import Ranks
from slipstream.trust import Policy

log = logging.getLogger(__name__)
# Implementations that bring numbers to the host in the middle of a step, or build their inputs there.
WAITING = {
    ("moe", "loop"),
    ("moe", "reference"),
    ("attention", "sdpa"),
    ("attention", "reference"),
    ("linear", "reference"),
}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def choose_dtype(
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


def waits(choice: Choice) -> bool:
    """Whether it needs the host in the middle of a step."""
    return (choice.op.split("[")[0], choice.name) in WAITING or getattr(choice.fn, "waits", False)


def _pick(op: str, impls: Sequence[Impl], case: Case, asked: EngineConfig, hardware: Hardware, key: str = "") -> Choice:
    def policy() -> Policy:
        return Policy.find(asked.kernels_lock, asked.kernels_policy)

    return candidate.pick(op, impls, case, asked.kernels_asked, policy, hardware.device, key)


def choose_ops(
    asked: EngineConfig, config: ModelConfig, hardware: Hardware, dtype: torch.dtype, known: Tuned
) -> tuple[list[Choice], Ops]:
    case = _case(asked, hardware, dtype)
    sinks = config.model_type == "gpt_oss"
    used = Used() if asked.count_calls else None
    attend = _case(asked, hardware, dtype, softcap=config.attn_logit_softcapping, sinks=sinks, head_dim=config.head_dim)
    width = max(config.hidden_size, config.num_heads * config.head_dim)
    wide = {"wide_weight": True} if config.model_type.startswith("gemma") else {}
    kinds = ("swiglu_clamped" if sinks else config.hidden_act,)

    def pick(op: str, impls: Sequence[Impl], case: Case, key: str = "") -> Choice:
        return _pick(op, impls, case, asked, hardware, key)

    def counted(choice: Choice, fn: Any = None) -> Any:
        return (fn or choice.fn) if used is None else used.counted(choice, fn)

    chosen = {
        "norm": pick("norm", norm.IMPLS, _case(asked, hardware, dtype, width=width, **wide)),
        "attention_input": pick("attention_input", attention_input.IMPLS, case, key="rotary"),
        "attention": pick("attention", attention.IMPLS, attend),
        "activation": pick("activation", activation.IMPLS, _case(asked, hardware, dtype, kinds=kinds)),
        "sampling": pick("sampling", sampling.IMPLS, case),
        "pick": pick("pick", sampling.PICK, case),
        "draw": pick("draw", sampling.DRAW, case),
        "router": pick("router", router.IMPLS, _case(asked, hardware, dtype, experts=config.num_experts)),
    }
    fused = attention.fused(chosen["attention_input"].name, chosen["attention"].name)
    if asked.linear_implementation not in (None, *(i.name for i in linear.IMPLS)):
        choose("linear", linear.IMPLS, case, asked.linear_implementation)  # says which there are
    kernels: dict[tuple[Any, ...], Any] = {}

    def kernel(format: str, out_features: int, in_features: int, shared: bool) -> Any:
        key = (format, out_features, in_features, shared)
        if key not in kernels:
            choice = _linear(asked, hardware, dtype, *key)
            kernels[key] = counted(choice, known.linear_kernel(choice, dtype_name(dtype), (out_features, in_features)))
        return kernels[key]

    fns = {op: counted(choice) for op, choice in chosen.items()}
    both = router.with_norm(chosen["norm"].name, chosen["router"].name)
    table = Ops(
        add_norm=fns["norm"], attention_input=fns["attention_input"], attention=fns["attention"],
        decode=None if fused is None else counted(chosen["attention"], fused),
        activation=fns["activation"], router=fns["router"], experts=ExpertsChoice(), linear=kernel, dtype=dtype,
        sample=fns["sampling"], pick=fns["pick"], draw=fns["draw"],
        add_norm_router=None if both is None else counted(chosen["router"], both),
        row_by_row=asked.batch_invariant and case.device == "cpu", adds=chosen["norm"].name in norm.ADDS, used=used,
        wide_rows=sys.maxsize if asked.batch_invariant else WIDE_ROWS,
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
    force = asked.linear_implementation or asked.kernels_asked.force("linear")
    if any(i.name == force and i.reject(case) is not None for i in linear.IMPLS):
        force = None  # not for this weight; that it is for none of them is an error, once all are known
    return choose(f"linear[{format}{', shared' if shared else ''}]", linear.IMPLS, case, force)


def experts_choice(
    asked: EngineConfig, model: Transformer, table: Ops, loads: tuple[Load, ...], hardware: Hardware,
    dtype: torch.dtype, known: Tuned,
) -> list[Choice]:  # fmt: skip
    layers = [m for m in model.modules() if isinstance(m, MoE)]
    if not layers:
        return []
    stacks = [part for item in loads if item.to.endswith(".weight") and len(item.shape) == 3 for part in item.parts()]
    case = _case(
        asked, hardware, dtype, kinds={m.kind for m in layers}, formats={part.format for part in stacks},
        sizes={part.local[1:] for part in stacks}, limit=layers[0].limit, spread=layers[0].ranks.experts is not None,
    )  # fmt: skip
    choice = _pick("moe", moe.IMPLS, case, asked, hardware)
    formats = {part.format for part in stacks if part.local == layers[0].gate_up.shape}
    kernel = known.experts_kernel(choice, formats, layers[0].gate_up.shape)
    if table.adds and kernel.leaves:
        kernel = replace(kernel, experts=partial(kernel.experts, leave=True))
    table.experts.kernel = kernel if table.used is None else table.used.counted(choice, kernel)
    return [choice]


def check_called(asked: EngineConfig, model: Transformer, choices: list[Choice], why: dict[str, str]) -> None:
    """Say what a fused kernel takes over from another op.

    Raises:
        KernelError: of an implementation that was named, nothing would be left to do.
    """
    named, chosen = asked.kernels_asked.named, {c.op: c for c in choices}
    experts, norms = chosen.get("moe"), chosen["norm"]
    if "moe" in named and experts is None:
        raise KernelError(f"moe: {named['moe']!r} was asked for, but this model has no experts")
    dense = any(isinstance(m, MLP) for m in model.modules())
    if experts is not None and experts.fn.prepare is not None and not dense:
        why["activation"] = f"is part of moe[{experts.name}], so nothing calls {chosen['activation'].name}"
        if "activation" in named:
            raise KernelError(
                f"activation: {named['activation']!r} was asked for, but it {why['activation']}; moe_implementation='loop' would"
            )
    if experts is not None and experts.fn.leaves and norms.name in norm.ADDS:
        why["sum of experts"] = f"is part of norm[{norms.name}] in decoding steps"
    summed = "reduce" in chosen and chosen["reduce"].name == "peers"  # with its norm
    if experts is not None and not summed and router.with_norm(norms.name, chosen["router"].name) is not None:
        why["norm before the router"] = (
            f"is part of router[{chosen['router'].name}] in steps of at most {router.AT_ONCE} tokens"
        )
    moes = [m for m in model.modules() if isinstance(m, MoE)]
    if any(m.may_leave for m in moes):
        why["choice of experts"] = f"is part of moe[{chosen['moe'].name}] in steps of one token"
    if norms.source and any(getattr(m, "qk_norm", None) == "head" for m in model.modules()):
        entry = chosen["attention_input"]
        why["norms of heads"] = f"are part of attention_input[{entry.name}]; {norms.name} computes all others"
    names = chosen["attention_input"].name, chosen["attention"].name
    if attention.fused(*names) is not None:
        why["attention_input"] = f"{names[0]} in steps with prompts; in all others it is part of attention[{names[1]}]"


def linear_choices(
    asked: EngineConfig, loads: tuple[Load, ...], hardware: Hardware, dtype: torch.dtype
) -> list[Choice]:
    found: dict[tuple[str, str], Choice] = {}
    for item in loads:
        if item.to.endswith(".weight") and len(item.shape) > 1 and item.to != "embed.weight":
            for part in item.parts():
                format, shape = part.format, part.local
                if 0 in shape:
                    continue
                c = _linear(asked, hardware, dtype, format, shape[-2], shape[-1], item.shared)
                found.setdefault((c.op, c.name), c)
    forced = asked.linear_implementation
    if forced is not None and all(c.name != forced for c in found.values()):
        reasons = "; ".join(f"{c.op}: {why}" for c in found.values() for name, why in c.rejected if name == forced)
        raise KernelError(f"linear_implementation: {forced!r} can run none of the weights: {reasons}")
    return list(found.values())


def reduce_choice(
    asked: EngineConfig, config: ModelConfig, hardware: Hardware, dtype: torch.dtype, ranks: Ranks, wires: Wires
) -> Choice:
    """How small sums over ranks are made. Large ones are always `collective`."""
    facts: dict[str, Any] = {"ranks": ranks.size, "machines": wires.machines, "width": config.hidden_size}
    if wires.why_not is not None:
        facts["unreachable"] = wires.why_not
    return choose("reduce", reduce.IMPLS, _case(asked, hardware, dtype, **facts), asked.reduce_implementation)


def cuda_graphs(asked: EngineConfig, hardware: Hardware, choices: list[Choice], why: dict[str, str]) -> bool:
    """Whether decoding steps are recorded and replayed."""
    if not hardware.device.startswith("cuda"):
        return False
    waiting = [f"{c.op}[{c.name}]" for c in choices if waits(c)]
    if asked.enforce_eager:
        why["cuda_graphs"] = "no: enforce_eager was asked for"
    elif waiting:
        why["cuda_graphs"] = f"no: {', '.join(waiting)} needs the host in the middle of a step"
    else:
        why["cuda_graphs"] = "decoding steps are recorded once for each size, and replayed"
    return not asked.enforce_eager and not waiting


def async_scheduling(asked: EngineConfig, hardware: Hardware, why: dict[str, str]) -> bool:
    """Whether a step is launched before the one before it is looked at."""
    if asked.async_scheduling is not None:
        why["async_scheduling"] = "asked for"
        return asked.async_scheduling
    gpu = hardware.device.startswith("cuda")
    reasons = "on a CPU the next step would wait for the same cores", "while the GPU runs a step, the next one is made"
    why["async_scheduling"] = reasons[gpu]
    return gpu
