"""The small kernels of a step on a CUDA device, in every dtype, and in CUDA graphs. Run: pytest -m gpu tests/gpu/test_small.py"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from slipstream.ops.activation.triton import activation
from slipstream.ops.attention.decode import decode
from slipstream.ops.attention.triton import attention
from slipstream.ops.attention_input.triton import attention_input
from slipstream.ops.linear.triton_few import Few
from slipstream.ops.norm.triton import add_norm
from slipstream.ops.rope import Turns
from slipstream.ops.router.triton import add_norm_router, router
from slipstream.ops.sampling import Row
from slipstream.ops.sampling.reference import sample, stream
from slipstream.ops.sampling.torch import sample as batched
from slipstream.ops.sampling.triton import draw, pick
from slipstream.request import SamplingParams
from tests.ops import test_attention_input as entry
from tests.ops import test_small_triton as cases
from tests.ops.test_attention_triton import World
from tests.ops.test_sampling import asked_for, draw_case, random_row

pytestmark = pytest.mark.gpu
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROUNDED = {F32: 5e-6, BF16: 8e-3, F16: 1e-3}
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16, F16])


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(1, 2880), (67, 2880), (300, 4097), (3, 65536), (5, 33)])
@pytest.mark.parametrize("held", [None, F32], ids=["", "onto float32"])
def test_add_norm(held: torch.dtype | None, rows: int, width: int, dtype: torch.dtype) -> None:
    assert cases.add_norm(dtype, "cuda", rows, width, held) < ROUNDED[dtype]


@DTYPES
@pytest.mark.parametrize(
    "sizes", [(1, 2880, 4, 2), (1, 2048, 8, 1), (65, 2880, 4, 1), (67, 2048, 8, 1, True), (3, 4097, 5, 3)]
)
def test_the_norm_adds_what_experts_left(sizes: tuple[Any, ...], dtype: torch.dtype) -> None:
    assert cases.add_left(*sizes, dtype=dtype, device="cuda") < ROUNDED[dtype]


def test_norm_and_nan() -> None:
    assert cases.norm_alone("cuda") < 5e-6
    cases.enter_nan("cuda")


@DTYPES
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    ("dim", "sizes"),
    [(64, (67, 64, 8, 64, 300)), (128, (1, 7, 1, 128, 5)), (60, (33, 6, 3, 80, 40)), (96, (5, 3, 2, 96, 9)),
     (256, (9, 5, 5, 256, 17)), (None, (3, 4, 2, 16, 7))],
)  # fmt: skip
def test_attention_input(dim: int | None, sizes: tuple[int, ...], norms: bool, dtype: torch.dtype) -> None:
    assert cases.enter(dim, norms, dtype, "cuda", sizes) < {F32: 2e-5, BF16: 0.08, F16: 0.01}[dtype]


def test_angles_are_right_far_out() -> None:
    """Positions of which the angle in radians is beyond 2^20."""
    asked = entry.case(64, False, F32, "cuda", (33, 4, 2, 64, 40))
    asked["turns"].positions += 3_000_000
    want = entry.oracle(**asked)[0]
    assert (attention_input(**asked) - want).abs().max() < 2e-5


@DTYPES
@pytest.mark.parametrize(("experts", "top_k"), [(32, 4), (128, 8), (256, 16), (8, 2), (33, 5), (1000, 6)])
def test_router(experts: int, top_k: int, dtype: torch.dtype) -> None:
    for softmax_first, renormalize in ((False, True), (True, True), (True, False)):
        assert cases.route(experts, top_k, softmax_first, renormalize, dtype, "cuda", 77) < 5e-6


@DTYPES
@pytest.mark.parametrize(
    ("tokens", "hidden", "experts"), [(1, 2880, 32), (77, 2880, 32), (300, 2048, 128), (5, 4100, 256), (17, 72, 7)]
)
def test_router_with_its_product(tokens: int, hidden: int, experts: int, dtype: torch.dtype) -> None:
    assert cases.route_product(tokens, hidden, experts, dtype, "cuda") < {F32: 1e-5, BF16: 2e-2, F16: 3e-3}[dtype]


@DTYPES
@pytest.mark.parametrize(
    ("experts", "top_k", "width"), [(32, 4, 2880), (128, 8, 2048), (8, 2, 4096), (256, 7, 1000), (7, 1, 60)]
)
def test_router_in_one_kernel(experts: int, top_k: int, width: int, dtype: torch.dtype) -> None:
    for tokens, (softmax_first, renormalize) in zip(
        (1, 5, 8), ((False, True), (True, True), (True, False)), strict=True
    ):
        assert cases.choose(experts, top_k, softmax_first, renormalize, dtype, "cuda", tokens, width) < 5e-6


@DTYPES
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize(
    ("width", "experts", "top_k", "first", "bias", "parts", "left_k", "sort"),
    [(2880, 32, 4, False, True, 0, 1, False), (2880, 128, 4, False, True, 2, 1, False),
     (2048, 128, 8, True, False, 4, 1, False), (2048, 128, 8, True, False, 1, 8, True), (4096, 8, 2, True, False, 0, 1, False),
     (8192, 60, 5, True, True, 2, 4, False), (333, 33, 3, False, False, 3, 2, False)],
)  # fmt: skip
def test_norm_and_router_in_one_kernel(
    rows: int, width: int, experts: int, top_k: int, first: bool, bias: bool, parts: int, left_k: int, sort: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    options: dict[str, Any] = {"bias": bias, "parts": parts, "left_k": left_k, "sort": sort, "device": "cuda"}
    most = {F32: 1e-5, BF16: 4e-2, F16: 5e-3}[dtype]
    for again in (True, False) if first else (True,):
        assert cases.after_norm(rows, width, experts, top_k, first, again, dtype=dtype, **options) < most
    if dtype != F32:  # a residual that is wider than the norm of it
        assert cases.after_norm(rows, width, experts, top_k, first, dtype=dtype, wide=True, **options) < most


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize(("width", "experts", "top_k"), [(2048, 128, 8), (2880, 32, 4), (8192, 256, 5)])
def test_who_comes_last_changes_nothing(width: int, experts: int, top_k: int, tokens: int) -> None:
    """200 repeats of two calls by turns: memory holds the other's logits, so that what is read too early shows."""
    first, second = [], []
    for seed, found in enumerate((first, second)):
        torch.manual_seed(seed)
        x, norm = torch.randn(tokens, width, device="cuda").bfloat16(), torch.rand(width, device="cuda").bfloat16()
        layer = cases.Layer((torch.randn(experts, width, device="cuda") * width**-0.5).bfloat16(), None)
        layer.arrived = torch.zeros(8, dtype=torch.int32, device="cuda")
        pairs = cases.left(tokens, width, 1, 4, False, BF16, "cuda")[0]
        found += [x, pairs, norm, 1e-5, layer, top_k]
    wanted = [[t.clone() for t in add_norm_router(*call, softmax_first=True)] for call in (first, second)]
    assert not torch.equal(wanted[0][2], wanted[1][2])
    found = [add_norm_router(*call, softmax_first=True) for _ in range(200) for call in (first, second)]
    for i, made in enumerate(found):
        assert all(torch.equal(a, b) for a, b in zip(made, wanted[i % 2], strict=True)), i
    for _ in range(200):  # the same memory each time
        for call, want in zip((first, second), wanted, strict=True):
            made = add_norm_router(*call, softmax_first=True)
            assert all(torch.equal(a, b) for a, b in zip(made, want, strict=True))
    assert not first[4].arrived.any() and not second[4].arrived.any()


