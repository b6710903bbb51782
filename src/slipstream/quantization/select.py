"""Which tensors of a checkpoint are converted, told from names and shapes alone. No torch.

`slipstream quantize` and `LLM(..., quantization="int8")` ask the same question here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from slipstream.errors import ConfigError
from slipstream.ops.formats import GROUPS, MADE

Shape = tuple[int, ...]

PER_I32 = {"int8": 4, "int4": 8}  # codes in one element of a file

# The linear layers inside a decoder layer, by the names that checkpoints give them. Embeddings, head, norms, biases and
# routers are not among them; nor is anything of a vision tower, whose layers stand under another name.
_LINEAR = re.compile(
    r"(?:(?:model|language_model)\.){0,3}layers\.\d{1,9}\.(?:self_attn|mlp|block_sparse_moe)\.(?:experts\.(?:\d{1,9}\.)?)?"
    r"(?:[qkvo]_proj|qkv_proj|gate_proj|up_proj|down_proj|gate_up_proj|w[123])"
)
_STACK = re.compile(r".*\.experts\.(?:gate_up_proj|down_proj)")


def module_of(name: str) -> str:
    """The module that holds a weight: its name without what says how it is stored."""
    return name.removesuffix(".weight").removesuffix("_blocks")


@dataclass(frozen=True, slots=True)
class Selection:
    """What was asked for.

    Attributes:
        format: one of `ops.formats.MADE`.
        model_type: of config.json.
        modules: shell-style patterns of the modules to convert; () is all linear layers inside the decoder layers, for
            gpt_oss to mxfp4 the experts alone.
        skip: patterns of modules to leave as they are.
        group_size: weights that share a scale in int4; None is the largest that divides all rows.
    """

    format: str
    model_type: str
    modules: Sequence[str] = ()
    skip: Sequence[str] = ()
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.format not in MADE:
            raise ConfigError(f"to: must be one of {', '.join(MADE)}, got {self.format!r}")
        for option in ("modules", "skip"):
            patterns = getattr(self, option)
            if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) and p for p in patterns):
                raise ConfigError(f"{option}: must be a list of patterns such as 'model.layers.0.*', got {patterns!r}")
        if self.group_size is None:
            return
        if self.format != "int4":
            raise ConfigError(f"group_size: only int4 has groups to choose, {self.format} has not; leave it out")
        if self.group_size not in GROUPS:
            sizes = ", ".join(map(str, sorted(GROUPS)))
            raise ConfigError(f"group_size: must be one of {sizes}, got {self.group_size!r}")

    def takes(self, name: str, shape: Shape) -> bool:
        """Whether the tensor of this name (as Hugging Face spells it) and logical shape is converted."""
        if not eligible(name, shape):
            return False
        module = module_of(name)
        if any(fnmatchcase(module, p) for p in self.skip):
            return False
        if self.modules:
            return any(fnmatchcase(module, p) for p in self.modules)
        return ".experts." in module or not (self.model_type == "gpt_oss" and self.format == "mxfp4")

    def names(self, name: str) -> bool:
        """Whether `modules` asks for this tensor, rather than the default."""
        return any(fnmatchcase(module_of(name), p) for p in self.modules)

    def check(self, tensors: Mapping[str, Shape]) -> int:
        """Hold the patterns and the widths of rows against the tensors of a checkpoint. Returns int4's group, else 0.

        Raises:
            ConfigError: a pattern matches nothing, nothing is left to convert, or rows cannot be cut into blocks.
        """
        known = {module_of(n): n for n, shape in tensors.items() if eligible(n, shape)}
        for option, patterns in (("modules", self.modules), ("skip", self.skip)):
            for pattern in patterns:
                if any(fnmatchcase(m, pattern) for m in known) or (option == "skip" and _aside(pattern, tensors)):
                    continue
                raise ConfigError(
                    f"{option}: {pattern!r} matches none of the modules that can be converted{_near(pattern, known)}"
                )
        widths = {m: row_width(n, tensors[n]) for m, n in known.items() if self.takes(n, tensors[n])}
        if not widths:
            raise ConfigError("modules, skip: nothing is left to convert; name other modules, or skip fewer")
        fixed = {"mxfp4": 32, "int8": PER_I32["int8"], "int4": self.group_size}[self.format]
        sizes = (fixed,) if fixed else GROUPS
        for size in sizes:
            if all(width % size == 0 for width in widths.values()):
                return size if self.format == "int4" else 0
        size = sizes[-1]
        wrong = sorted(m for m, width in widths.items() if width % size)
        some = ", ".join(f"{m} ({widths[m]})" for m in wrong[:4]) + (", ..." if len(wrong) > 4 else "")
        message = (
            f"{self.format} needs rows of a multiple of {size} weights, which {len(wrong)} modules do not have: {some}"
        )
        smaller = [g for g in GROUPS if g < size and all(width % g == 0 for width in widths.values())]
        if self.format == "int4" and smaller:
            raise ConfigError(f"group_size: {message}; all of them have rows of a multiple of {smaller[0]}")
        kinds = dict.fromkeys(m.rpartition(".")[2] for m in wrong)
        skips = " ".join(f"--skip '*.{kind}'" for kind in kinds)
        raise ConfigError(f"{message}; `slipstream quantize` leaves them out with {skips}")


def eligible(name: str, shape: Shape) -> bool:
    """Whether a tensor could be converted at all: a matrix, or a stack of experts, of a linear layer."""
    module = module_of(name)
    if not _LINEAR.fullmatch(module) or 0 in shape:
        return False
    return len(shape) == 2 if name.endswith(".weight") else len(shape) == 3 and _STACK.fullmatch(module) is not None


def is_transposed(name: str) -> bool:
    """gpt-oss stores floats of its experts as (experts, in, out); what is packed, and all else, is (..., out, in)."""
    return not name.endswith((".weight", "_blocks"))


def row_width(name: str, shape: Shape) -> int:
    """How many weights a row has, which is what blocks and groups must divide."""
    return shape[1] if is_transposed(name) else shape[-1]


def _aside(pattern: str, tensors: Mapping[str, Shape]) -> bool:
    """Whether a pattern names what is never converted, so that to skip it changes nothing. A tied head has no tensor."""
    return any(fnmatchcase(m, pattern) for m in ("lm_head", *map(module_of, tensors)))


def _near(pattern: str, known: Mapping[str, str]) -> str:
    if "," in pattern:
        return "; give the option once for each pattern"
    wider = f"*{pattern}*"
    if any(fnmatchcase(m, wider) for m in known):
        return f"; {wider!r} would"
    near = difflib.get_close_matches(pattern, known, 3, 0.5) or list(known)[:3]
    return f" (never embeddings, head, norms and routers); there is {', '.join(near)}" if near else "; there are none"
