"""What was measured to be fastest on a card for weights of one shape: a small table in this package, and the user's own in the
cache folder, which `slipstream tune` writes and which comes first. For other cards and shapes kernels have rules of their own.

    {"NVIDIA H100 80GB HBM3": {
        "moe": {"mxfp4 32 x 5760 x 2880": {"few": {tile}, "steps": [[5, {tile}], [48, {"group": 64}], [null, {"group": 128}]]}},
        "linear": {"bfloat16 5120 x 2880": 32}}}

moe: the tile for so few pairs of a token and an expert that nothing is sorted, null where the kernels' own rule is best, which may
take each pair by itself; then for up to so many pairs an expert.
linear: tokens up to which our own kernel is faster than cuBLAS.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from slipstream.config.paths import cache_root
from slipstream.errors import ConfigError
from slipstream.ops.choose import Choice

SHIPPED = Path(__file__).with_name("tuned.json")
MOST_FEW = 64  # tokens that our own linear kernel may be asked for
ALLOWED = {
    "pairs": (8, 16, 32, 64, 128), "slabs": (2, 4, 8, 16), "blocks": (2, 4, 8, 16), "warps": (1, 2, 4, 8), "stages": range(1, 7),
    "group": (64, 128),
}  # fmt: skip


class Tile(NamedTuple):
    """What a program of the experts' kernel works on: pairs, slabs of 16 rows of weights, blocks of 32 inputs a step."""

    pairs: int
    slabs: int
    blocks: int
    warps: int
    stages: int


class Group(NamedTuple):
    """The product of sorted pairs (ops/moe/grouped.py), in tiles of so many."""

    group: int


@dataclass(frozen=True, slots=True)
class Experts:
    """For mixtures of experts of one shape."""

    few: Tile | None  # None: by the rule of the kernels
    steps: tuple[tuple[float, Tile | Group], ...]  # up to so many pairs an expert; the last one has no bound

    def choose(self, each: float) -> Tile | Group:
        return next(choice for most, choice in self.steps if each <= most)


@dataclass(frozen=True, slots=True)
class Tuned:
    """What is known of one card."""

    moe: Mapping[str, Experts] = field(default_factory=dict)
    linear: Mapping[str, int] = field(default_factory=dict)

    def linear_kernel(self, choice: Choice, dtype: str, shape: tuple[int, ...]) -> Any:
        """The kernel that was chosen, with what is known of its weight, (out, in)."""
        if choice.name == "triton_few":
            choice.fn.few = self.linear.get(shape_name(dtype, shape), choice.fn.few)
        return choice.fn

    def experts_kernel(self, choice: Choice, formats: Collection[str], shape: tuple[int, ...]) -> Any:
        """The same for experts, by the stack that comes before the activation, which is in one format or in several."""
        known = [self.moe.get(shape_name(format, shape)) for format in formats]
        if not choice.fn.tunable or len(known) != 1 or known[0] is None:
            return choice.fn
        return replace(choice.fn, experts=partial(choice.fn.experts, tuned=known[0]))

    def to_dict(self) -> dict[str, Any]:
        return {
            "moe": {
                shape: {
                    "few": None if e.few is None else e.few._asdict(),
                    "steps": [[None if most == float("inf") else most, choice._asdict()] for most, choice in e.steps],
                }
                for shape, e in self.moe.items()
            },
            "linear": dict(self.linear),
        }


def possible(tile: Tile) -> bool:
    """Whether the kernel takes it; what a card cannot hold is another matter."""
    return all(value in ALLOWED[name] for name, value in tile._asdict().items()) and tile.warps <= tile.slabs


def shape_name(format: str, shape: tuple[int, ...]) -> str:
    return f"{format} {' x '.join(map(str, shape))}"


def own_table() -> Path:
    return cache_root() / "tuned.json"


def tuned(device: str, card: str, why: dict[str, str]) -> Tuned:
    """What is known of this card; where from goes into `why`. A table of the user's that cannot be read is left aside."""
    if not device.startswith("cuda"):
        return Tuned()
    found = read(SHIPPED).get(card, Tuned())
    known = ["measurements that slipstream comes with"] if found != Tuned() else []
    path = own_table()
    try:
        own = read(path).get(card, Tuned()) if path.is_file() else Tuned()
    except ConfigError as e:
        own, known = Tuned(), [*known, str(e)]
    if own != Tuned():
        known = [*known, f"what `slipstream tune` measured here ({path})"]
    why["tiles"] = " and ".join(known) or "this card was not measured, so they follow an H100's; see `slipstream tune`"
    return Tuned({**found.moe, **own.moe}, {**found.linear, **own.linear})


def write(card: str, new: Tuned) -> Path:
    """Put this into the user's table beside what is there for other cards and shapes."""
    path = own_table()
    try:
        cards = read(path) if path.is_file() else {}
    except ConfigError:
        cards = {}  # it is of no use to anybody
    old = cards.get(card, Tuned())
    cards[card] = Tuned({**old.moe, **new.moe}, {**old.linear, **new.linear})
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({name: known.to_dict() for name, known in cards.items()}, indent=1) + "\n")
    part.replace(path)
    return path


def read(path: Path) -> dict[str, Tuned]:
    """A table, by card.

    Raises:
        ConfigError: it is not one; the message says where.
    """
    try:
        cards = _object(json.loads(path.read_text()), "the table")
        return {str(card): _card(_object(known, card), card) for card, known in cards.items()}
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(
            f"{path} is no table of measurements ({e}); delete it, or run `slipstream tune` again"
        ) from None


def _card(known: dict[str, Any], card: str) -> Tuned:
    moe = {
        shape: _experts(_object(entry, f"{card}: {shape}"), shape)
        for shape, entry in _object(known.get("moe", {}), "moe").items()
    }
    linear = {
        shape: _whole(most, range(MOST_FEW + 1), shape)
        for shape, most in _object(known.get("linear", {}), "linear").items()
    }
    return Tuned(moe, linear)


def _experts(entry: dict[str, Any], where: str) -> Experts:
    few: Tile | Group | None = None if entry.get("few", 0) is None else _choice(entry.get("few"), where)
    steps: Any = entry.get("steps")
    whole = isinstance(steps, list) and all(isinstance(s, list) and len(s) == 2 for s in steps)
    if isinstance(few, Group) or not whole:
        raise ValueError(f"{where}: needs a tile `few`, and `steps` of a bound and a choice each")
    *bounds, last = [s[0] for s in steps] or [0]
    if last is not None or any(type(b) not in (int, float) for b in bounds) or bounds != sorted(set(bounds)):
        raise ValueError(f"{where}: bounds must rise, and the last one be null")
    return Experts(few, tuple((float("inf") if b is None else float(b), _choice(c, where)) for b, c in steps))


def _choice(value: Any, where: str) -> Tile | Group:
    given = _object(value, where)
    for kind in (Tile, Group):
        if set(given) == set(kind._fields):
            made = kind(*(_whole(given[name], ALLOWED[name], f"{where}: {name}") for name in kind._fields))
            if isinstance(made, Tile) and not possible(made):
                raise ValueError(f"{where}: {made.warps} warps need as many slabs, not {made.slabs}")
            return made
    raise ValueError(f"{where}: {sorted(given)} are neither {Tile._fields} nor {Group._fields}")


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: an object is missing")
    return value


def _whole(value: Any, allowed: Sequence[int], where: str) -> int:
    if type(value) is not int or value not in allowed:
        raise ValueError(f"{where}: {value!r} is not possible")
    return value
