"""What is where, before memory is divided: the device, the implementations, the model, and this rank's part of every weight."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import ModuleType

import torch

from slipstream.checkpoint.load import Load
from slipstream.checkpoint.open import Checkpoint
from slipstream.checkpoint.support import check_layers, refuse_quantized
from slipstream.config import EngineConfig, ModelConfig
from slipstream.errors import ConfigError
from slipstream.hardware import Hardware, find_hardware
from slipstream.layers.ops import Ops
from slipstream.layers.transformer import Transformer
from slipstream.models import architecture
from slipstream.ops.choose import Choice
from slipstream.ops.formats.blocks import BLOCKS
from slipstream.ops.tuned import Tuned, tuned
from slipstream.parallel.collectives import Alone, Together, Wires
from slipstream.parallel.exchange import least_tokens, reason
from slipstream.parallel.shares import Ranks, Share, Unit, Units, cut_of, local_config, share_of
from slipstream.plan.choices import (
    check_called,
    choose_dtype,
    choose_ops,
    experts_choice,
    linear_choices,
    reduce_choice,
)
from slipstream.plan.memory import sizes
from slipstream.plan.weights import held_bytes, plan_loads


@dataclass(slots=True)
class Layout:
    """`config` is that of the whole model, `local` has the sizes of this rank's layers; `loads` say what of each weight is here."""

    asked: EngineConfig
    checkpoint: Checkpoint
    config: ModelConfig
    home: ModuleType
    hardware: Hardware
    dtype: torch.dtype
    choices: list[Choice]
    ops: Ops
    model: Transformer
    loads: tuple[Load, ...]
    local: ModelConfig
    ranks: Ranks
    units: Units
    known: Tuned
    why: dict[str, str]

    @property
    def spread(self) -> bool:
        """Whether experts are whole, each on one rank."""
        return self.asked.enable_expert_parallel and self.ranks.size > 1

    def share(self, rank: int) -> Share:
        return share_of(self.config, Ranks(rank, self.ranks.size), self.units, spread=self.spread)

    def loads_of(self, rank: int) -> tuple[Load, ...]:
        """What another rank has."""
        return cut_loads(self.loads, self.config, self.share(rank), Ranks(rank, self.ranks.size))

    def repacked(self, quantization: str) -> int:
        """Bytes of all weights here with another `quantization`. Raises as a plan would."""
        asked = replace(self.asked, quantization=quantization)
        whole = self.home.build(replace(self.ops, ranks=Alone()), self.config)
        device = self.hardware.device.split(":")[0]
        loads = plan_loads(asked, self.checkpoint, self.config, whole, self.home, self.ops, device, {})
        if self.ranks.size > 1:
            share = share_of(
                self.config, self.ranks, units_of(loads, self.config.head_dim, spread=self.spread), spread=self.spread
            )
            loads = cut_loads(loads, self.config, share, self.ranks)
        experts_choice(asked, whole, self.ops, loads, self.hardware, self.dtype, self.known)
        return sum(held_bytes(item, self.ops) for item in loads)


