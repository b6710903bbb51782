"""Spoil small checkpoints in thousands of ways; each must open, or end in a SlipstreamError, in little time and memory.

Run as a program in a process of its own, whose memory is limited before the first case:

    python tests/checkpoint/fuzz.py {header,index,config,packed,gguf,flood} FIRST COUNT

Prints one JSON object: how many opened, how many were refused, the slowest case and its seconds of CPU, the peak of
memory, and what went wrong.
A case is its number: the same number is the same file on every machine.
"""

from __future__ import annotations

import copy
import json
import math
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from slipstream.checkpoint.files import MAX_COLONS, MAX_COLONS_HEADER, MAX_MARKS, MAX_MARKS_HEADER, MAX_TENSORS
from slipstream.checkpoint.gguf import MAX_ITEMS
from slipstream.checkpoint.open import Checkpoint, open_checkpoint
from slipstream.checkpoint.tensors import DENSE
from slipstream.config import ModelConfig
from slipstream.errors import SlipstreamError

MEMORY = 1 << 30
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 71, "hidden_size": 64, "head_dim": 16,
    "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_act": "silu", "max_position_embeddings": 640, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "eos_token_id": [2, 5], "torch_dtype": "bfloat16", "sliding_window": 32,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"], "num_experts": 4,
    "num_experts_per_tok": 2, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
WEIGHTS = {"symmetric": True, "dynamic": False, "actorder": None, "block_structure": None, "type": "int"}
INT4 = WEIGHTS | {"num_bits": 4, "strategy": "group", "group_size": 32}
INT8 = WEIGHTS | {"num_bits": 8, "strategy": "channel", "group_size": None}
QUANTIZED: list[dict[str, Any]] = [
    {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    {
        "quant_method": "compressed-tensors", "format": "mixed-precision", "quantization_status": "compressed",
        "ignore": ["lm_head"], "kv_cache_scheme": None, "sparsity_config": {}, "transform_config": {}, "config_groups": {
            "a": {"targets": ["Linear"], "weights": INT4, "input_activations": None, "format": "pack-quantized"},
            "b": {"targets": ["re:.*up"], "weights": INT8, "format": "int-quantized"},
            "c": {"targets": ["x"], "weights": INT4 | {"type": "float"}, "format": "mxfp4-pack-quantized"},
        },
    },
]  # fmt: skip
MODEL_TYPES = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "gemma3", "phi3"]
MODEL_TYPES += ["olmo2", "smollm3", "gpt_oss", "mamba"]
# What a JSON text cannot be made of through json.dumps stands in it as a word that is replaced afterwards.
WORDS = {
    '"@deep"': "[" * 50_000 + "]" * 50_000,
    '"@wide"': "[" + "[]," * 30_000 + "[]]",
    '"@digits"': "9" * 6000,
    '"@nan"': "NaN",
    '"@infinity"': "-Infinity",
    '"@exponent"': "1e999",
    '"@surrogate"': '"\\ud800"',
    '"@comma"': "1,",
}
NASTY: list[Any] = [
    *WORDS, 0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 0.0, -0.5,
    1.5, 1e308, 5e-324, True, False, None, "", "a", "0", "F32", "BF16", "I64", "F8_E4M3", "Q4_0", "f32", "..",
    "../x.safetensors", "/etc/passwd", "a/b.safetensors", "a\0b.safetensors", "model-00001-of-00002.safetensors",
    "x" * 100_000, "\u202e", "é\n", [], {}, [[]], [0], [1, 2], [0, 0], [-1, 1], [2**62, 4], [0] * 1000, {"": 0},
    {"a": {"a": {"a": {}}}}, *MODEL_TYPES, "linear", "yarn", "longrope", "sliding_attention", "gelu", "float16",
    "torch.bfloat16",
]  # fmt: skip


