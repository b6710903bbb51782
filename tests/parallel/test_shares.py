"""What ranks have of a model, put together, is the model: exactly once, whatever the architecture, the format and the number
of ranks. No process is started."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.checkpoint.load import Load, Part, _weight, _whole
from slipstream.checkpoint.open import Checkpoint, open_checkpoint, open_random
from slipstream.checkpoint.tensors import TensorInfo, read_weight
from slipstream.config import EngineConfig, ModelConfig
from slipstream.errors import ConfigError
from slipstream.ops import formats
from slipstream.ops.formats import MADE
from slipstream.ops.formats.blocks import BLOCKS
from slipstream.parallel.shares import Cut, Ranks, Unit, Units, cut_of, local_config, part, share_of
from slipstream.plan.layout import Layout, lay_out
from slipstream.quantization.quantize import quantize
from tests.checkpoint.blocks import super_blocks
from tests.checkpoint.test_gguf_names import MODELS, build, to_gguf
from tests.parity.test_mxfp4 import publish
from tests.parity.tiny import TINY, save
from tests.quantization import tiny as blocks

F32 = torch.float32


def layouts(checkpoint: Checkpoint, size: int, **options: Any) -> list[Layout]:
    """Of every rank. Each compares the shapes of what it has with those of its layers."""
    asked = EngineConfig(**{"device": "cpu", "dtype": "float32", **options})
    return [lay_out(asked, checkpoint, None, Ranks(rank, size), None) for rank in range(size)]


def check(checkpoint: Checkpoint, size: int, **options: Any) -> list[Layout]:
    """Every parameter is there exactly once, and what a rank reads is its part of what the files hold."""
    found = layouts(checkpoint, size, **options)
    for rank, laid in enumerate(found):
        assert found[0].loads_of(rank) == laid.loads
    for items in zip(*(laid.loads for laid in found), strict=True):
        covered(items, found[0].config)
        if checkpoint.kind == "random":
            continue
        whole: list[Any] = [numbers(items[0], p, whole=True) for p in items[0].parts()]
        for item in items:
            if item.shared:
                continue
            parts = [p for p in item.parts() if 0 not in p.local]
            wholes = [w for w, p in zip(whole, item.parts(), strict=True) if 0 not in p.local]
            for here, read, all_ in zip(parts, item.reads(), wholes, strict=True):
                want = all_
                if here.cut.ranges is not None:
                    taken = [torch.arange(r.start, r.stop) for r in here.cut.ranges]
                    want = all_.index_select(all_.dim() - here.cut.dim, torch.cat(taken))
                got = numbers(item, read)
                assert got.shape == here.local
                torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    return found


def numbers(item: Load, part: Part, *, whole: bool = False) -> torch.Tensor:
    make = (lambda: _whole(read_weight, item, part.format, part.sources, part.shape, F32)) if whole else None
    return formats.decode(make() if make else _weight(read_weight, item, part, F32), F32)


def covered(items: tuple[Load, ...], config: ModelConfig) -> None:
    to, shape = items[0].to, items[0].shape
    cuts = [item.cut for item in items]
    if all(c.ranges is None for c in cuts):
        assert [c.zero for c in cuts] in ([False] * len(cuts), [False] + [True] * (len(cuts) - 1)), to
        assert cuts[-1].zero == to.endswith((".out.bias", ".down.bias")), to
        kind = to.removesuffix(".weight").rpartition(".")[2]
        assert "norm" in kind or kind.startswith(("before_", "after_")) or ".router." in to or cuts[-1].zero, to
        return
    assert len({c.dim for c in cuts}) == 1 and not any(c.zero for c in cuts)
    counts = torch.zeros(shape[len(shape) - cuts[0].dim], dtype=torch.int64)
    for c in cuts:
        assert c.ranges is not None and sum(map(len, c.ranges)) > 0, to
        for r in c.ranges:
            counts[r.start : r.stop] += 1
    first_key = config.num_heads * config.head_dim if ".qkv." in to else 0 if "k_norm" in to else len(counts)
    assert (counts[:first_key] == 1).all() and (counts[first_key:] >= 1).all(), to


def test_parts_of_a_number() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        total, size, unit = draw.randrange(300), draw.randrange(1, 12), draw.choice([1, 1, 2, 7, 32])
        found = [part(total, Ranks(r, size), unit) for r in range(size)]
        assert [i for r in found for i in r] == list(range(total))
        assert all(r.start % unit == 0 or r.start == total for r in found)
        counts = [-(-len(r) // unit) for r in found]
        assert counts == sorted(counts, reverse=True) and counts[0] - counts[-1] <= 1


def test_what_is_left_of_some_rows() -> None:
    draw = random.Random(1)
    for _ in range(500):
        edges = sorted(draw.sample(range(41), 6))
        ranges = tuple(range(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True))
        cut, middle = Cut(2, ranges), draw.randrange(41)
        halves = [(0, cut.within(range(middle))), (middle, cut.within(range(middle, 40)))]
        got = [first + i for first, c in halves if c.ranges is not None for r in c.ranges for i in r]
        assert got == [i for r in ranges for i in r]


@pytest.mark.parametrize("name", TINY)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    """6 heads, 2 key heads, 44 or 28 inner columns, 97 words, 5 experts."""
    save(name, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    for size in (2, 3, 4, 5, 6):
        found = check(checkpoint, size)
        for laid in found:
            assert laid.local.num_heads % laid.local.num_kv_heads == 0
    if "experts" not in str(TINY[name]):
        with pytest.raises(ConfigError, match="enable_expert_parallel: a .* model has no experts"):
            layouts(checkpoint, 2, enable_expert_parallel=True)
        return
    for size in (2, 3, 5):
        found = check(checkpoint, size, enable_expert_parallel=True)
        assert [len(laid.share(r).experts) for r, laid in enumerate(found)] == {2: [3, 2], 3: [2, 2, 1], 5: [1] * 5}[
            size
        ]
    with pytest.raises(ConfigError, match="6 ranks cannot share 5 experts"):
        layouts(checkpoint, 6, enable_expert_parallel=True)


@pytest.mark.parametrize("name", [n for n in MODELS if "27b" not in n])
def test_every_gguf(name: str, tmp_path: Path) -> None:
    """Rows of queries and keys that lie in another order, and an expert as a tensor of its own."""
    arch, config = build(name, tmp_path / "hf")
    checkpoint = open_checkpoint(
        to_gguf(arch, config, open_checkpoint(tmp_path / "hf"), tmp_path / "m.gguf", lambda w: None)
    )
    for size in (2, 3):
        check(checkpoint, size)
        if config.to_dict().get("num_experts_per_tok"):
            check(checkpoint, size, enable_expert_parallel=True)


@pytest.mark.parametrize("format", MADE)
@pytest.mark.parametrize("name", ["llama-biases-tied", "phi3", "gpt_oss", "qwen3_moe", "mixtral"])
def test_every_format_that_is_made(name: str, format: str, tmp_path: Path) -> None:
    """Packed in the files, and packed while it loads. 160 or 64 columns make 5 or 2 blocks."""
    blocks.make(name, tmp_path / "whole")
    quantize(tmp_path / "whole", tmp_path / "packed", to=format)
    whole, packed = (open_checkpoint(tmp_path / n) for n in ("whole", "packed"))
    for size in (2, 3):
        few = name == "qwen3_moe" and format != "int8" and size == 3
        for checkpoint, asked in ((packed, "auto"), (whole, format)):
            if few:
                with pytest.raises(ConfigError, match=r"3 ranks cannot share 64 columns inside an expert"):
                    check(checkpoint, size, quantization=asked)
            elif format == "int8":
                check(checkpoint, size, quantization=asked)
            else:
                check(checkpoint, size, quantization=asked)
            if "moe" in name or name in ("gpt_oss", "mixtral"):
                check(checkpoint, size, quantization=asked, enable_expert_parallel=True)


def test_published_mxfp4(tmp_path: Path) -> None:
    """Rows of gate and up alternate in the file; five blocks of 32 columns for two to five ranks."""
    with pytest.MonkeyPatch.context() as patch:
        kind, changes = TINY["gpt_oss"]
        patch.setitem(TINY, "gpt_oss", (kind, changes | {"hidden_size": 192, "intermediate_size": 160, "head_dim": 32}))
        save("gpt_oss", tmp_path)
    publish(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    for size in (2, 3, 5):
        check(checkpoint, size)
        check(checkpoint, size, enable_expert_parallel=True)
        check(checkpoint, size, quantization="dequantize")
    with pytest.raises(
        ConfigError, match=r"layers.0.mlp.down.weight in mxfp4 cannot be cut within 32 inputs; take 5 ranks"
    ):
        check(checkpoint, 6)


GPT_OSS = {
    "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 2, "vocab_size": 201088,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 128, "num_experts_per_tok": 4,
    "sliding_window": 128, "quantization_config": {"quant_method": "mxfp4"}, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize("size", [2, 3, 4, 7, 8, 16])
def test_90_blocks(size: int, tmp_path: Path) -> None:
    """The real sizes of gpt-oss-120b, from config.json alone: 90 blocks of 32 columns; a key head for 8 query heads."""
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS))
    found = check(open_random(tmp_path), size, weights="random")
    inner = [laid.local.moe_intermediate_size for laid in found]
    assert (
        sum(inner) == 2880
        and {i // 32 for i in inner} <= {90 // size, -(-90 // size)}
        and not any(i % 32 for i in inner)
    )
    for laid in found:
        for item in laid.loads:
            if item.to.endswith("down.weight"):
                (p,) = item.parts()
                assert p.format == "mxfp4" and p.local[-1] % 32 == 0
    if 64 % size == 0:
        assert [laid.local.num_kv_heads for laid in found] == [max(1, 8 // size)] * size
    spread = layouts(open_random(tmp_path), size, weights="random", enable_expert_parallel=True)
    assert sum(len(laid.share(r).experts) for r, laid in enumerate(spread)) == 128


def test_random_weights_where_only_some_layers_are_a_mixture(tmp_path: Path) -> None:
    """A dense layer has 88 inner columns and an expert 28, under the same name: each is cut by its own width."""
    config = {
        "model_type": "qwen3_moe", "hidden_size": 60, "intermediate_size": 88, "moe_intermediate_size": 28, "vocab_size": 97,
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 5,
        "num_experts_per_tok": 3, "mlp_only_layers": [1], "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    inside = check(open_random(tmp_path), 2, weights="random")
    whole = check(open_random(tmp_path), 2, weights="random", enable_expert_parallel=True)
    for found, experts in ((inside, [(5, 28, 60)] * 2), (whole, [(3, 56, 60), (2, 56, 60)])):
        rows = [{p.to: p.cut.shape(p.shape) for p in laid.loads if p.to.endswith("gate_up.weight")} for laid in found]
        assert [r["layers.0.mlp.gate_up.weight"] for r in rows] == experts
        assert [r["layers.1.mlp.gate_up.weight"] for r in rows] == [(88, 60)] * 2


LLAMA = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 1, "vocab_size": 50,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip


def k_quants(path: Path, config: dict[str, Any], other: str) -> Checkpoint:
    """Blocks of 256, as llama.cpp mixes them: some matrices in Q4_K, those named so in `other`."""
    hidden, inner, keys = config["hidden_size"], config["intermediate_size"], config["num_key_value_heads"] * 64
    layer = "model.layers.0."
    matrices = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    norms = ("model.norm", layer + "input_layernorm", layer + "post_attention_layernorm")
    tensors: dict[str, TensorInfo] = {}
    with path.open("wb") as file:

        def put(name: str, dtype: str, shape: tuple[int, ...], data: bytes, heads: int | None = None) -> None:
            name += ".weight"
            tensors[name] = TensorInfo(name, dtype, shape, len(data), path, file.tell(), heads)
            file.write(data)

        for i, (name, shape) in enumerate(matrices.items()):
            format = other if name.endswith(("v_proj", "up_proj")) else "Q4_K"
            heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}.get(name[10])
            put(layer + name, format, shape, super_blocks(format, *shape, seed=i).tobytes(), heads)
        for name in norms:
            put(name, "F32", (hidden,), torch.randn(hidden).numpy().tobytes())
        for name in ("model.embed_tokens", "lm_head"):
            put(name, "F32", (50, hidden), torch.randn(50, hidden).numpy().tobytes())
    return Checkpoint(path, "gguf", config | {"tie_word_embeddings": False}, tensors)


@pytest.mark.parametrize("other", ["Q4_K", "Q6_K"])
def test_k_quants_and_parts_of_different_formats(other: str, tmp_path: Path) -> None:
    """A block of 256 columns is four heads of 64: two ranks have as many each; of three blocks inside one has two."""
    found = check(k_quants(tmp_path / "m.gguf", LLAMA, other), 2)
    assert [laid.local.num_heads for laid in found] == [4, 4]
    assert [laid.local.intermediate_size for laid in found] == [512, 256]
    parts = next(len(list(item.parts())) for item in found[1].loads if item.to.endswith("qkv.weight"))
    assert parts == (1 if other == "Q4_K" else 2)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (LLAMA, "attention.out.weight in Q4_K"),
        (LLAMA | {"num_attention_heads": 32, "hidden_size": 2048}, "mlp.down.weight in Q4_K"),
    ],
)
def test_a_block_that_would_be_cut_is_an_error_that_names_it(
    config: dict[str, Any], named: str, tmp_path: Path
) -> None:
    checkpoint = k_quants(tmp_path / "m.gguf", config, "Q4_K")
    with pytest.raises(
        ConfigError, match=f"ranks cannot share .* as layers.0.{named} cannot be cut within 256 inputs; take"
    ):
        layouts(checkpoint, 4)


def test_cuts_of_every_format_by_hand() -> None:
    """formats.cut against numbers that are cut; what shares a scale is refused."""
    torch.manual_seed(0)
    values = torch.randn(3, 8, 192)
    for format, unit in (("dense", 1), ("int8", 1), ("mxfp4", 32), ("int4", 64)):
        whole = (
            formats.Weight("dense", values, (3, 8, 192)) if format == "dense" else formats.encode(values, format, 64)
        )
        plain = formats.decode(whole, F32)
        for dim, ranges in (
            (1, [range(unit), range(2 * unit, 3 * unit)]),
            (2, [range(2), range(5, 8)]),
            (3, [range(1, 3)]),
        ):
            got = formats.cut(whole, dim, ranges)
            want = torch.cat([plain.narrow(3 - dim, r.start, len(r)) for r in ranges], 3 - dim)
            assert got.shape == tuple(want.shape) and torch.equal(formats.decode(got, F32), want)
        if unit > 1:
            with pytest.raises(ValueError, match=f"{format} cannot be cut within {unit} inputs"):
                formats.cut(whole, 1, [range(unit // 2)])
    for format in ("Q4_K", "Q6_K"):
        rows = torch.from_numpy(super_blocks(format, 4, 768, seed=3))
        whole = formats.Weight(format, rows, (4, 768))
        got = formats.cut(whole, 1, [range(256, 768)])
        assert torch.equal(formats.decode(got, F32), formats.decode(whole, F32)[:, 256:])
        assert got.data.shape[1] == 2 * BLOCKS[format][2]
        with pytest.raises(ValueError, match="256"):
            formats.cut(whole, 1, [range(128, 768)])


def test_sizes_at_random() -> None:
    """Any number of heads, key heads, inner columns, experts and words, in units or not."""
    draw, done = random.Random(5), 0
    base = ModelConfig.from_hf(LLAMA)
    for _ in range(600):
        kv, each, dim = draw.randrange(1, 9), draw.randrange(1, 9), draw.choice([8, 64])
        inner, unit = draw.randrange(1, 400), draw.choice([1, 1, 16, 32])
        config = ModelConfig.from_hf(
            LLAMA | {"num_key_value_heads": kv, "num_attention_heads": kv * each, "head_dim": dim,
                     "intermediate_size": inner, "vocab_size": draw.randrange(60, 99)}
        )  # fmt: skip
        size, units = draw.randrange(2, 9), Units(Unit(draw.choice([1, 1, 2])), Unit(unit))
        try:
            shares = [share_of(config, Ranks(r, size), units) for r in range(size)]
        except ConfigError:
            assert min(-(-config.num_heads // units.heads.size), -(-inner // unit)) < size
            continue
        done += 1
        for r, share in enumerate(shares):
            local = local_config(config, share)
            group = local.num_heads // local.num_kv_heads
            assert local.num_heads == group * local.num_kv_heads
            # every query head finds its own key head
            assert [share.kv_heads[i // group] for i in range(local.num_heads)] == [h // each for h in share.heads]
            for to, shape in (
                ("layers.0.attention.qkv.weight", ((kv * (each + 2)) * dim, 512)),
                ("layers.0.mlp.down.weight", (512, inner)),
            ):
                cut = cut_of(to, None, shape, config, share, Ranks(r, size))
                assert math.prod(cut.shape(shape)) > 0
    assert done > 200 and base.num_heads == 8