def lay_out(
    asked: EngineConfig, checkpoint: Checkpoint, model_config: ModelConfig | None, ranks: Ranks, wires: Wires | None
) -> Layout:
    """See make_plan, whose first half this is."""
    config = model_config or ModelConfig.from_hf(checkpoint.config)
    home = architecture(config.model_type)
    refuse_quantized(checkpoint, config.quantization)
    check_layers(checkpoint, config.num_layers, getattr(home, "rename", str))
    why: dict[str, str] = {}
    hardware = find_hardware(asked, why)
    packed = asked.quantization == "mxfp4" or any(t.format == "mxfp4" for t in checkpoint.tensors.values())
    if hardware.device.startswith("cuda") and (packed or config.num_experts):
        from slipstream.ops.moe.layout import begin

        begin(torch.device("cuda", torch.device(hardware.device).index or 0))  # while headers are read
    dtype = choose_dtype(asked, config, checkpoint, hardware, why)
    if asked.batch_invariant:
        why["batch_invariant"] = "asked for: every op runs in a way that gives a row the same bits in any batch"
    known = tuned(hardware.device, hardware.name, why)
    choices, ops = choose_ops(asked, config, hardware, dtype, known)
    model = home.build(ops, config)
    loads = plan_loads(asked, checkpoint, config, model, home, ops, hardware.device.split(":")[0], why)
    local, units = config, Units()
    if ranks.size > 1:
        spread = asked.enable_expert_parallel
        units = units_of(loads, config.head_dim, spread=spread)
        share = share_of(config, ranks, units, spread=spread)
        _explain(asked, config, ranks, hardware, why)
        if hardware.device == "cpu":  # which all of them share
            hardware = replace(hardware, free_bytes=hardware.free_bytes // ranks.size)
        local, loads = local_config(config, share), cut_loads(loads, config, share, ranks)
        wires = wires or Wires()
        reduce = reduce_choice(asked, config, hardware, dtype, ranks, wires)
        choices.append(reduce)
        peers = wires.peers if reduce.name == "peers" else None
        exchange = None
        if spread:
            sequences, batched = sizes(asked, hardware, {})
            graphs = hardware.device.startswith("cuda")  # in which the host cannot count
            least = least_tokens(config, ranks.size, dtype.itemsize, hardware.device.split(":")[0])
            exchange = max(least, sequences + 1) if graphs else least
            why["enable_expert_parallel"] += reason(config, ranks.size, exchange, batched)
        ops = replace(ops, ranks=Together(replace(wires, peers=peers), config, ranks, share, reduce.fn, exchange))
        model = home.build(ops, local)
        for item in loads:
            have, want = item.cut.shape(item.shape), tuple(model.get_parameter(item.to).shape)
            if have != want:
                raise AssertionError(f"{item.to}: {have} of {item.shape} is here, and the layer has {want}")
    elif asked.enable_expert_parallel:
        share_of(config, ranks, spread=True)  # refuses a model without experts, as it does for more ranks
        why["enable_expert_parallel"] = "asked for, but one rank has all experts anyway"
    choices += linear_choices(asked, loads, hardware, dtype)
    choices += experts_choice(asked, model, ops, loads, hardware, dtype, known)
    check_called(asked, model, choices, why)
    return Layout(
        asked, checkpoint, config, home, hardware, dtype, choices, ops, model, loads, local, ranks, units, known, why
    )


def cut_loads(loads: Iterable[Load], config: ModelConfig, share: Share, ranks: Ranks) -> tuple[Load, ...]:
    """The same parameters with what this rank has of each."""
    return tuple(
        replace(item, cut=cut_of(item.to, item.rule.shard, item.shape, config, share, ranks)) for item in loads
    )


def units_of(loads: Iterable[Load], head_dim: int, *, spread: bool = False) -> Units:
    """What cannot be cut apart: weights of a row that share a scale or a block, over all layers."""
    heads, inner = Unit(), Unit()
    for item in loads:
        if item.to.endswith("attention.out.weight"):
            heads = _larger(heads, item)
        elif item.to.endswith("mlp.down.weight") and not (spread and item.rule.shard == "expert"):
            inner = _larger(inner, item)
    heads = replace(heads, size=math.lcm(heads.size, head_dim) // head_dim)
    return Units(heads, inner)


def _larger(unit: Unit, item: Load) -> Unit:
    """In columns."""
    for format, source in zip(item.formats, item.sources, strict=True):
        block = 32 if format == "mxfp4" else BLOCKS[format][1] if format in BLOCKS else 1
        block = (item.group or source.group) if format == "int4" else block
        size = math.lcm(unit.size, block)
        if size > unit.size:
            unit = Unit(size, f"{item.to} in {format} cannot be cut within {block} inputs")
    return unit


def _explain(asked: EngineConfig, config: ModelConfig, ranks: Ranks, hardware: Hardware, why: dict[str, str]) -> None:
    if asked.batch_invariant and ranks.size > 2:
        raise ConfigError(
            f"batch_invariant: the sum over {ranks.size} ranks is made in an order that depends on the size of the step; take "
            "tensor_parallel_size=2 at most"
        )
    why["tensor_parallel_size"] = f"asked for: {ranks.size} ranks have a part of every layer each"
    if asked.enable_expert_parallel:
        why["enable_expert_parallel"] = (
            f"asked for: {config.num_experts} experts stay whole, spread over {ranks.size} ranks; "
        )