@DTYPES
@pytest.mark.parametrize("kind", cases.KINDS)
def test_activation(kind: str, dtype: torch.dtype) -> None:
    for rows, inner in ((1, 2880), (67, 1537), (300, 5)):
        assert cases.gate(kind, dtype, "cuda", rows, inner) < ROUNDED[dtype]


@DTYPES
@pytest.mark.parametrize(("rows", "vocab"), [(8, 201_088), (256, 201_088), (41, 5000), (8, 7)])
def test_pick(rows: int, vocab: int, dtype: torch.dtype) -> None:
    if dtype != F32 and vocab > 10**5:
        rows = 8
    cases.picked(dtype, "cuda", rows, vocab)


def test_ten_thousand_draws_are_those_of_the_samplers() -> None:
    torch.manual_seed(0)
    differ, whole = 0, 0
    for i in range(40):
        logits = 2.5 * torch.randn(256, 20_011, device="cuda")
        params = [SamplingParams(temperature=0.3 + (i + j) % 7 / 4, seed=1000 * i + j) for j in range(256)]
        rows = [Row(p, (1,), (2,) * (j % 5), 1000 * i + j) for j, p in enumerate(params)]
        temperature = torch.tensor([p.temperature for p in params], device="cuda")
        starts = torch.tensor([stream(r.seed, r.position) for r in rows], device="cuda")
        tokens, ok = pick(logits, temperature, starts)
        assert ok.all()
        differ += sum(a != b for a, b in zip(tokens.tolist(), batched(logits, rows), strict=True))
        if i % 20 == 0:
            whole += sum(
                a != b for a, b in zip(tokens[:64].tolist(), sample(logits[:64].cpu(), rows[:64]), strict=True)
            )
    print(
        f"other tokens than ops/sampling/torch.py on this device: {differ} of 10,240; than the reference on a CPU: {whole} of 128"
    )
    assert differ <= 2 and whole <= 1


