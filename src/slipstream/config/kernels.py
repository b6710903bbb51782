"""What the user's options together say about kernels: which op is to run what, and whether kernels from the Hub may run at all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slipstream.errors import ConfigError

OPS = ("norm", "activation", "attention", "moe", "rotary")  # those that a repository of kernels can stand in for
WORDS = ("auto", "builtin", "reference")


@dataclass(frozen=True, slots=True)
class KernelsAsked:
    """One reading of `kernels`, `use_kernels`, `attn_implementation` and `moe_implementation`.

    Attributes:
        word: auto, builtin or reference: of the ops that are not named.
        named: op -> an implementation that `explain` lists, or a repository (org/name, org/name:Layer, or a folder).
    """

    word: str = "builtin"
    named: Mapping[str, str] = field(default_factory=dict)

    @property
    def hub(self) -> dict[str, str]:
        """The repositories that are named."""
        return {op: name for op, name in self.named.items() if is_repository(name)}

    def force(self, op: str) -> str | None:
        """The implementation that this op must have."""
        return self.named.get(op) or ("reference" if self.word == "reference" else None)


def is_repository(name: str) -> bool:
    """org/name or a path, as no implementation of our own has a slash in its name."""
    return "/" in name


def read_kernels(
    kernels: Any, use_kernels: Any, attn: Any, moe: Any, lock: str | None, policy: str | None
) -> KernelsAsked:
    """Check them one by one and against each other.

    Raises:
        ConfigError: one is not possible, two contradict each other, or one would be without effect.
    """
    if use_kernels is not None and not isinstance(use_kernels, bool):
        raise ConfigError(f"use_kernels: must be true or false, got {use_kernels!r}")
    word, named = _spelled(kernels)
    if use_kernels and kernels in ("builtin", "reference"):
        raise ConfigError(f"use_kernels: true contradicts kernels={kernels!r}; leave one of them out")
    if use_kernels is False and (word == "auto" or any(map(is_repository, named.values()))):
        raise ConfigError(f"use_kernels: false contradicts kernels={kernels!r}; leave one of them out")
    if word is None:
        word = "auto" if use_kernels else "builtin"
    for option, op, name in (("attn_implementation", "attention", attn), ("moe_implementation", "moe", moe)):
        if name is None:
            continue
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{option}: must be a name that `slipstream explain` lists, or org/name, got {name!r}")
        if named.get(op, name) != name or (word == "reference" and name != "reference"):
            other = named.get(op, "reference")
            raise ConfigError(f"{option}: {name!r} contradicts kernels, which has {other!r} for {op}; say it once")
        if use_kernels is False and is_repository(name):
            raise ConfigError(f"{option}: {name!r} is a repository of kernels, which use_kernels=False forbids")
        named[op] = name
    if word != "auto" and not any(map(is_repository, named.values())):
        for option, value in (("kernels_lock", lock), ("kernels_policy", policy)):
            if value is not None:
                raise ConfigError(
                    f"{option}: has no effect where no kernels from a repository may run; add kernels='auto'"
                )
    return KernelsAsked(word, named)


def _spelled(kernels: Any) -> tuple[str | None, dict[str, str]]:
    if kernels is None or (isinstance(kernels, str) and kernels in WORDS):
        return kernels, {}
    if not isinstance(kernels, Mapping) or not kernels:
        raise ConfigError(
            f"kernels: must be {', '.join(WORDS)}, or name them by op, such as {{'norm': 'org/name:Layer'}}, got {kernels!r}"
        )
    for op, name in kernels.items():
        if op not in OPS:
            raise ConfigError(f"kernels: there is no op {op!r} that can be named here; there are {', '.join(OPS)}")
        if not isinstance(name, str) or not re.fullmatch(r"[^\s,=]+", name):
            raise ConfigError(f"kernels: {op} must be org/name, org/name:Layer or an implementation, got {name!r}")
    return None, dict(kernels)
