"""One path for a weight: a dry run from headers, then read, transform, and hand over to the layer.

The dry run matches the architecture's rules with the names, shapes and dtypes in the headers before memory is taken.
Every parameter is written exactly once and every tensor of the checkpoint is used, or the error lists both sides.
What arrives packed stays packed, unless the plan holds it in another format.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slipstream.checkpoint.draw import draw
from slipstream.checkpoint.manifest import shards_of, verify
from slipstream.checkpoint.open import Checkpoint
from slipstream.checkpoint.rules import ROWWISE, Weight, rows
from slipstream.checkpoint.slices import narrow, take
from slipstream.checkpoint.support import Rename
from slipstream.checkpoint.tensors import DENSE, TensorInfo, read_into, read_weight
from slipstream.errors import CheckpointError
from slipstream.ops import formats
from slipstream.ops.formats import Weight as Matrix
from slipstream.parallel.shares import WHOLE, Cut, Ranks

if TYPE_CHECKING:
    from slipstream.checkpoint.transfer import Card

# (parameter, source, shape of the parameter) -> the format to hold the source in; asked for matrices only
Hold = Callable[[str, TensorInfo, tuple[int, ...]], str]
Progress = Callable[[int, int], None]  # bytes read, bytes in all

READERS = 2  # parameters on their way at once: also how many are in memory twice
_FLOATS = ("F32", "F16", "BF16", "F64")
_UNUSED = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$|^rope_freqs\.weight$")


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a parameter: rows that are laid out alike, and what of them is here."""

    format: str
    sources: tuple[TensorInfo, ...]
    shape: tuple[int, ...]
    cut: Cut

    @property
    def local(self) -> tuple[int, ...]:
        """The shape of what is here."""
        return self.cut.shape(self.shape)


@dataclass(frozen=True, slots=True)
class Load:
    """One parameter of the model: where it comes from and in which format it will be held.

    `formats` has one name of `ops.formats` a source. `group` is how many weights share a scale where int4 is made.
    `shared` marks a head whose weight is the embedding's; `twin` is a head that lies in the file all the same, and must
    be equal. `shape` is that of the whole parameter, of which `cut` says what this rank has.
    """

    to: str
    sources: tuple[TensorInfo, ...]
    rule: Weight
    shape: tuple[int, ...]
    formats: tuple[str, ...]
    group: int = 0
    shared: bool = False
    twin: TensorInfo | None = None
    cut: Cut = WHOLE

    @property
    def arrived(self) -> str:
        return "+".join(dict.fromkeys(s.dtype for s in self.sources))

    @property
    def held(self) -> str:
        return "+".join(dict.fromkeys(self.formats))

    @property
    def widened(self) -> bool:
        """Packed weights that will be held as floats."""
        return any(f == "dense" and s.is_quantized for f, s in zip(self.formats, self.sources, strict=True))

    @property
    def nbytes(self) -> int:
        """What is read of the files."""
        return 0 if self.shared else sum(s.nbytes for part in self.reads() for s in part.sources)

    def reads(self) -> Iterator[Part]:
        """`parts` as they are read: of the sources only what is here, where that is runs of bytes. Then nothing is left to cut."""
        for part in self.parts():
            if 0 in part.local:
                continue
            sources, cut = None, part.cut
            # A row has one scale, which must be that of the whole row.
            rescaled = part.format == "int8" and cut.dim == 1
            if cut.ranges is not None and not rescaled:
                sources = narrow(self.rule.transform, part.sources, len(part.shape) - cut.dim, cut.ranges)
            yield part if sources is None else Part(part.format, sources, part.local, Cut(zero=cut.zero))

    def parts(self) -> Iterator[Part]:
        """Neighbours that are laid out alike. One part where all are."""
        layouts = _layouts(self.formats, self.sources)
        if len(set(layouts)) == 1:
            yield Part(self.formats[0], self.sources, self.shape, self.cut)
            return
        first = 0
        for (format, _), pairs in itertools.groupby(zip(layouts, self.sources, strict=True), lambda pair: pair[0]):
            sources = tuple(source for _, source in pairs)
            rows = range(first, first + sum(s.shape[0] for s in sources))
            first = rows.stop
            yield Part(format, sources, (len(rows), *self.shape[1:]), self.cut.within(rows))


def _layouts(held: Sequence[str], sources: Sequence[TensorInfo]) -> list[tuple[str, int]]:
    """What sources must agree in to be one matrix: the format, and how many weights share a scale in what stays as it
    arrived. What is still to be encoded (-1) stands apart, as nothing packed is to be encoded a second time."""
    return [
        (format, 0 if format == "dense" else source.group if format == source.format else -1)
        for format, source in zip(held, sources, strict=True)
    ]


