"""One path for a weight: a dry run from headers, then read, transform, and hand over to the layer.

The dry run matches the architecture's rules with the names, shapes and dtypes in the headers before memory is taken.
Every parameter is written exactly once and every tensor of the checkpoint is used, or the error lists both sides.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slipstream.checkpoint.open import Checkpoint
from slipstream.checkpoint.rules import Weight, rows
from slipstream.checkpoint.support import Rename
from slipstream.checkpoint.tensors import DENSE, TensorInfo, read_into
from slipstream.errors import CheckpointError
from slipstream.ops.formats import Weight as Matrix

Keep = Callable[[str, tuple[int, ...], bool], bool]
Progress = Callable[[int, int], None]  # bytes read, bytes in all

READERS = 2  # parameters on their way at once: also how many are in memory twice
_FLOATS = ("F32", "F16", "BF16", "F64")
_UNUSED = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$|^rope_freqs\.weight$")


@dataclass(frozen=True, slots=True)
class Load:
    """One parameter of the model: where it comes from and in which format it will be held.

    `format` is "dense" or a block format; `arrived` is the format in the checkpoint. `shared` marks a head whose
    weight is the embedding's; `twin` is a head that lies in the file all the same, and must be equal.
    """

    to: str
    sources: tuple[TensorInfo, ...]
    rule: Weight
    shape: tuple[int, ...]
    format: str
    shared: bool = False
    twin: TensorInfo | None = None

    @property
    def arrived(self) -> str:
        return "+".join(sorted({s.dtype for s in self.sources}))

    @property
    def widened(self) -> bool:
        """Blocks that will be held as floats."""
        return self.format == "dense" and any(s.is_quantized for s in self.sources)


def dry_run(model: nn.Module, weights: Iterable[Weight], checkpoint: Checkpoint, *, num_layers: int, num_experts: int,
            tied: bool, keep: Keep, rename: Rename = str) -> tuple[Load, ...]:  # fmt: skip
    """Match rules, parameters and headers.

    Args:
        model: on the meta device.
        tied: the head is the embedding.
        keep: whether blocks of a format can stay blocks in a matrix of this shape (and whether it is an embedding).
        rename: the name that the rules know a tensor by; None leaves it out.

    Raises:
        CheckpointError: names are missing or left over, or shapes or dtypes do not fit.
    """
    parameters = dict(model.named_parameters())
    tensors = {name: t for n, t in checkpoint.tensors.items() if (name := rename(n)) is not None}
    loads: dict[str, Load] = {}
    missing: dict[str, list[str]] = {}
    for rule in weights:
        if sum(map(len, missing.values())) > 10_000:
            break  # a config of another model altogether
        for layer in range(num_layers) if "{layer}" in rule.to else (None,):
            to = rule.to.replace("{layer}", str(layer))
            if to not in parameters or to in loads:
                continue
            shared = tied and to == "head.weight"
            names = ("model.embed_tokens.weight",) if shared else rule.names(layer, num_experts)
            absent = [n for n in names if n not in tensors]
            if absent:
                missing.setdefault(to, absent)  # another spelling may follow
                continue
            owner = model.get_submodule(to.rpartition(".")[0])
            sources = tuple(tensors[n] for n in names)
            twin = tensors.get("lm_head.weight") if shared else None
            loads[to] = _check(to, sources, rule, parameters[to], owner, shared, keep, twin)
    used = {s.name for load in loads.values() for s in (*load.sources, load.twin) if s}
    surplus = [n for n, t in tensors.items() if t.name not in used and not _UNUSED.search(n)]
    absent = [n for to, names in missing.items() if to not in loads for n in names]
    unwritten = sorted(parameters.keys() - loads.keys() - missing.keys())
    if absent or surplus or unwritten:
        raise CheckpointError(
            f"{checkpoint.path}: the tensors are not those of a {checkpoint.config.get('model_type')} model: "
            f"missing {_some(absent)}; left over {_some(surplus)}; not written {_some(unwritten)}"
        )
    return tuple(loads.values())


def _check(to: str, sources: tuple[TensorInfo, ...], rule: Weight, parameter: Tensor, owner: nn.Module, shared: bool,
           keep: Keep, twin: TensorInfo | None) -> Load:  # fmt: skip
    for s in sources:
        if not s.is_quantized and s.dtype not in _FLOATS:
            raise CheckpointError(f"{s.file}: {s.name} is {s.dtype}, where a {to} must be one of {', '.join(_FLOATS)}")
    try:
        shape = rule.shape([s.shape for s in sources])
    except (RuntimeError, ValueError, IndexError) as e:
        shapes = ", ".join(f"{s.name} {list(s.shape)}" for s in sources[:4])
        raise CheckpointError(f"{sources[0].file}: {shapes} cannot make {to} {list(parameter.shape)}") from e
    if shape != tuple(parameter.shape):
        names = ", ".join(f"{s.name} {list(s.shape)}" for s in sources[:4])
        raise CheckpointError(
            f"{sources[0].file}: {names} makes {to} {list(shape)}, but config.json asks for {list(parameter.shape)}"
        )
    kinds = {s.dtype for s in sources}
    whole = len(kinds) == 1 and sources[0].is_quantized and rule.transform is rows and hasattr(owner, "accept")
    stays = whole and keep(sources[0].dtype, shape, to == "embed.weight")
    return Load(to, sources, rule, shape, sources[0].dtype if stays else "dense", shared, twin)


def load(model: nn.Module, loads: Sequence[Load], checkpoint: Checkpoint, device: torch.device,
         progress: Progress | None = None) -> None:  # fmt: skip
    """Read every parameter and hand it over.

    Raises:
        CheckpointError: a file changed or ended while it was read.
    """
    total = sum(s.nbytes for item in loads if not item.shared for s in item.sources)
    done = 0
    with ThreadPoolExecutor(READERS) as readers:  # one reads while another lays out
        ahead: deque[tuple[Load, Future[None]]] = deque()
        for item in (*loads, None):
            while ahead and (item is None or item.shared or len(ahead) > READERS):
                landed, future = ahead.popleft()
                future.result()
                done += sum(s.nbytes for s in landed.sources if not landed.shared)
                if progress is not None:
                    progress(done, total)
            if item is not None:
                ahead.append((item, readers.submit(_place, model, item, checkpoint, device)))
    left = [name for name, p in model.named_parameters() if p.is_meta]
    if left:
        raise AssertionError(f"parameters were never written: {left}")


def _place(model: nn.Module, item: Load, checkpoint: Checkpoint, device: torch.device) -> None:
    """One parameter from the file into its layer."""
    path, _, leaf = item.to.rpartition(".")
    owner: Any = model.get_submodule(path)
    data: Tensor
    embed: Any = model.get_submodule("embed")
    if item.shared:
        data = embed.weight
        if item.twin is not None and not torch.equal(data, _dense(checkpoint, item.twin, data.dtype).to(device)):
            raise CheckpointError(
                f"{checkpoint.path}: config.json ties the head to the embedding, but {item.twin.name} differs from "
                f"{item.sources[0].name}; set tie_word_embeddings to false if the head is meant"
            )
    elif item.format == "dense":
        parameter: Tensor = getattr(owner, leaf)
        data = _read(checkpoint, item, parameter.dtype).to(device=device, dtype=parameter.dtype)
    else:
        data = rows([checkpoint.read_blocks(s.name) for s in item.sources]).to(device)
    if hasattr(owner, "accept") and leaf == "weight":
        kept = embed.format if item.shared else item.format
        owner.accept(Matrix(kept, data, (item.shape[0], item.shape[1])), shared=item.shared)
    else:
        setattr(owner, leaf, nn.Parameter(data.contiguous(), requires_grad=False))


def _read(checkpoint: Checkpoint, item: Load, dtype: torch.dtype) -> Tensor:
    plain = all(s.dtype in DENSE and s.row_permute is None and not s.add for s in item.sources)
    if not plain or item.rule.transform is not rows or any(DENSE[s.dtype][1] != str(dtype)[6:] for s in item.sources):
        return item.rule.transform([_dense(checkpoint, s, dtype) for s in item.sources])
    data = torch.empty(item.shape, dtype=dtype)  # rows as they stand in the file: read them to where they belong
    parts = data.view(-1).view(torch.uint8).split([s.nbytes for s in item.sources])
    for source, part in zip(item.sources, parts, strict=True):
        read_into(source, part)
    return data


def _dense(checkpoint: Checkpoint, source: TensorInfo, dtype: torch.dtype) -> Tensor:
    """As `dtype`; numbers of a higher precision are rounded once, here."""
    return checkpoint.dequantize(source.name, dtype) if source.is_quantized else checkpoint.read(source.name).to(dtype)


def _some(names: Sequence[str]) -> str:
    if not names:
        return "none"
    return f"{len(names)} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
