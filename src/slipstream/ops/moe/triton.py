"""A mixture of experts on a GPU in three to five kernels: the schedule, gate and up with the activation, down, the sum.

Everything happens on the device, and the shapes of all launches follow from the number of tokens, so a CUDA graph can hold
it. A token's experts are added in the order in which they were picked, in float32, and no sum is left to chance.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.ops.chain import chain, processors
from slipstream.ops.moe import FEW, Pairs, kernels
from slipstream.ops.router import Logits
from slipstream.ops.router.choice import room
from slipstream.ops.tuned import Experts, Group, Tile

WIDE = 1024  # pairs up to which each one's answer is float32 before they are added: more cost time there


class Alone(NamedTuple):
    """How a product is shared out where each pair is a tile of its own, and not many bytes are read."""

    split: int  # parts of the inputs, in warps of their own
    slabs: int  # of 16 rows of weights in a program
    step: int = 0  # times 64 inputs that a warp takes in a step; 0: all of them, in registers before the input is there
    stages: int = 3

    @property
    def pairs(self) -> int:
        """In a tile."""
        return 1


class Tiles(NamedTuple):
    left: bool  # the weights are the left side of the product
    pairs: int  # in a tile
    slabs: int  # of 16 rows of weights
    blocks: int  # of 32 inputs a step
    warps: int
    stages: int


# Measured on an H100 with the sizes of gpt-oss-20b: by how many pairs an expert has on average. For cards and shapes that
# ops/tuned.py knows, its choice comes first.
TABLE = {
    "few": Tiles(True, 8, 2, 16, 2, 3),
    "up to 5": Tiles(True, 8, 2, 8, 2, 4),
    "up to 12": Tiles(True, 16, 4, 4, 2, 4),
    "up to 40": Tiles(True, 32, 8, 2, 4, 4),
    "up to 96": Tiles(True, 64, 8, 2, 4, 4),
    "more": Tiles(True, 128, 8, 2, 4, 3),
    "few, dense": Tiles(True, 8, 4, 4, 2, 4),
    "more, dense": Tiles(False, 128, 16, 2, 8, 3),
    "float32": Tiles(False, 16, 2, 2, 4, 2),
}


def stacks(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Any,
    down: Any,
    activation: object,
    *,
    kind: str,
    limit: float = 7.0,
    tuned: Experts | None = None,
    leave: bool = False,
    logits: Logits | None = None,
) -> Tensor | Pairs:
    """`experts` of two layers that hold what `prepare` gave them; the activation is part of the first product."""
    return experts(
        x, ids, weights, gate_up.stack, gate_up.bias, down.stack, down.bias, kind=kind, limit=limit, tuned=tuned, leave=leave,
        logits=logits,
    )  # fmt: skip


def experts(
    x: Tensor,  # (tokens, hidden)
    ids: Tensor,  # (tokens, top_k) integers
    weights: Tensor,  # (tokens, top_k)
    gate_up: tuple[Tensor, ...],  # what prepare(gated=True) gave
    gate_up_bias: Tensor | None,  # (experts, 2 * intermediate), gate first
    down: tuple[Tensor, ...],
    down_bias: Tensor | None,  # (experts, hidden)
    *,
    kind: str,  # "swiglu_clamped" or "silu"
    limit: float = 7.0,
    tuned: Experts | None = None,  # what was measured for these weights on this card
    leave: bool = False,
    logits: Logits | None = None,  # of one token with FEW experts at most: ids, int32, and weights are filled here
) -> Tensor | Pairs:
    """The weighted sum of each token's experts, like x; to `leave` it, what is to be added. x is bfloat16 or float32."""
    tokens, top_k, number = len(x), ids.shape[1], down[0].shape[0]
    if not tokens:
        return torch.empty_like(x)
    pairs, ids, weights = tokens * top_k, ids.contiguous(), weights.contiguous()
    x = x if x.stride(1) == 1 and x.stride(0) % 2 == 0 else x.contiguous()
    inner = gate_up[0].shape[1] * 8 if len(gate_up) == 2 else gate_up[0].shape[1] // 2
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if logits is None and (group := choose_group(pairs, number, x, down, tuned)):
            sums, places = _grouped(x, ids, gate_up, gate_up_bias, down, down_bias, inner, group, kind, limit)
        else:
            tiles = choose_tiles(pairs, number, x.dtype, len(down) == 2, tuned)
            alone = tuned is None or tuned.few is None
            choice = _choice(logits, weights)
            sums = _tiled(x, ids, gate_up, gate_up_bias, down, down_bias, inner, tiles, alone, kind, limit, choice)
            places = None
    made = Pairs(sums, ids, weights, places, x.dtype)
    return made if leave else add(made)