@DTYPES
def test_draw(dtype: torch.dtype) -> None:
    """Rows of any parameters, as in the reference on this device. An exponential of another last bit may let one through."""
    cases.some_rows("cuda")
    differ, rows = 0, 0
    for seed in range(150):
        x, asked = draw_case(seed, (3, 40, 611, 5003, 32_003, 201_088))
        differ += cases.differ(x.to(dtype), asked, seed, "cuda")
        rows += len(asked)
    print(f"{differ} of {rows} rows have another token")
    assert differ <= 2 and cases.sampled("cuda", 150) <= 2


@pytest.mark.parametrize("spread", [4.0, 0.5], ids=["few are kept", "many are kept"])
@pytest.mark.parametrize("params", [{"top_k": 20, "top_p": 0.95}, {"top_p": 0.9}, {"repetition_penalty": 1.1}], ids=str)
@pytest.mark.parametrize("rows", [1, 64, 256])
def test_how_long_draw_takes(rows: int, params: dict[str, Any], spread: float) -> None:
    """Prints it. Sums of so many weights must be right too: each row is drawn from what is kept."""
    logits = (spread * torch.randn(rows, 201_088, device="cuda")).bfloat16()
    history = torch.randint(201_088, (rows, 1000)).tolist()
    asked = asked_for(
        [Row(SamplingParams(**params), h, h[:500], i) for i, h in enumerate(history)], 201_088, random.Random(0), "cuda"
    )
    out = torch.empty(rows, dtype=torch.int64, device="cuda"), torch.empty(rows, dtype=torch.bool, device="cuda")
    draw(logits, asked, out)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        draw(logits, asked, out)
    end.record()
    torch.cuda.synchronize()
    print(f"{rows} rows, {params}, spread {spread}: {100 * start.elapsed_time(end):.0f} us")
    assert out[1].all() and ((out[0] >= 0) & (out[0] < 201_088)).all()
    if "top_k" in params:
        least = logits.float().topk(20).values[:, -1]
        assert (logits.float().gather(1, out[0][:, None])[:, 0] >= least).all()


def captured(call: Callable[[], Any]) -> None:
    """Eager twice and a replay: the same bits. Everything that is allocated may hold anything."""
    first = [t.clone() for t in call()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # two at a time would count in the same places
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for t in out:
        t.fill_(0 if t.dtype == torch.bool else 7)
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(first, out, strict=True))


