"""Goes over a model of transformers and decides, layer by layer, what computes it from now on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from slipstream.bridge import attention as bridge_attention
from slipstream.bridge.layers import MLP, Experts, Norm, has_hooks, kind_of
from slipstream.bridge.report import Layer, Report
from slipstream.config import EngineConfig
from slipstream.config.kernels import is_repository
from slipstream.errors import ConfigError, KernelError
from slipstream.hardware import Hardware, find_hardware
from slipstream.ops import activation, attention, moe, norm
from slipstream.ops.candidate import SLOWER, TIMED, pick
from slipstream.ops.choose import Case, Choice
from slipstream.ops.sample import TOLERANCE, Run, seconds
from slipstream.plan import dtype_name
from slipstream.trust import Policy

NAME = "slipstream-"  # how what is registered with transformers begins
ATTACHED = "_slipstream_experts"


class Bridge:
    """One model on its way."""

    def __init__(self, model: Any, kernels: Any, policy: Policy | None) -> None:
        if not isinstance(model, nn.Module) or not hasattr(model, "set_attn_implementation"):
            raise ConfigError(f"model: must be a model of transformers 5, got {type(model).__name__}")
        if model.training:
            raise ConfigError(
                "model: is in training mode, and these kernels have no derivatives; call model.eval() first"
            )
        if self._is_done(model):
            raise ConfigError(
                "model: kernelize has been here before; call undo() of the report that it gave, and then again"
            )
        devices = {p.device for p in model.parameters()}
        if len(devices) != 1 or next(iter(devices)).type not in ("cpu", "cuda"):
            raise ConfigError(f"model: must be whole on one CPU or CUDA device, and is on {sorted(map(str, devices))}")
        self.model: Any = model
        self.device, self.dtype = devices.pop(), next(model.parameters()).dtype
        if dtype_name(self.dtype) not in TOLERANCE:
            raise ConfigError(f"model: must be in {', '.join(TOLERANCE)}, and is in {dtype_name(self.dtype)}")
        self.asked = EngineConfig(device=str(self.device), kernels=kernels)
        self.hardware: Hardware = find_hardware(self.asked, {})
        self._policy = policy
        self._picked: dict[str, Choice] = {}
        self._speed: dict[type, str | None] = {}
        self.report = Report([])
        self.name = f"{NAME}{uuid4().hex[:12]}"
        self.fates: dict[str, tuple[Choice | None, str]] = {}
        self.before = list(model.named_modules())

    @staticmethod
    def _is_done(model: Any) -> bool:
        named = str(getattr(getattr(model, "config", None), "_attn_implementation", ""))
        return named.startswith(NAME) or any(
            isinstance(m, (Norm, MLP)) or ATTACHED in m.__dict__ for m in model.modules()
        )

    def run(self) -> Report:
        try:
            with torch.no_grad():
                self._norms()
                self._mlps()
                self._experts()
                self._attention()
            self._check_named()
        except BaseException:
            self.report.undo()
            raise
        self.report.layers, self.report.choices = list(self._layers()), list(self._picked.values())
        return self.report

    def _check_named(self) -> None:
        """Nothing that was named is left out in silence."""
        taken = {choice.op for choice, _ in self.fates.values() if choice is not None}
        for op, name in self.asked.kernels_asked.named.items():
            if op not in taken:
                raise KernelError(f"{op}: {name!r} was asked for, but no layer of this model can be given it")

    def _pick(self, op: str, impls: Any, **facts: Any) -> Choice:
        """The choice for layers of one kind, made once."""
        key = f"{op} {sorted(facts.items(), key=lambda item: item[0])}"
        if key not in self._picked:
            case = Case(self.device.type, dtype_name(self.dtype), self.hardware.capability, facts)
            wants, policy = self.asked.kernels_asked, lambda: self._policy or Policy.find()
            self._picked[key] = pick(op, impls, case, wants, policy, self.hardware.device)
        return self._picked[key]

    def _modules(self, wanted: Callable[[Any], bool]) -> list[tuple[str, Any]]:
        return [(name, module) for name, module in self.model.named_modules() if wanted(module)]

    def _norms(self) -> None:
        found = self._modules(
            lambda m: "RMSNorm" in type(m).__name__ and isinstance(getattr(m, "weight", None), Tensor)
        )
        if not found:
            return
        choice = self._pick("norm", norm.IMPLS, width=max(m.weight.numel() for _, m in found))
        for name, old in found:
            eps = getattr(old, "variance_epsilon", getattr(old, "eps", None))
            if isinstance(eps, float) and old.weight.dim() == 1:
                new = Norm(choice.fn, old.weight, eps)
                self._exchange(name, old, new, choice, self._numbers(old.weight.numel()))
            else:
                self.fates[name] = None, "it has no weight of one dimension and no epsilon"

    def _mlps(self) -> None:
        parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
        found = self._modules(lambda m: all(isinstance(getattr(m, p, None), nn.Module) for p in parts))
        for name, old in found:
            if any(type(getattr(old, p)) is not nn.Linear for p in parts[:3]):
                other = type(old.gate_proj).__name__
                self.fates[name] = None, f"its projections are {other}, which hold their weights in a way of their own"
                continue
            if (old.gate_proj.bias is None) != (old.up_proj.bias is None):
                self.fates[name] = None, "of its gate and up only one has a bias"
                continue
            kind = kind_of(partial(_gated, old.act_fn), device=self.device)
            if kind is None:
                self.fates[name] = None, f"its activation is {type(old.act_fn).__name__}, which no kernel here computes"
                continue
            choice = self._activation(kind)
            self._exchange(name, old, MLP(choice.fn, kind, old), choice, self._numbers(old.gate_proj.in_features))

    def _activation(self, kind: str) -> Choice:
        return self._pick("activation", activation.IMPLS, kinds=(kind,))

    def _experts(self) -> None:
        wanted = ("is_concatenated", "is_transposed", "has_bias", "num_experts", "gate_up_proj", "down_proj")
        found = self._modules(lambda m: all(hasattr(m, name) for name in wanted) and getattr(m, "has_gate", False))
        kernels: list[tuple[Any, Experts]] = []
        for name, old in found:
            if old.gate_up_proj.dtype != self.dtype:
                self.fates[name] = None, f"its weights are in {dtype_name(old.gate_up_proj.dtype)}"
                continue
            kind = kind_of(old._apply_gate, alternates=not old.is_concatenated, device=self.device)
            if kind is None:
                self.fates[name] = None, "its gate is none that a kernel here computes"
                continue
            shapes = (old.gate_up_proj.shape, old.down_proj.shape)
            sizes = {tuple(reversed(s[1:])) if old.is_transposed else tuple(s[1:]) for s in shapes}
            limit = float(getattr(old, "limit", 7.0))
            choice = self._pick("moe", moe.IMPLS, kinds={kind}, formats={"dense"}, sizes=sizes, limit=limit)
            if why := self._no_room(choice, old):
                self.fates[name] = None, why
                continue
            new = Experts(choice.fn, old, self._activation(kind).fn, kind)
            x = self._numbers(old.down_proj.shape[2 if old.is_transposed else 1])
            ids = torch.arange(len(x) * 2, device=self.device).view(-1, 2) % old.num_experts
            shares = self._numbers(2).abs()
            why = self._differs(old(x, ids, shares), new(x, ids, shares))
            if why := why or self._slower(
                choice, type(old), partial(old, x, ids, shares), partial(new, x, ids, shares)
            ):
                self.fates[name] = None, why
                continue
            kernels.append((old, new))
            self.fates[name] = choice, choice.reason
        if kernels:
            self._register_experts(kernels)

    def _register_experts(self, kernels: list[tuple[Any, Experts]]) -> None:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        name, before = self.name, self.model.get_experts_implementation()
        # There and not in the function below, so that they go, and are copied, with the model.
        for module, kernel in kernels:
            module.__dict__[ATTACHED] = kernel
            self.report._undo.append(partial(module.__dict__.pop, ATTACHED))

        def experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            found: Experts | None = module.__dict__.get(ATTACHED)
            if found is not None:
                return found(hidden_states, top_k_index, top_k_weights)
            plain = ALL_EXPERTS_FUNCTIONS.get_interface(str(before[""]), type(module).forward.__wrapped__)
            result: Tensor = plain(module, hidden_states, top_k_index, top_k_weights)
            return result

        ALL_EXPERTS_FUNCTIONS.register(name, experts)
        self.report._undo.append(lambda: ALL_EXPERTS_FUNCTIONS._global_mapping.pop(name, None))
        self.model.set_experts_implementation(name)
        self.report._undo.append(lambda: self.model.set_experts_implementation(before))

    def _no_room(self, choice: Choice, old: Any) -> str | None:
        if choice.fn.prepare is None or self.device.type != "cuda":
            return None
        size = old.gate_up_proj.nbytes + old.down_proj.nbytes
        free = torch.cuda.mem_get_info(self.device)[0]
        if size < free * 0.8:
            return None
        return f"{choice.name} holds a second copy of its weights, {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"

    def _attention(self) -> None:
        found = self._modules(lambda m: hasattr(m, "num_key_value_groups") and hasattr(m, "is_causal"))
        if not found:
            return
        if not self.model._can_set_attn_implementation():
            for name, _ in found:
                self.fates[name] = None, "this model does not go through transformers' AttentionInterface"
            return
        head_dims = {getattr(m, "head_dim", 0) for _, m in found}
        sinks = any(isinstance(getattr(m, "sinks", None), Tensor) for _, m in found)
        config = self.model.config
        if len(head_dims) != 1 or not all(m.is_causal for _, m in found) or config.sub_configs:
            for name, _ in found:
                self.fates[name] = (
                    None,
                    "only models whose attention is all causal, with heads of one size, are known here",
                )
            return
        softcap = getattr(config, "attn_logit_softcapping", None)
        choice = self._pick("attention", attention.IMPLS, softcap=softcap, sinks=sinks, head_dim=head_dims.pop())
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        name, before = self.name, config._attn_implementation
        copies = not (choice.name.startswith("triton") or is_repository(choice.name))
        for table, fn in (
            (ALL_ATTENTION_FUNCTIONS, bridge_attention.forward(choice.fn, copies=copies)),
            (ALL_MASK_ATTENTION_FUNCTIONS, bridge_attention.step_mask),
        ):
            table.register(name, fn)
            self.report._undo.append(partial(table._global_mapping.pop, name, None))
        self.model.set_attn_implementation(name)
        self.report._undo.append(lambda: self.model.set_attn_implementation(before))
        for path, _ in found:
            self.fates[path] = choice, choice.reason

    def _numbers(self, width: int) -> Tensor:
        made = torch.randn(TIMED, width, generator=torch.Generator().manual_seed(width))
        return made.to(self.device, self.dtype)

    def _differs(self, want: Tensor, got: Tensor) -> str | None:
        if (want.shape, want.dtype) != (got.shape, got.dtype):
            return f"the kernel gives {tuple(got.shape)} {got.dtype} and not {tuple(want.shape)} {want.dtype} as this layer does"
        error = ((want.float() - got.float()).abs().max() / want.float().abs().max().clamp(min=1e-12)).item()
        if error <= TOLERANCE[dtype_name(self.dtype)]:
            return None
        return f"the kernel gives other numbers than this layer: they differ by {error:.2g} of the largest"

    def _slower(self, choice: Choice, kind: type, old: Run, new: Run) -> str | None:
        """With auto: whether the first layer of its kind would take longer than transformers' own."""
        if self.asked.kernels_asked.word != "auto" or choice.name in self.asked.kernels_asked.named.values():
            return None
        if kind not in self._speed:
            before, after = (seconds(run, self.device, 5) for run in (old, new))
            self._speed[kind] = None if after <= SLOWER * before else (
                f"{choice.name} is slower than it here: {after * 1e6:.0f} us against {before * 1e6:.0f} us for {TIMED} tokens"
            )  # fmt: skip
        return self._speed[kind]

    def _exchange(self, name: str, old: Any, new: Any, choice: Choice, x: Tensor) -> None:
        """Put `new` in the place of `old`, if it gives the same."""
        if hasattr(old, "_hf_hook"):
            self.fates[name] = None, "accelerate moves its weights about"
            return
        if any(map(has_hooks, old.modules())):
            self.fates[name] = None, "it has hooks, which would not be called"
            return
        want = old(x)
        try:
            why = self._differs(want, new(x)) or self._slower(choice, type(old), partial(old, x), partial(new, x))
        except RuntimeError as e:
            why = f"the kernel cannot run on it: {e}"
        if why is not None and choice.name in self.asked.kernels_asked.named.values():
            raise KernelError(f"{name}: {choice.name} was asked for, but {why}")
        if why is None:
            self.model.set_submodule(name, new)
            self.report._undo.append(lambda: self.model.set_submodule(name, old))
        self.fates[name] = (choice, choice.reason) if why is None else (None, why)

    def _layers(self) -> Iterator[Layer]:
        """Every module that computes something itself, or has a fate."""
        there = {name for name, _ in self.model.named_modules()}
        for name, module in self.before:
            choice, why = self.fates.get(name, (None, ""))
            if choice is None and not why and next(module.children(), None) is not None:
                continue
            now = None if choice is None else f"{choice.op}[{choice.name}]"
            why = why or _left(module, name in there)
            yield Layer(name, type(module).__name__, now, why, "" if choice is None else choice.source)


def _gated(act: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    found: Tensor = act(gate) * up
    return found


def _left(module: Any, there: bool) -> str:
    kind = type(module).__name__
    if not there:
        return "computed by the layer around it"
    if isinstance(module, nn.Linear):
        return "a matrix product, which stays torch's"
    if isinstance(module, nn.Embedding):
        return "a lookup, which stays torch's"
    if "Rotary" in kind:
        return "its cosines and sines are taken by attention as they are; there is no interface for the rotation"
    if "Router" in kind:
        return "transformers has no interface for it"
    return "there is no kernel for it here"
