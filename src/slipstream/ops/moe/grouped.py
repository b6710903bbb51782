"""The product of many sorted pairs with mxfp4 experts on Hopper, in Gluon, where warps can be given different work.

A program stays on its multiprocessor and takes piece after piece: 256 rows of weights by a tile of PAIRS pairs. One warp
fetches inputs and weights with the tensor memory accelerator, a few steps of 64 inputs ahead. Two warpgroups share the
inputs, each with 128 of the rows: its threads take their words from shared memory, laid out as kernels.py says, and decode
the 32 inputs that the tensor cores are to read next, from registers, while those still run on the 32 before.

ptxas runs products one after the other, without a word, where one is in flight as a step ends, where anything but a product
writes what a product reads between two waits, or where registers run out: the test counts `gsb0` in the machine code. And it
moves the decoding behind the wait that it should fill, unless there is a branch between them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

STEP = gl.constexpr(64)  # inputs
SLABS = gl.constexpr(8)  # of a warpgroup
LAYOUTS = gl.NVMMASharedLayout(128, 16, 2), gl.NVMMASharedLayout(128, 32, 2), gl.NVMMASharedLayout(32, 32, 2)
MUL = gl.constexpr("{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }")
SLEEP = gl.constexpr("nanosleep.u32 3000; mov.u32 $0, 0;")  # so that one's last steps cover the other's activation
WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [4, 0]], [[0, 4], [0, 8], [0, 16], [0, 32], [0, 64]], [[1, 0], [2, 0]], [], [8, 128]
    )
)
LANES = gl.constexpr(  # slab, g, t
    gl.DistributedLinearLayout(
        [[4, 0, 0]], [[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]], [[1, 0, 0], [2, 0, 0]], [], [8, 8, 4]
    )
)


@gluon.jit
def _times(a, b):  # type: ignore[no-untyped-def]
    return gl.inline_asm_elementwise(MUL, "=r,r,r", [a, b], dtype=gl.uint32, is_pure=True, pack=1)


@gluon.jit
def _take(words, scales, HALF: gl.constexpr):  # type: ignore[no-untyped-def]
    """A step's words and scales from shared memory: (8, 32, 2) of each for the first 32 inputs, and for the next."""
    words = words.slice(HALF * 8, 8).load(WORDS).to(gl.uint32, bitcast=True)
    first, second = gl.split(words.reshape(8, 32, 2, 2).permute(0, 1, 3, 2))
    fours = scales.slice(HALF * 8, 8).load(gl.SliceLayout(2, LANES)).to(gl.uint32, bitcast=True)
    fours = (fours[:, :, None] + gl.zeros((8, 8, 4), gl.uint32, layout=LANES)).reshape(8, 32)
    return first, gl.join(fours & 255, (fours >> 8) & 255), second, gl.join((fours >> 16) & 255, fours >> 24)


@gluon.jit
def _decode(words, scales, LEFT: gl.constexpr):  # type: ignore[no-untyped-def]
    """32 inputs -> (128, 32), as a warpgroup's product takes it."""
    s = gl.convert_layout(scales * 0x00800080, words.type.layout, assert_trivial=True)
    a = words & 0x81C081C0
    b = (words << 6) & 0x81C081C0
    c = ((words << 12) | (words >> 20)) & 0x81C081C0
    d = ((words << 2) & 0x80C080C0) | ((words >> 6) & 0x01000100)
    pairs = gl.join(gl.join(_times(a, s), _times(c, s)), gl.join(_times(b, s), _times(d, s)))
    low = (pairs & 0xFFFF).to(gl.uint16).to(gl.bfloat16, bitcast=True)
    high = (pairs >> 16).to(gl.uint16).to(gl.bfloat16, bitcast=True)
    both = gl.join(low, high).reshape(8, 8, 4, 2, 2, 2, 2).permute(0, 3, 1, 4, 5, 2, 6).reshape(128, 32)
    return gl.convert_layout(both, LEFT, assert_trivial=True)