def spots(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON value, as (container, key)."""
    found: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        holder = todo.pop()
        items = list(holder.items()) if isinstance(holder, dict) else list(enumerate(holder))
        for key, child in items:
            found.append((holder, key))
            if isinstance(child, (dict, list)):
                todo.append(child)
    return found


def spoil_json(value: Any, rng: random.Random) -> bytes:
    """Change the structure once to four times, then sometimes the text."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        places = spots(value)
        if not places:
            break
        holder, key = rng.choice(places)
        how = rng.randrange(8)
        nasty = copy.deepcopy(rng.choice(NASTY))
        if how < 3:
            holder[key] = nasty.strip('"') if isinstance(nasty, str) else nasty
        elif how == 3:
            del holder[key]
        elif how == 4:
            other, there = rng.choice(places)
            holder[key], other[there] = copy.deepcopy(other[there]), copy.deepcopy(holder[key])
        elif how == 5 and isinstance(holder, dict):
            name = nasty.strip('"') if isinstance(nasty, str) else str(nasty)
            holder[name] = holder.pop(key) if rng.random() < 0.5 else holder[key]
        elif how == 6 and isinstance(holder[key], (int, float)):
            holder[key] = rng.choice(
                (holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 2**40, str(holder[key]))
            )
        else:
            holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
    ascii_only = rng.random() < 0.8
    text = json.dumps(value, ensure_ascii=ascii_only)
    for word, raw in WORDS.items():
        text = text.replace(word, raw)
    if rng.random() < 0.1:  # a key twice
        text = text.replace(": ", ': 1, "a": 2, "a": ', 1) if rng.random() < 0.5 else "{" + text[1:-1] + "," + text[1:]
    raw_bytes = text.encode("utf-8", "surrogatepass")
    return spoil_bytes(raw_bytes, rng) if rng.random() < 0.2 else raw_bytes


def spoil_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Flip bits, cut, repeat, insert, put huge numbers."""
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 5))):
        if not out:
            break
        at = rng.randrange(len(out))
        how = rng.randrange(6)
        if how < 2:
            out[at] ^= 1 << rng.randrange(8)
        elif how == 2:
            del out[at : at + rng.choice((1, 4, 8, len(out)))]
        elif how == 3:
            out[at:at] = rng.randbytes(rng.choice((1, 4, 8, 100)))
        elif how == 4:
            out[at:at] = out[at : at + 64]
        else:
            out[at : at + 8] = struct.pack(
                "<Q", rng.choice((0, 1, 2**16, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 1))
            )
    return bytes(out)


def frame(header: bytes, data: bytes, rng: random.Random) -> bytes:
    """A safetensors file around a header; sometimes with a wrong length or wrong data."""
    length = len(header)
    if rng.random() < 0.1:
        length = rng.choice((0, 1, length - 1, length + 1, 2**24, 2**24 + 1, 100 << 20, 2**63, 2**64 - 1))
    if rng.random() < 0.1:
        data = rng.choice((b"", data[:-1], data + b"x", data * 2, data[: len(data) // 2]))
    return length.to_bytes(8, "little") + header + data


def arrays(rng: random.Random) -> dict[str, np.ndarray]:
    return {
        "model.embed_tokens.weight": np.ones((71, 8), np.float32),
        "model.layers.0.mlp.up_proj.weight": np.ones((3, rng.randrange(4)), np.float16),
        "lm_head.weight": np.zeros((), np.int64),
        "x": np.zeros(5, np.uint8),
    }


def split(file: Path) -> tuple[Any, bytes]:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def make_header(folder: Path, rng: random.Random) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    file = folder / "model.safetensors"
    save_file(arrays(rng), file, metadata={"format": "pt"})
    if rng.random() < 0.2:
        file.write_bytes(spoil_bytes(file.read_bytes(), rng))
        return
    header, data = split(file)
    file.write_bytes(frame(spoil_json(header, rng), data, rng))


def make_index(folder: Path, rng: random.Random) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    weight_map = {}
    for i, (name, value) in enumerate(arrays(rng).items()):
        file = f"model-0000{i % 2 + 1}-of-00002.safetensors"
        weight_map.setdefault(file, {})[name] = value  # type: ignore[arg-type]
    for file, tensors in weight_map.items():
        save_file(tensors, folder / file)
    index = {"metadata": {"total_size": 9}, "weight_map": {n: f for f, names in weight_map.items() for n in names}}
    (folder / "model.safetensors.index.json").write_bytes(spoil_json(index, rng))
    if rng.random() < 0.15:
        file = rng.choice(sorted(weight_map))
        how = rng.randrange(4)
        if how == 0:
            (folder / file).unlink()
        elif how == 1:
            (folder / file).rename(folder.parent / "outside")
            (folder / file).symlink_to("../outside")
        elif how == 2:
            shutil.copy(folder / file, folder / "model-00003-of-00003.safetensors")
        else:
            header, data = split(folder / file)
            (folder / file).write_bytes(frame(spoil_json(header, rng), data, rng))


def packed(file: Path, method: int) -> None:
    """Weights as QUANTIZED[method] says, without a fault."""
    a, b, c, x = "a.weight", "b.weight", "c.weight", "x_proj"
    u8, i32, bf16 = np.uint8, np.int32, np.uint16
    shapes: list[dict[str, tuple[tuple[int, ...], Any]]] = [
        {x + "_blocks": ((3, 5, 2, 16), u8), x + "_scales": ((3, 5, 2), u8), x + "_bias": ((3, 5), bf16)},
        {
            a + "_packed": ((3, 8), i32), a + "_scale": ((3, 2), bf16), a + "_shape": ((2,), np.int64),
            b: ((5, 7), np.int8), b + "_scale": ((5, 1), bf16),
            c + "_packed": ((7, 48), u8), c + "_scale": ((7, 3), u8), "d.weight": ((3, 4), bf16),
        },
    ]  # fmt: skip
    save_file({name: np.ones(shape, dtype) for name, (shape, dtype) in shapes[method].items()}, file)
    header, data = split(file)
    text = json.dumps(header).replace('"U16"', '"BF16"').encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def make_packed(folder: Path, rng: random.Random) -> None:
    method, file = rng.randrange(2), folder / "model.safetensors"
    packed(file, method)
    header, data = split(file)
    config = CONFIG | {"quantization_config": QUANTIZED[method]}
    raw = json.dumps(config).encode()
    if rng.random() < 0.4:
        raw = b"%s, %s}" % (
            json.dumps(CONFIG).encode()[:-1],
            b'"quantization_config": ' + spoil_json(QUANTIZED[method], rng),
        )
    elif rng.random() < 0.5:
        file.write_bytes(frame(spoil_json(header, rng), data, rng))
    else:  # what still is a safetensors file: parts that do not fit each other
        for _ in range(rng.choice((1, 1, 2))):
            name = rng.choice(sorted(header))
            entry, how = header.pop(name), rng.randrange(4)
            shape = entry["shape"]
            if how == 0:
                rng.shuffle(shape)
            elif how == 1:
                entry["shape"] = rng.choice(([*shape, 1], [1, *shape], [math.prod(shape)], [*shape, 0, 2**62]))
            elif how == 2:
                entry["dtype"] = rng.choice(["U8", "I8", "BF16", "I32", "F16", "F8_E8M0", "I64"])
            name = name if how < 3 else rng.choice((name + "_scale", name[:-1], "y", "b.weight", "a.weight_zero_point"))
            header[name] = entry
        end = 0
        for entry in header.values():
            size = math.prod(entry["shape"]) * DENSE[entry["dtype"]][0]
            entry["data_offsets"], end = [end, end + size], end + size
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    (folder / "config.json").write_bytes(raw)


def make_config(folder: Path, rng: random.Random) -> None:
    config, file = CONFIG | {"model_type": rng.choice(MODEL_TYPES)}, folder / "model.safetensors"
    if rng.random() < 0.3:
        packed(file, 0)
        config["quantization_config"] = QUANTIZED[0]
    else:
        save_file({"x": np.zeros(5, np.uint8)}, file)
    (folder / "config.json").write_bytes(spoil_json(config, rng))
    if rng.random() < 0.1:
        (folder / "generation_config.json").write_bytes(spoil_json({"eos_token_id": [1, 2], "top_p": 0.9}, rng))


Field = tuple[str, int, Any]  # key, type, value; an array's value is (type, count, values)


def encode(kind: int, value: Any) -> bytes:
    if kind == 8:
        raw = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(raw)) + raw
    if kind == 9:
        inner, count, values = value
        return struct.pack("<IQ", inner, count) + b"".join(encode(inner, v) for v in values)
    form = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}.get(kind)
    if form is None:
        return b"\0" * 8
    if form in "fd":
        return struct.pack("<" + form, value)
    size = 8 * struct.calcsize(form)
    return struct.pack("<" + form.upper(), int(value) % 2**size)


def make_gguf(folder: Path, rng: random.Random) -> None:
    file = folder / "m.gguf"
    if rng.random() < 0.3:
        by_library(file)
        file.write_bytes(spoil_bytes(file.read_bytes(), rng))
        return
    arch = rng.choice(
        ("llama", "llama", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3", "olmo2", "gpt-oss", "x")
    )
    fields: list[list[Any]] = [["general.architecture", 8, arch]]
    numbers = {
        "block_count": 1, "context_length": 640, "embedding_length": 64, "feed_forward_length": 96, "vocab_size": 7,
        "attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 16, "attention.key_length": 16,
    }  # fmt: skip
    moe = arch in ("qwen3moe", "gpt-oss") or (arch == "llama" and rng.random() < 0.3)
    if moe:
        numbers |= {"expert_count": 3, "expert_used_count": 2}
        numbers |= {"expert_feed_forward_length": 32} if arch != "llama" else {}
    if arch in ("gemma2", "gemma3", "gpt-oss") or (arch in ("llama", "phi3") and rng.random() < 0.3):
        numbers |= {"attention.sliding_window": 32, "rope.scaling.original_context_length": 64}
    fields += [[f"{arch}.{key}", 4, value] for key, value in numbers.items()]
    fields += [[f"{arch}.attention.layer_norm_rms_epsilon", 6, 1e-5], [f"{arch}.rope.freq_base", 6, 1e4]]
    fields += [["tokenizer.ggml.tokens", 9, [8, 7, ["a", "b", "<s>", "é", "", "d", "e"]]]]
    fields += [["tokenizer.ggml.scores", 9, [6, 7, [0.5] * 7]], ["tokenizer.ggml.eos_token_id", 4, 2]]
    if rng.random() < 0.2:
        fields += [["general.alignment", 4, 64]]
    tensors: list[list[Any]] = [["token_embd.weight", [64, 7], 0], ["blk.0.attn_q.weight", [64, 64], 8]]
    tensors += [["blk.0.attn_norm.weight", [64], 0], ["output_norm.weight", [64], 1]]
    tensors += [["blk.0.ffn_up_exps.weight", [64, 32, 3], 1]] if moe else []
    tensors += [["rope_freqs.weight", [8], 0]] if rng.random() < 0.3 else []
    sizes = {0: 4.0, 1: 2.0, 8: 34 / 32}
    offset, align = 0, 64 if len(fields) and fields[-1][0] == "general.alignment" else 32
    for tensor in tensors:
        tensor.append(offset)
        offset += -(-int(np.prod(tensor[1]) * sizes[tensor[2]]) // align) * align
    counts = [len(tensors), len(fields)]
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        spoil_gguf(fields, tensors, counts, rng)
    head = b"GGUF" + struct.pack("<IQQ", rng.choice((2, 3, 3, 3)), *(c % 2**64 for c in counts))
    body = b"".join(encode(8, key) + struct.pack("<I", kind) + encode(kind, value) for key, kind, value in fields)
    for name, dims, kind, at in tensors:
        body += encode(8, name) + struct.pack("<I", len(dims)) + b"".join(struct.pack("<Q", d % 2**64) for d in dims)
        body += struct.pack("<IQ", kind % 2**32, at % 2**64)
    raw = head + body
    raw += b"\0" * (-len(raw) % align) + b"\0\0\x80\x3f" * (offset // 4)
    file.write_bytes(raw if rng.random() < 0.9 else raw[: rng.randrange(len(raw))])


HUGE = (0, 1, -1, 3, 5, 63, 65, 2**16, 2**24, 2**31, 2**32 - 1, 2**40, 2**61, 2**63, 2**64 - 1)
STRINGS = (
    "",
    "a",
    "llama",
    "yarn",
    "linear",
    "longrope",
    b"\xff\xfe",
    "\u202e\0",
    "x" * 70_000,
    "general.architecture",
)


def spoil_gguf(fields: list[list[Any]], tensors: list[list[Any]], counts: list[int], rng: random.Random) -> None:
    how = rng.randrange(12)
    field, tensor = rng.choice(fields), rng.choice(tensors)
    if how < 3:
        field[1], field[2] = rng.choice(
            ((4, rng.choice(HUGE)), (10, rng.choice(HUGE)), (5, -1), (8, rng.choice(STRINGS)))
        )
    elif how == 3:
        field[1], field[2] = rng.choice(
            ((6, float("nan")), (6, float("inf")), (6, -1.0), (12, 1e300), (12, 5e-324), (7, 2))
        )
    elif how == 4:
        inner, items = rng.choice((0, 4, 6, 7, 8, 9, 13)), rng.choice((0, 1, 3, 1000))
        values: list[Any] = [[4, 1, [1]]] * items if inner == 9 else [1] * items
        field[1], field[2] = 9, [inner, rng.choice((items, items, *(h % 2**64 for h in HUGE))), values]
    elif how == 5:
        field[0] = rng.choice(
            (rng.choice(fields)[0], "", "a\0b", "general.alignment", "split.count", "llama.rope.scaling.type")
        )
    elif how == 6:
        counts[rng.randrange(2)] = rng.choice((*HUGE, counts[0] + 1, counts[1] + 1))
    elif how == 7:
        tensor[1] = rng.choice(([], [0], [1] * 5, [2**32, 2**32], [2**63, 2], tensor[1][::-1], [*tensor[1], 1], [64]))
    elif how == 8:
        tensor[3] = rng.choice((*HUGE, tensor[3] + 1, tensor[3] + 32, rng.choice(tensors)[3]))
    elif how == 9:
        tensor[2] = rng.choice((*range(45), 2**31, -1))
    elif how == 10:
        names = (
            rng.choice(tensors)[0],
            "",
            "x",
            "blk.99.attn_q.weight",
            "blk.0.attn_q.bias",
            "rope_freqs.weight",
            "a\n",
        )
        tensor[0] = rng.choice(names)
    elif len(fields) > 1:
        fields.remove(field)
        counts[1] -= 1


def by_library(file: Path) -> None:
    writer = gguf.GGUFWriter(file, "llama")
    for key in ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"):
        writer.add_uint32(f"llama.{key}", 1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "def"])
    writer.add_tensor("token_embd.weight", np.ones((3, 8), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(8, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Repeated until the file is as large as the cap lets it be.
FLOODS = (
    b"[],", b"{},", b"1,", b"0.5,", b'"",', b'"\\ud800",', b"[1],", b'{"":0},', b'"a":1,', b'"%x":0,', b'"%x":[],',
    b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},', b"[" * 30 + b"]" * 30 + b",", "\U0001f600".encode(),
)  # fmt: skip


def flood(piece: bytes, colons: int, marks: int) -> bytes:
    """JSON of 16 MB, or of as many commas, colons and brackets as are let through."""
    in_piece = sum(map(piece.count, (b",", b":", b"[", b"{")))
    times = min(((16 << 20) - 100) // (len(piece) + 4 * piece.count(b"%")), (marks - 10) // max(in_piece, 1))
    times = min(times, (colons - 10) // max(piece.count(b":"), 1)) if b":" in piece else times
    body = b"".join(piece % i for i in range(times)) if b"%" in piece else piece * times
    if piece.startswith(b'"') and b":" in piece:
        return b"{" + body[:-1] + b"}"
    if piece[0] > 127:
        return b'{"__metadata__":{"a":"' + body + b'"}}'
    return b'{"a":[' + body[:-1] + b"]}"


def flood_packed(folder: Path, case: int) -> None:
    """More packed weights than models have, or as many groups as JSON may hold."""
    groups = {str(i): QUANTIZED[1]["config_groups"]["c"] for i in range(15_000 if case else 1)}
    said = QUANTIZED[1] | {"config_groups": groups}
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": said}))
    count = 10 if case else 30_000
    header: dict[str, Any] = {}
    for i in range(count):
        header[f"{i}.weight_packed"] = {"dtype": "U8", "shape": [1, 32], "data_offsets": [34 * i, 34 * i + 32]}
        header[f"{i}.weight_scale"] = {"dtype": "U8", "shape": [1, 2], "data_offsets": [34 * i + 32, 34 * i + 34]}
    text = json.dumps(header, separators=(",", ":")).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(34 * count))


def make_flood(folder: Path, case: int) -> None:
    """The slowest files we can think of, at the size of the caps."""
    if case < 2 * len(FLOODS):
        piece = FLOODS[case // 2]
        (folder / "config.json").write_bytes(
            flood(piece, MAX_COLONS, MAX_MARKS) if case % 2 else json.dumps(CONFIG).encode()
        )
        header = flood(piece, MAX_COLONS_HEADER, MAX_MARKS_HEADER)
        (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        return
    case -= 2 * len(FLOODS)
    if case < 2:
        flood_packed(folder, case)
        return
    case -= 2
    kinds = (8, 0, 4, 12, 7)
    numbers = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
    fields: list[list[Any]] = [["general.architecture", 8, "llama"], *([f"llama.{n}", 4, 1] for n in numbers)]
    fields += [["llama.attention.layer_norm_rms_epsilon", 6, 1e-5], ["general.alignment", 4, 32]]
    body = b"".join(encode(8, key) + struct.pack("<I", kind) + encode(kind, value) for key, kind, value in fields)
    count, tensors = len(fields), 1
    if case < len(kinds):
        items = bytes(8) * MAX_ITEMS if kinds[case] == 8 else b"\1" * {0: 1, 4: 4, 12: 8, 7: 1}[kinds[case]] * MAX_ITEMS
        body += encode(8, "a") + struct.pack("<IIQ", 9, kinds[case], MAX_ITEMS) + items
        count += 1
    elif case == len(kinds):
        text = struct.pack("<Q", 8) + b"abcdefgh"
        body += encode(8, "a") + struct.pack("<IIQ", 9, 8, MAX_ITEMS) + text * MAX_ITEMS
        count += 1
    else:
        tensors = MAX_TENSORS
        name = [b"%06d" % i for i in range(tensors)]
        body += b"".join(encode(8, n) + struct.pack("<IQIQ", 1, 8, 0, 32 * i) for i, n in enumerate(name))
    if tensors == 1:
        body += encode(8, "token_embd.weight") + struct.pack("<IQQIQ", 2, 1, 8, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + body
    (folder / "m.gguf").write_bytes(head + b"\0" * (-len(head) % 32 + 32 * tensors))


NUM_FLOODS = 2 * len(FLOODS) + 9


MAKE: dict[str, Callable[[Path, random.Random], None]] = {
    "header": make_header,
    "index": make_index,
    "config": make_config,
    "packed": make_packed,
    "gguf": make_gguf,
}


def check(found: Checkpoint, kind: str) -> None:
    """What opened must hold together; a file that the safetensors library refuses must not have opened."""
    for name, t in found.tensors.items():
        assert t.name == name and t.nbytes == (sum(p.nbytes for p in t.parts) or t.nbytes), name
        for p in t.parts or (t,):
            assert p.offset >= 0 and p.offset + p.nbytes <= p.file.stat().st_size, name
        if t.parts:
            weight = found.read_weight(name)
            assert weight.format == t.dtype and weight.shape == t.shape and weight.nbytes == t.nbytes, name
    if kind in ("header", "index"):
        for file in {t.file for t in found.tensors.values()}:
            with safe_open(file, "numpy") as theirs:
                ours = {n: list(t.shape) for n, t in found.tensors.items() if t.file == file}
                assert {n: theirs.get_slice(n).get_shape() for n in theirs.keys()} == ours  # noqa: SIM118


def run(kind: str, first: int, count: int) -> dict[str, Any]:
    result: dict[str, Any] = {"opened": 0, "refused": 0, "seconds": 0.0, "slowest": None, "faults": []}
    for case in range(first, first + count):
        with tempfile.TemporaryDirectory() as top:
            folder = Path(top) / "model"
            folder.mkdir()
            rng = random.Random(f"{kind} {case}")
            make_flood(folder, case) if kind == "flood" else MAKE[kind](folder, rng)
            start = time.process_time()
            try:
                found = open_checkpoint(folder)
                for key in found.metadata:
                    found.metadata[key]
                if kind in ("config", "gguf"):
                    ModelConfig.from_hf(found.config)
                fault, opened = None, True
            except SlipstreamError as e:
                fault, opened = None, False
                if len(str(e).encode()) > 3000:  # encode: no half surrogates that could not be printed
                    fault = "a message of over 3000 bytes"
            except Exception as e:  # anything else is what this program looks for
                fault, opened = f"{type(e).__name__}: {str(e)[:300]}", False
            took = time.process_time() - start
            if opened:
                try:
                    check(found, kind)
                except Exception as e:
                    fault = f"opened, but {type(e).__name__}: {str(e)[:300]}"
            result["opened" if opened else "refused"] += 1
            if took > result["seconds"]:
                result["seconds"], result["slowest"] = took, case
            if fault:
                result["faults"].append(f"{kind} {case}: {fault}")
    result["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return result


if __name__ == "__main__":
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
    )
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