def add(given: Pairs) -> Tensor:
    """The sum, where no norm makes it."""
    (parts, places, hidden), (tokens, top_k) = given.sums.shape, given.ids.shape
    out = torch.empty(tokens, hidden, dtype=given.dtype, device=given.sums.device)
    size = min(1024, triton.next_power_of_2(hidden))
    with torch.cuda.device_of(out):
        kernels.add[(tokens, triton.cdiv(hidden, size))](
            given.sums, given.ids, given.weights, given.places, out, hidden, places, top_k, parts, size, **chain(out.device)
        )  # fmt: skip
    return out


def _tiled(
    x: Tensor,
    ids: Tensor,
    gate_up: tuple[Tensor, ...],
    gate_up_bias: Tensor | None,
    down: tuple[Tensor, ...],
    down_bias: Tensor | None,
    inner: int,
    tiles: Tiles,
    alone: bool,  # each pair by itself may be, where there are few
    kind: str,
    limit: float,
    choice: dict[str, Any],
) -> Tensor:
    """Each pair's answer, maybe in parts: (parts, pairs, hidden)."""
    hidden, pairs, top_k, number = x.shape[1], ids.numel(), ids.shape[1], down[0].shape[0]
    one = choose_alone(gate_up, x.dtype, pairs, kind) if alone and not mixed(tiles, gate_up) else None
    two = choose_alone(down, x.dtype, pairs, None) if alone and not mixed(tiles, down) else None
    parts = 1 if two else choose_parts(pairs, hidden // 16, inner // 32, tiles, x.device)
    between = torch.empty(pairs, inner, dtype=x.dtype, device=x.device)
    wide = torch.float32 if pairs <= WIDE else x.dtype
    sums = torch.empty(parts, pairs, hidden, dtype=wide, device=x.device)
    schedule: tuple[Tensor, Tensor | None] = (ids.view(-1), None)
    if pairs > FEW:
        found, order = _schedule(ids, number, tiles.pairs)
        schedule = found[:-1], order
    x = mix(x, tiles, down)
    run_tiles(x, gate_up, gate_up_bias, schedule, between, one or tiles, top_k, kind, limit, **choice)
    run_tiles(between, down, down_bias, schedule, sums, two or tiles, 1, None, limit, **choice)
    return sums


def _grouped(
    x: Tensor,
    ids: Tensor,
    gate_up: tuple[Tensor, ...],
    gate_up_bias: Tensor | None,
    down: tuple[Tensor, ...],
    down_bias: Tensor | None,
    inner: int,
    size: int,
    kind: str,
    limit: float,
) -> tuple[Tensor, Tensor]:
    """Each pair's answer in the order of experts: (1, places, hidden), and the place of each pair."""
    from slipstream.ops.moe.grouped import product

    (tokens, hidden), top_k, device = x.shape, ids.shape[1], x.device
    experts, places = _schedule(ids, down[0].shape[0], size, sort=True)
    room = (experts.numel() - 1) * size
    sorted = torch.empty(room, hidden, dtype=x.dtype, device=device)
    between = torch.empty(room, inner, dtype=x.dtype, device=device)
    kernels.gather[(tokens,)](
        x.view(torch.int32), places, sorted.view(torch.int32), x.stride(0) // 2, hidden // 2,
        top_k, triton.next_power_of_2(hidden // 2), **chain(device),
    )  # fmt: skip
    product(sorted, gate_up, gate_up_bias, experts, between, size, kind, limit, processors(device))
    product(between, down, down_bias, experts, sorted, size, None, limit, processors(device))
    return sorted[None], places


def _schedule(ids: Tensor, number: int, size: int, *, sort: bool = False) -> tuple[Tensor, Tensor]:
    """The expert of each tile, as many as the worst case needs, and how many there are; the pairs of each or, to `sort`
    them, the places of all pairs."""
    pairs = ids.numel()
    busy = min(pairs, number)
    most = busy + (pairs - busy) // size
    found = torch.empty(pairs if sort else most * size, dtype=torch.int32, device=ids.device)
    tiles = torch.empty(most + 1, dtype=torch.int32, device=ids.device)
    kernels.schedule[(number,)](
        ids, tiles, found, pairs, most,
        BINS=triton.next_power_of_2(number + 1), BLOCK_M=size, SORT=sort, SIZE=min(4096, triton.next_power_of_2(pairs)),
        num_warps=8 if pairs > 1024 else 4, **chain(ids.device),
    )  # fmt: skip
    return tiles, found


def _choice(logits: Logits | None, weights: Tensor) -> dict[str, Any]:
    """What a kernel is told of logits that a router left, and where shares go; the experts' numbers go where they would stand."""
    if logits is None:
        return {}
    values, number = logits.values, logits.values.shape[1]
    return {
        "logits": values, "shares": weights, "num_experts": number, "EXPERTS": room(number),
        "SOFTMAX_FIRST": logits.softmax_first, "RENORMALIZE": logits.renormalize,
    }  # fmt: skip


def run_tiles(
    x: Tensor,
    stack: tuple[Tensor, ...],
    bias: Tensor | None,
    schedule: tuple[Tensor, Tensor | None],
    out: Tensor,
    tiles: Tiles | Alone,
    share: int,
    kind: str | None,
    limit: float,
    **choice: Any,  # as `_choice` says
) -> None:
    if isinstance(tiles, Alone):
        return run_alone(x, stack, bias, schedule[0], out, tiles, share, kind, limit, **choice)
    parts, pairs = (out.shape[0], out.shape[1]) if kind is None else (1, out.shape[0])
    data, scales = stack[0], stack[1] if len(stack) == 2 else None
    slabs, blocks = (data.shape[1] // 16, data.shape[2] // 32) if scales is None else (data.shape[1], data.shape[2] * 2)
    steps = triton.cdiv(triton.cdiv(blocks, tiles.blocks), parts)
    kernels.tiles[(triton.cdiv(slabs, tiles.slabs), schedule[0].numel(), parts)](
        x, data, scales, bias, *schedule, out, x.stride(0), slabs, blocks, x.shape[1], pairs, share, steps, limit,
        KIND=kind, LEFT=tiles.left, BLOCK_M=tiles.pairs, SLABS=tiles.slabs, BLOCKS=tiles.blocks,
        COMPUTE=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float32,
        MIXED=mixed(tiles, stack), EVEN=x.shape[1] % (tiles.blocks * 32) == 0,
        PREFETCH=triton.next_power_of_2(steps * tiles.blocks * 2) if schedule[1] is None else 0,
        WARPS=tiles.warps, num_warps=tiles.warps, num_stages=tiles.stages, **choice, **chain(x.device),
    )  # fmt: skip


def run_alone(
    x: Tensor,
    stack: tuple[Tensor, ...],
    bias: Tensor | None,
    experts: Tensor,
    out: Tensor,
    alone: Alone,
    share: int,
    kind: str | None,
    limit: float,
    **choice: Any,  # as `_choice` says
) -> None:
    data, scales = stack
    (_, slabs, twos, _), parts = data.shape, out.shape[0] if kind is None else 1
    each = triton.cdiv(twos, alone.split * parts)
    most, more = (alone.step, 0) if alone.step else chunks(each)
    steps = triton.cdiv(each, most) if alone.step else 1
    kernels.alone[(triton.cdiv(slabs, alone.slabs), len(experts), parts)](
        x, data, scales, bias, experts, out, x.stride(0), slabs, twos, x.shape[1], out.shape[-2], share, steps, limit,
        KIND=kind, SPLIT=alone.split, SLABS=alone.slabs, MOST=most, MORE=more, HELD=not alone.step,
        COMPUTE=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float32,
        PREFETCH=triton.next_power_of_2(steps * most * 4) if alone.step and kind is None else 0,
        num_warps=alone.split * alone.slabs, num_stages=alone.stages, **choice, **chain(x.device),
    )  # fmt: skip


def chunks(number: int) -> tuple[int, int]:
    """Two powers of two that make the number, or the next that two can make; the second may be none."""
    most = 1 << number.bit_length() - 1
    more = triton.next_power_of_2(number - most) if number > most else 0
    return (2 * most, 0) if more == most else (most, more)


def mixed(tiles: Tiles | Alone, stack: tuple[Tensor, ...]) -> bool:
    """Whether the inputs stand in the order in which a warpgroup's tensor cores find them, as kernels.py says."""
    return isinstance(tiles, Tiles) and len(stack) == 2 and tiles.left and tiles.warps >= 4


def mix(x: Tensor, tiles: Tiles | Alone, stack: tuple[Tensor, ...]) -> Tensor:
    """The inputs in the order in which these tiles want them."""
    return x.unflatten(1, (-1, 4, 2, 2)).transpose(2, 3).reshape(x.shape) if mixed(tiles, stack) else x


def choose_tiles(pairs: int, number: int, dtype: torch.dtype, packed: bool, tuned: Experts | None = None) -> Tiles:
    if dtype != torch.bfloat16:
        return TABLE["float32"]
    each = pairs / number
    if tuned is not None and packed:
        choice = tuned.few if pairs <= FEW else tuned.choose(each)
        if isinstance(choice, Tile):  # else it is for cards with a grouped product
            return Tiles(True, *choice)
    if pairs <= FEW or (each <= 5 and not packed):
        return TABLE["few" if packed else "few, dense"]
    for most in (5, 12, 40, 96):
        if each <= most:
            return TABLE[f"up to {most}"]
    return TABLE["more" if packed else "more, dense"]


def choose_group(pairs: int, number: int, x: Tensor, down: tuple[Tensor, ...], tuned: Experts | None = None) -> int:
    """The pairs in a tile of the grouped product, or 0: tiles are faster, or it cannot be had. Measured as above."""
    if x.dtype != torch.bfloat16 or len(down) != 2 or not _hopper(x.device):
        return 0
    each = pairs / number
    if tuned is not None:
        choice = tuned.few if pairs <= FEW else tuned.choose(each)
        return choice.group if isinstance(choice, Group) else 0
    return 0 if each <= 24 else 64 if each <= 48 else 128


def choose_alone(
    stack: tuple[Tensor, ...], dtype: torch.dtype, pairs: int, kind: str | None, parts: int = 1
) -> Alone | None:
    """Where each pair is by itself; None: tiles, which are faster where more is read, as by the first product of gpt-oss.

    Measured on an H100 with the sizes of Qwen3-30B-A3B, gpt-oss-120b and half of it, in the order of their layers.

    Args:
        parts: that the sum of a single pair is left in.
    """
    if dtype != torch.bfloat16 or len(stack) != 2 or pairs > FEW:
        return None
    _, slabs, twos, _ = stack[0].shape
    read = pairs * slabs * twos * 544  # bytes
    if read > 24 << 20:
        return None
    if kind is not None:
        return Alone(2, 1, 4, 4) if twos <= 32 else Alone(2, 1, 8, 3)
    if pairs > 1:
        return Alone(2, 1) if twos <= 24 else Alone(4, 2, 4, 3)
    if read > 8 << 20:
        return None
    return Alone(4, 1, 4, 3) if parts == 1 else Alone(8, 1) if twos <= 64 * parts else None


def choose_parts(pairs: int, slabs: int, blocks: int, tiles: Tiles, device: torch.device) -> int:
    """Where tiles alone leave the device idle, several programs share a tile, each with a part of the sum."""
    if pairs > FEW:
        return 1
    programs = triton.cdiv(slabs, tiles.slabs) * pairs
    return max(1, min(6 * processors(device) // programs, triton.cdiv(blocks, tiles.blocks) // 2))


@cache
def _hopper(device: torch.device) -> bool:
    """Whether it has the instructions of the grouped product."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