@gluon.jit
def _place(work, groups, number, experts):  # type: ignore[no-untyped-def]
    """A piece of work: its tile, the tile's expert, and which 256 of the rows."""
    tile = work // groups
    return tile, gl.load(experts + tile), (work + tile) % groups


@gluon.jit
def _finish(total, shared, limit, KIND: gl.constexpr, PAIRS: gl.constexpr):  # type: ignore[no-untyped-def]
    """The sums of a piece, after the activation, to shared memory."""
    if KIND is None:
        shared.permute((1, 0)).store(total.to(gl.bfloat16))
    else:
        gate, up = gl.split(total.reshape(8, 2, 8, PAIRS).permute(0, 2, 3, 1))
        if KIND == "swiglu_clamped":
            gate = gl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
            up = gl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
            up = gl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL) + 1
            gate = gate / (1 + gl.exp(-1.702 * gate))
        else:
            gate = gate / (1 + gl.exp(-gate))
        y = (gate * up).to(gl.bfloat16).reshape(4, 4, 2, 2, PAIRS).permute(0, 2, 1, 3, 4).reshape(64, PAIRS)
        shared.permute((1, 0)).store(y)  # MIXED


@gluon.jit
def _consume(  # type: ignore[no-untyped-def]
    HALF: gl.constexpr, KIND: gl.constexpr, PAIRS: gl.constexpr, STAGES: gl.constexpr,
    bias, experts, out, inputs, words, scales, ready, free, shared, number, groups, num_slabs, steps, limit,
):  # fmt: skip
    TOTAL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PAIRS, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, TOTAL, 2)
    if HALF == 1:
        gl.inline_asm_elementwise(SLEEP, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    step = 0
    mbarrier.wait(ready.index(0), 0, pred=gl.program_id(0) < number)
    first, first_scale, second, second_scale = _take(words.index(0), scales.index(0), HALF)
    left = _decode(first, first_scale, LEFT)
    for work in range(gl.program_id(0), number, gl.num_programs(0)):
        tile, expert, group = _place(work, groups, number, experts)
        more = work + gl.num_programs(0) < number
        slab = (group * 2 + HALF) * SLABS
        row = gl.arange(0, 128, layout=gl.SliceLayout(1, TOTAL))
        total = gl.zeros((128, PAIRS), gl.float32, layout=TOTAL)
        if bias is not None:
            if KIND is None:
                column = slab * 16 + row
            else:
                column = ((row >> 3) & 1) * (num_slabs * 8) + slab * 8 + (row >> 4) * 8 + (row & 7)
            column = gl.minimum(column, num_slabs * 16 - 1)
            total += gl.load(bias + expert * num_slabs * 16 + column).to(gl.float32)[:, None]
        for i in range(steps):
            x = inputs.index(step & (STAGES - 1))
            total = warpgroup_mma(left, x.slice(0, 32, 1).permute((1, 0)), total, is_async=True)
            total = warpgroup_mma_wait(1, deps=[total])
            right = _decode(second, second_scale, LEFT)
            total = warpgroup_mma(right, x.slice(32, 32, 1).permute((1, 0)), total, is_async=True)
            total = warpgroup_mma_wait(1, deps=[total])
            then = (step + 1) & (STAGES - 1)
            mbarrier.wait(ready.index(then), ((step + 1) // STAGES) & 1, pred=more | (i + 1 < steps))
            first, first_scale, second, second_scale = _take(words.index(then), scales.index(then), HALF)
            left = _decode(first, first_scale, LEFT)
            mbarrier.wait(ready.index(then), ((step + 1) // STAGES) & 1, pred=more | (i + 1 < steps))  # a branch
            total = warpgroup_mma_wait(0, deps=[total])
            mbarrier.arrive(free.index(step & (STAGES - 1)))
            step += 1
        tma.store_wait(0)
        gl.thread_barrier()
        _finish(total, shared, limit, KIND, PAIRS)
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(out, [tile * PAIRS, slab * (16 if KIND is None else 8)], shared)
    tma.store_wait(0)


@gluon.jit
def _produce(  # type: ignore[no-untyped-def]
    PAIRS: gl.constexpr, STAGES: gl.constexpr,
    x, data, factors, experts, inputs, words, scales, ready, free, number, groups, num_slabs, steps,
):  # fmt: skip
    step = 0
    for work in range(gl.program_id(0), number, gl.num_programs(0)):
        tile, expert, group = _place(work, groups, number, experts)
        slab = expert * num_slabs + group * 2 * SLABS
        for i in range(steps):
            stage = step & (STAGES - 1)
            bar = ready.index(stage)
            mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, x.block_type.nbytes + data.block_type.nbytes + factors.block_type.nbytes)
            tma.async_copy_global_to_shared(data, [slab, i * 128], bar, words.index(stage))
            tma.async_copy_global_to_shared(factors, [slab, i * 8], bar, scales.index(stage))
            tma.async_copy_global_to_shared(x, [tile * PAIRS, i * STEP], bar, inputs.index(stage))
            step += 1


@gluon.jit(do_not_specialize=["most", "steps", "limit"])
def grouped(  # type: ignore[no-untyped-def]
    x, data, factors, bias, experts, most, out, groups, num_slabs, steps, limit,
    KIND: gl.constexpr, PAIRS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out (tiles * PAIRS, rows) for x (tiles * PAIRS, inputs), inputs MIXED; with a KIND, after it, MIXED for the next.

    experts (tiles): that of each tile; then, at `most`, the number of tiles that there are.
    """
    gdc_wait()
    gdc_launch_dependents()
    number = gl.load(experts + most) * groups
    width: gl.constexpr = 128 if KIND is None else 64
    inputs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, PAIRS, STEP], x.layout)
    words = gl.allocate_shared_memory(gl.int32, [STAGES, 16, 128], data.layout)
    scales = gl.allocate_shared_memory(gl.int32, [STAGES, 16, 8], factors.layout)
    shared = gl.allocate_shared_memory(gl.bfloat16, [2, PAIRS, width], out.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (0, KIND, PAIRS, STAGES, bias, experts, out, inputs, words, scales, ready, free, shared.index(0),
                        number, groups, num_slabs, steps, limit)),
            (_consume, (1, KIND, PAIRS, STAGES, bias, experts, out, inputs, words, scales, ready, free, shared.index(1),
                        number, groups, num_slabs, steps, limit)),
            (_produce, (PAIRS, STAGES, x, data, factors, experts, inputs, words, scales, ready, free,
                        number, groups, num_slabs, steps)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def product(
    x: Tensor,
    stack: tuple[Tensor, ...],
    bias: Tensor | None,
    experts: Tensor,
    out: Tensor,
    size: int,
    kind: str | None,
    limit: float,
    processors: int,
) -> None:
    data, factors = stack
    slabs, steps = data.shape[1:3]
    grouped[(processors,)](
        TensorDescriptor.from_tensor(x, [size, 64], LAYOUTS[0]),
        TensorDescriptor.from_tensor(data.view(-1, steps * 128), [16, 128], LAYOUTS[1]),
        TensorDescriptor.from_tensor(factors.view(-1, steps * 8), [16, 8], LAYOUTS[2]),
        bias, experts, experts.numel() - 1,
        TensorDescriptor.from_tensor(out, [size, 128 if kind is None else 64], LAYOUTS[0]),
        triton.cdiv(slabs, 16), slabs, steps, limit, kind, size, stages(size), num_warps=4, launch_pdl=True,
    )  # fmt: skip


def stages(size: int) -> int:
    """Steps that fit in shared memory, a power of two."""
    return 4 if size == 128 else 8
