"""Layers that take the place of those of transformers: the same parameters under the same names, computed by an op of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slipstream.errors import ConfigError
from slipstream.ops.formats import Weight
from slipstream.ops.moe import ExpertsKernel

KINDS = ("silu", "gelu", "gelu_tanh", "swiglu_clamped")
Activation = Callable[..., Tensor]


class _NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, *inputs: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise ConfigError(
            "kernelize is for inference, and its kernels have no derivatives; use report.undo() for gradients"
        )


def ends_here(out: Tensor, *inputs: Tensor) -> Tensor:
    """`out`, through which asking for gradients is an error; else those of what is before it would be missing in silence."""
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in inputs):
        return out
    found: Tensor = _NoDerivative.apply(out.detach(), *inputs)
    return found


class _Inference(nn.Module):
    """A layer whose kernels have no derivatives."""

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise ConfigError(
                "kernelize is for inference, and its layers cannot be trained; take them out with report.undo()"
            )
        return super().train(mode)


class Norm(_Inference):
    """RMSNorm."""

    def __init__(self, add_norm: Any, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.add_norm, self.variance_epsilon = add_norm, eps
        self.weight = weight
        self.training = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        found = self.add_norm(hidden_states, None, self.weight, self.variance_epsilon)[1]
        return ends_here(found, hidden_states, self.weight)


class MLP(_Inference):
    """down(act(gate x) * (up x)), gate and up in one product. `gate_proj` and `up_proj` become views of one matrix."""

    def __init__(self, activation: Activation, kind: str, old: Any) -> None:
        super().__init__()
        self.activation, self.kind = activation, kind
        self.gate_proj, self.up_proj, self.down_proj = old.gate_proj, old.up_proj, old.down_proj
        self._joined: dict[str, tuple[Tensor, tuple[int, int]]] = {}
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj, self.up_proj
        if type(gate) is nn.Linear is type(up) and not (has_hooks(gate) or has_hooks(up)):
            both = F.linear(
                x, self._both("weight", gate, up), None if gate.bias is None else self._both("bias", gate, up)
            )
        else:  # such as an adapter that was put there since
            both = torch.cat((gate(x), up(x)), -1)
        inner = self.activation(both, self.kind)
        if torch.is_grad_enabled():
            inner = ends_here(inner, x, *gate.parameters(), *up.parameters())
        found: Tensor = self.down_proj(inner)
        return found

    def _both(self, name: str, gate: nn.Linear, up: nn.Linear) -> Tensor:
        """Of gate and up, one after the other: joined again where they have been given other numbers since."""
        first, second = gate._parameters[name], up._parameters[name]
        assert first is not None and second is not None
        both, places = self._joined.get(name, (first, (0, 0)))
        if (first.data_ptr(), second.data_ptr()) != places:
            with torch.inference_mode(False):
                both = torch.cat((first.data, second.data))
            first.data, second.data = both.split((len(first), len(second)))
            self._joined[name] = both, (first.data_ptr(), second.data_ptr())
        return both


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


class Stack:
    """The experts' matrices of a module of transformers, as an op of ours has them: callable by number, gate before up.

    Args:
        names: of the weight and of the bias.
        gated: it is gate and up.
    """

    def __init__(self, module: Any, names: tuple[str, str], gated: bool) -> None:
        self.module, self.names, self.gated = module, names, gated
        self.turned, self.alternates = module.is_transposed, gated and not module.is_concatenated
        number, rows, width = self.weight.shape
        self.shape = (number, width, rows) if self.turned else (number, rows, width)
        self.stack: tuple[Any, ...] = ()
        self.prepared_of: tuple[int, int] | None = None

    def state(self) -> tuple[int, int]:
        """Another one when the numbers have changed."""
        weight = self.weight
        return weight.data_ptr(), 0 if weight.is_inference() else weight._version

    @property
    def weight(self) -> Tensor:
        found: Tensor = getattr(self.module, self.names[0])
        return found

    @property
    def bias(self) -> Tensor | None:
        found: Tensor | None = getattr(self.module, self.names[1]) if self.module.has_bias else None
        return found if found is None or not self.alternates else torch.cat((found[..., ::2], found[..., 1::2]), -1)

    def rows(self) -> Tensor:
        """A copy, (experts, out, in), gate rows first."""
        found = self.weight.data.transpose(1, 2) if self.turned else self.weight.data
        found = torch.cat((found[:, ::2], found[:, 1::2]), 1) if self.alternates else found
        return found.clone(memory_format=torch.contiguous_format)

    def __call__(self, x: Tensor, expert: int) -> Tensor:
        weight = self.weight[expert]
        out = F.linear(x, weight.T if self.turned else weight)
        if self.module.has_bias:
            out = out + getattr(self.module, self.names[1])[expert]
        return torch.cat((out[..., ::2], out[..., 1::2]), -1) if self.alternates else out


class Experts:
    """What a module of experts calls through transformers' ExpertsInterface."""

    def __init__(self, kernel: ExpertsKernel, module: Any, activation: Activation, kind: str) -> None:
        self.kernel, self.activation, self.kind = kernel, activation, kind
        self.number, self.limit = module.num_experts, float(getattr(module, "limit", 7.0))
        self.gate_up = Stack(module, ("gate_up_proj", "gate_up_proj_bias"), True)
        self.down = Stack(module, ("down_proj", "down_proj_bias"), False)
        self._prepare()

    def _prepare(self) -> None:
        """Have the kernel's own copies of the weights, of the numbers that these have now."""
        if self.kernel.prepare is None:
            return
        for stack in (self.gate_up, self.down):
            if stack.prepared_of != (found := stack.state()):
                weight = Weight("dense", stack.rows(), stack.shape)
                stack.stack = self.kernel.prepare(weight, stack.weight.dtype, gated=stack.gated)
                stack.prepared_of = found

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self._prepare()
        ids = top_k_index.masked_fill(
            top_k_index >= self.number, -1
        )  # transformers' word for an expert of another rank
        found: Tensor = self.kernel.experts(
            hidden_states,
            ids,
            top_k_weights,
            self.gate_up,
            self.down,
            self.activation,
            kind=self.kind,
            limit=self.limit,
        )
        return ends_here(found, hidden_states, top_k_weights, self.gate_up.weight)


def kind_of(gate: Callable[[Tensor], Tensor], *, alternates: bool = False, device: torch.device) -> str | None:
    """Which of our gated activations this is, found by its numbers. It takes gate and up beside each other, or in turn."""
    from slipstream.ops.activation.reference import activation

    halves = torch.randn(5, 2, 32, generator=torch.Generator().manual_seed(0)).to(device) * 5
    given = halves.transpose(1, 2).flatten(1) if alternates else halves.flatten(1)
    with torch.inference_mode():
        got = gate(given)
        same = [k for k in KINDS if torch.allclose(got, activation(halves.flatten(1), k, 7.0), atol=1e-5, rtol=1e-5)]
    return same[0] if same else None