@DTYPES
@pytest.mark.parametrize("rows", [1, 19])
def test_a_graph_gives_what_eager_gives(rows: int, dtype: torch.dtype) -> None:
    x, delta, weight = torch.randn(3, rows, 2880, device="cuda").to(dtype).unbind()
    captured(lambda: add_norm(x, delta, weight[0], 1e-5))
    pairs = cases.left(rows, 2880, 4, 2, False, dtype, "cuda")[0]
    captured(lambda: add_norm(x, pairs, weight[0], 1e-5))
    captured(lambda: router(x[:, :32], torch.clone, 4, softmax_first=False))
    layer = cases.Layer(torch.randn(32, 2880, device="cuda").to(dtype), None)
    captured(lambda: router(x, layer, 4, softmax_first=False))
    if rows == 1:
        layer.arrived = torch.zeros(8, dtype=torch.int32, device="cuda")
        captured(lambda: router(x, layer, 4, softmax_first=False))
        captured(lambda: add_norm_router(x, pairs, weight[0], 1e-5, layer, 4, softmax_first=False))
        assert not layer.arrived.any()
    captured(lambda: [activation(x, "swiglu_clamped")])
    asked = entry.case(64, True, dtype, "cuda", (rows, 8, 2, 64, 40))
    captured(lambda: [attention_input(**asked), asked["keys"].clone(), asked["values"].clone()])
    heat = torch.arange(rows, device="cuda") / 5.0
    logits, starts = torch.randn(rows, 50_001, device="cuda").to(dtype), torch.arange(rows, device="cuda") * 7919**3
    captured(lambda: pick(logits, heat, starts))


def test_host_is_not_waited_for() -> None:
    logits, heat = torch.randn(5, 3000, device="cuda"), torch.ones(5, device="cuda")
    starts: Tensor = torch.arange(5, device="cuda")
    asked = entry.case(64, True, BF16, "cuda", (5, 8, 2, 64, 40))
    rng, out = random.Random(1), pick(logits, heat, starts)
    rows = [random_row(rng, 3000) for _ in range(5)]
    drawn, some = asked_for(rows, 3000, rng, "cuda"), asked_for(rows[:3], 3000, rng, "cuda")
    assert drawn.filtered and drawn.changed
    torch.cuda.set_sync_debug_mode("error")
    try:
        pick(logits, heat, starts)
        draw(logits, drawn, out)
        draw(logits, some, out)
        router(logits[:, :32], torch.clone, 4, softmax_first=True)
        attention_input(**asked)
        add_norm(logits, logits, logits[0], 1e-5)
        activation(logits, "gelu")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_a_chain_replayed_200_times_gives_what_eager_gives(tokens: int, fused: bool) -> None:
    """Four layers outside the experts in one graph: each kernel starts before the one before it has ended, and memory is used
    again as soon as torch sees that it can be. What is replayed has other bits if any kernel starts too early."""
    made = World((300,) * tokens, heads=64, kv_heads=8, head_dim=64, dtype=BF16, device="cuda")
    _, keys, values, batch, group = made.step([(i, 299, 300) for i in range(tokens)])
    keys, values = keys.nan_to_num(), values.nan_to_num()
    bounds, slots = batch.bounds, group.slots
    random = torch.Generator("cuda").manual_seed(tokens)

    def floats(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=random, device="cuda") * shape[-1] ** -0.5).bfloat16()

    weights = [[floats(5120, 2880), floats(2880, 4096), floats(32, 2880)] for _ in range(4)]
    counters = torch.zeros(4, 8, dtype=torch.int32, device="cuda")
    turns = Turns(bounds[1].long(), torch.rand(32, generator=random, device="cuda"), 1.0, BF16)
    start, one, few = floats(tokens, 2880), torch.ones(2880, dtype=BF16, device="cuda"), Few()

    def run() -> list[Tensor]:
        x, delta = start, start
        found = []
        for (qkv, out, route), arrived in zip(weights, counters, strict=True):
            x, h = add_norm(x, delta, one, 1e-5)
            h = few(h, (qkv,), None).view(tokens, 80, 64)
            if fused:
                a = decode(h, turns, None, keys, values, batch, group, scale=0.125, sinks=made.extra)
            else:
                q = attention_input(h, turns, None, keys, values, slots)
                a = attention(q, keys, values, batch, group, scale=0.125, sinks=made.extra)
            more, layer = few(a.view(tokens, 4096), (out,), None), cases.Layer(route, None, arrived)
            if tokens <= 8:
                x, h, ids, shares = add_norm_router(x, more, one, 1e-5, layer, 4, softmax_first=False)
            else:
                x, h = add_norm(x, more, one, 1e-5)
                ids, shares = router(h, layer, 4, softmax_first=False)
            delta = activation(torch.cat((h, h * shares.sum()), 1), "silu")
            found += [a, ids, shares, delta]
        return found

    want = [t.clone() for t in run()]
    assert all(t.isfinite().all() for t in want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for _ in range(200):
        for t in out:
            t.fill_(7)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))