def dry_run(model: nn.Module, weights: Iterable[Weight], checkpoint: Checkpoint, *, num_layers: int, num_experts: int,
            tied: bool, hold: Hold, rename: Rename = str) -> tuple[Load, ...]:  # fmt: skip
    """Match rules, parameters and headers.

    Args:
        model: on the meta device.
        tied: the head is the embedding.
        hold: which format a matrix, or a part of one, is to be held in.
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
            loads[to] = _check(to, sources, rule, parameters[to], owner, shared, hold, twin)
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
           hold: Hold, twin: TensorInfo | None) -> Load:  # fmt: skip
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
    held = tuple(
        hold(to, s, shape) if hasattr(owner, "accept") and to.endswith(".weight") else "dense" for s in sources
    )
    if rule.transform not in ROWWISE and any(s.is_quantized for s in sources):
        raise CheckpointError(f"{sources[0].file}: {sources[0].name} is {sources[0].dtype}, where numbers are expected")
    if len(set(_layouts(held, sources))) > 1 and rule.transform is not rows:
        raise CheckpointError(
            f"{sources[0].file}: the experts of {to} arrive in several formats or groups "
            f"({', '.join(sorted({s.dtype for s in sources}))}), and a stack holds one; quantization='dequantize' makes floats "
            "of them all"
        )
    return Load(to, sources, rule, shape, held, shared=shared, twin=twin)


def load(model: nn.Module, loads: Sequence[Load], checkpoint: Checkpoint, device: torch.device,
         progress: Progress | None = None) -> None:  # fmt: skip
    """Read every parameter and hand it over. Where the folder has a manifest, its hashes are checked beside that.

    Raises:
        CheckpointError: a file is damaged, or changed or ended while it was read.
    """
    total = sum(item.nbytes for item in loads)
    way = _draw if checkpoint.kind == "random" else _transfer if device.type == "cuda" else _read
    done = 0
    with contextlib.closing(way(model, loads, checkpoint, device)) as steps:
        for nbytes in steps:
            done += nbytes
            if progress is not None and nbytes:
                progress(done, total)
    left = [name for name, p in model.named_parameters() if p.is_meta]
    if left:
        raise AssertionError(f"parameters were never written: {left}")


Steps = Generator[int, None, None]  # bytes done by each


def _read(model: nn.Module, loads: Sequence[Load], checkpoint: Checkpoint, device: torch.device) -> Steps:
    """One by one from the files, straight to where they belong; one is read while another is laid out."""
    with ThreadPoolExecutor(READERS + 1) as readers:
        checked = readers.submit(verify, checkpoint.path, _ranks(model)) if checkpoint.kind == "safetensors" else None
        ahead: deque[tuple[Load, Future[None]]] = deque()
        for item in (*loads, None):
            while ahead and (item is None or item.shared or len(ahead) > READERS):
                landed, future = ahead.popleft()
                future.result()
                yield landed.nbytes
            if item is not None:
                ahead.append((item, readers.submit(_place, model, item, checkpoint, device, read_weight)))
        if checked is not None:
            checked.result()


def _transfer(model: nn.Module, loads: Sequence[Load], checkpoint: Checkpoint, device: torch.device) -> Steps:
    """In the order of the files, and laid out on the card as soon as all of a parameter is there."""
    from slipstream.checkpoint.transfer import Card

    yield from transfer(model, loads, checkpoint, Card(device))


def transfer(model: nn.Module, loads: Sequence[Load], checkpoint: Checkpoint, card: Card) -> Steps:
    """The same with a card that a test may have made."""
    from slipstream.checkpoint.transfer import Transfer

    own = [item for item in loads if not item.shared]
    wanted = [[t for part in item.reads() for s in part.sources for t in s.stored] for item in own]
    shards = shards_of(checkpoint.path, _ranks(model)) if checkpoint.kind == "safetensors" else {}
    arrivals = Transfer(wanted, card, shards)
    try:
        with card.aside(), contextlib.closing(arrivals.arrive()) as arriving:
            for nbytes, complete in arriving:
                for i in complete:
                    there = arrivals.take(i)
                    _place(model, own[i], checkpoint, card.device, partial(read_weight, raw=there.pop))
                yield nbytes
            for item in loads:
                if item.shared:
                    _place(model, item, checkpoint, card.device, read_weight)
    finally:
        card.finish()


def _draw(model: nn.Module, loads: Sequence[Load], checkpoint: Checkpoint, device: torch.device) -> Steps:
    """Random numbers, on the device."""
    for item in loads:
        _place(model, item, checkpoint, device, partial(draw, seed=checkpoint.seed, device=device))
        yield item.nbytes


def _ranks(model: nn.Module) -> Ranks:
    found: Any = getattr(model, "ranks", None)
    return Ranks() if found is None else found.ranks


Read = Callable[[TensorInfo], Matrix]


def _place(model: nn.Module, item: Load, checkpoint: Checkpoint, device: torch.device, read: Read) -> None:
    """One parameter into its layer."""
    path, _, leaf = item.to.rpartition(".")
    owner: Any = model.get_submodule(path)
    embed: Any = model.get_submodule("embed")
    if item.shared:
        if item.twin is not None and not _same(embed.held, _twin(item, item.twin)):
            raise CheckpointError(
                f"{checkpoint.path}: config.json ties the head to the embedding, but {item.twin.name} differs from "
                f"{item.sources[0].name}; set tie_word_embeddings to false if the head is meant"
            )
        owner.accept(embed.held, shared=True)
        return
    parameter: Tensor = getattr(owner, leaf)
    parts = list(item.parts() if checkpoint.kind == "random" else item.reads())  # what is drawn, is drawn whole
    if hasattr(owner, "accept") and leaf == "weight":
        made = [_weight(read, item, part, parameter.dtype) for part in parts if 0 not in part.local]
        owner.accept(*(w.map(lambda t: t.to(device)) for w in made))
        return
    (part,) = parts  # numbers
    data = _weight(read, item, part, parameter.dtype).data
    if item.cut.zero:
        data = torch.zeros_like(data)
    setattr(owner, leaf, nn.Parameter(data.to(device).contiguous(), requires_grad=False))


def _twin(item: Load, twin: TensorInfo) -> Matrix:
    """What is here of a head that is the embedding too."""
    ranges = item.cut.ranges
    return read_weight(twin if ranges is None else take(twin, 0, ranges))


def _weight(read: Read, item: Load, part: Part, dtype: torch.dtype) -> Matrix:
    """What is here of a part of a parameter, in the format in which it is held."""
    whole = _whole(read, item, part.format, part.sources, part.shape, dtype)
    if part.cut.ranges is None:
        return whole
    try:
        return formats.cut(whole, part.cut.dim, part.cut.ranges)
    except ValueError as e:
        raise CheckpointError(f"{item.sources[0].file}: {item.to} cannot be shared by so many ranks: {e}") from e


def _whole(read: Read, item: Load, format: str, sources: Sequence[TensorInfo], shape: tuple[int, ...],
           dtype: torch.dtype) -> Matrix:  # fmt: skip
    if format == "dense":
        return Matrix("dense", _numbers(read, item, sources, shape, dtype), shape)
    if item.rule.transform in ROWWISE:
        return formats.joined(item.rule.transform, [_held(read(s), format, item.group) for s in sources], shape)
    exact = dtype if all(DENSE.get(s.dtype, ("", ""))[1] == str(dtype)[6:] for s in sources) else torch.float32
    return formats.encode(_numbers(read, item, sources, shape, exact).contiguous(), format, item.group)


def _held(weight: Matrix, format: str, group: int) -> Matrix:
    """One source in a packed format. Rows are independent, so a matrix can be encoded before it is joined with others."""
    if weight.format == format:
        return weight
    exact = weight.data.dtype if weight.format == "dense" else torch.float32
    return formats.encode(formats.decode(weight, exact), format, group)


def _numbers(read: Read, item: Load, sources: Sequence[TensorInfo], shape: tuple[int, ...],
             dtype: torch.dtype) -> Tensor:  # fmt: skip
    """As `dtype`; numbers of a higher precision are rounded once, here."""
    plain = all(s.dtype in DENSE and not s.parts and s.row_permute is None and not s.add for s in sources)
    plain = plain and read is read_weight and item.rule.transform is rows
    if plain and all(DENSE[s.dtype][1] == str(dtype)[6:] for s in sources):
        data = torch.empty(shape, dtype=dtype)  # rows as they stand in the file: read them to where they belong
        parts = data.view(-1).view(torch.uint8).split([s.nbytes for s in sources])
        for source, part in zip(sources, parts, strict=True):
            read_into(source, part)
        return data
    made = item.rule.transform([formats.decode(read(s), dtype) for s in sources])
    return made.to(dtype)


def _same(held: Matrix, twin: Matrix) -> bool:
    """Whether two weights stand for the same numbers."""
    if held.format == twin.format != "dense" and held.scales is None:
        return torch.equal(held.data.cpu(), twin.data)
    dtype = held.data.dtype if held.format == "dense" else torch.float32
    return torch.equal(formats.decode(held, dtype).cpu(), formats.decode(twin, dtype))


def _some(names: Sequence[str]) -> str:
    if not names:
        return "none"
    return f"{len(names)} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
