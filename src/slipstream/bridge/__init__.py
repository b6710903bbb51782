"""Our kernels, and those of repositories under the same policy, in a model of `transformers`.

from slipstream.bridge import kernelize

report = kernelize(model)
print(report)
report.undo()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slipstream.bridge.report import Layer, Report
    from slipstream.trust import Policy

__all__ = ["Layer", "Report", "kernelize"]


def kernelize(model: Any, kernels: Any = "auto", *, policy: Policy | None = None) -> Report:
    """Put kernels into a loaded model, for inference: norms, gated MLPs, attention and experts.

    Attention and experts go through the interfaces that transformers has for it; norms and MLPs are exchanged for layers that hold
    the same parameters under the same names. Each new layer is first held against the one whose place it takes, on random numbers,
    and a layer that gives something else is left as it is; with auto also one that would take longer (attention is not timed).
    Nothing is computed in another precision. Weights that are given anew afterwards, and adapters around a projection, are followed;
    a layer with hooks is left, and asking for gradients is an error.

    Args:
        model: of transformers 5, in eval mode, whole on one device.
        kernels: as for `LLM`: auto also takes what is pinned, right and not slower; builtin, reference, or names by op.
        policy: what may run of repositories; None finds kernels.lock and kernels-policy.toml as `LLM` does.

    Returns:
        what became of every layer; `undo()` takes it all back.

    Raises:
        ConfigError: it is no such model, or this has been done to it already.
        KernelError, TrustError: a kernel that was named cannot run, or is not to be trusted.
    """
    from slipstream.bridge.kernelize import Bridge

    return Bridge(model, kernels, policy).run()


def __getattr__(name: str) -> Any:
    if name in ("Layer", "Report"):
        from slipstream.bridge import report

        return getattr(report, name)
    raise AttributeError(name)
