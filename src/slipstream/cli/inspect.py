"""`slipstream inspect`: what a checkpoint is, from its headers alone. Neither weights nor torch are loaded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from slipstream.cli.options import AsJson, Model
from slipstream.cli.show import Bar, Table, number, print_json, print_tables, size
from slipstream.errors import CheckpointError

if TYPE_CHECKING:
    from slipstream.checkpoint.open import Checkpoint
    from slipstream.config import ModelConfig

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def inspect(model: Model, as_json: AsJson = False) -> None:
    """Say what a checkpoint is, without loading it.

    Architecture, parameters, quantization, layers, KV cache and tokenizer, from the headers alone. A model that is not
    here yet is fetched first.
    """
    from slipstream.checkpoint.open import open_checkpoint
    from slipstream.config import ModelConfig
    from slipstream.sources import resolve

    with Bar() as bar:
        path = resolve(model, progress=bar)
    checkpoint = open_checkpoint(path)
    found = facts(checkpoint, ModelConfig.from_hf(checkpoint.config))
    if as_json:
        print_json({"model": model, **found})
    else:
        print_tables(_tables(model, found))


def facts(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, Any]:
    """All that `inspect` says, as plain values."""
    from slipstream.cache.spec import group_layers

    tensors = checkpoint.tensors.values()
    rope = next((layer.rope for layer in config.layers if layer.rope), None)
    groups = group_layers(config)
    quantized = _quantized(checkpoint)
    dtype = "bfloat16" if quantized else config.dtype
    return {
        "path": checkpoint.path,
        "format": checkpoint.kind,
        "architecture": config.model_type,
        "parameters": sum(prod(t.shape) for t in tensors),
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint.total_bytes,
        "weights": _weights(checkpoint),
        "dtype": dtype,
        "quantization": quantized or config.quantization,
        "not_runnable_because": _refusal(checkpoint, config),
        "layers": config.num_layers,
        "layer_types": dict(Counter(layer.kind for layer in config.layers)),
        "window": next((layer.window for layer in config.layers if layer.window), None),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "experts": config.num_experts,
        "experts_per_token": config.num_experts_per_tok,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rope": {"kind": rope.kind, "theta": rope.theta, "factor": rope.factor} if rope else None,
        "tied_embeddings": config.tie_word_embeddings,
        "kv_bytes_per_token": {
            name: {
                "per_layer": 2 * config.num_kv_heads * config.head_dim * width,
                "in_all": sum(g.bytes_per_token(width) for g in groups),
            }
            for name, width in _DTYPE_BYTES.items()
            if name in ("bfloat16", dtype)
        },
        "tokenizer": _tokenizer(checkpoint, config),
    }


def _refusal(checkpoint: Checkpoint, config: ModelConfig) -> str | None:
    """Why slipstream cannot run it, as far as headers tell."""
    from slipstream.checkpoint.support import refuse_quantized

    try:
        refuse_quantized(checkpoint, config.quantization)
    except CheckpointError as e:
        return str(e)
    return None


def _weights(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Tensors, parameters and bytes of each dtype, the largest first."""
    found: dict[str, list[int]] = {}
    for t in checkpoint.tensors.values():
        row = found.setdefault(t.dtype, [0, 0, 0])
        for i, n in enumerate((1, prod(t.shape), t.nbytes)):
            row[i] += n
    rows = [{"dtype": d, "tensors": n, "parameters": p, "bytes": b} for d, (n, p, b) in found.items()]
    return sorted(rows, key=lambda row: -int(row["bytes"]))


def _quantized(checkpoint: Checkpoint) -> str | None:
    """The format that most bytes of packed weights are in."""
    count: Counter[str] = Counter()
    for t in checkpoint.tensors.values():
        if t.is_quantized:
            count[t.dtype] += t.nbytes
    return count.most_common(1)[0][0] if count else None


def _tokenizer(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, Any]:
    """What the tokenizer is; a checkpoint without one can still be looked at."""
    from slipstream.tokenizer import Tokenizer

    try:
        if checkpoint.kind == "gguf":
            kind: Any = checkpoint.metadata.get("tokenizer.ggml.model")
            tokenizer = Tokenizer.from_gguf(checkpoint.metadata)
        else:
            tokenizer = Tokenizer.from_folder(checkpoint.path)
            spec = json.loads((checkpoint.path / "tokenizer.json").read_bytes())
            inner = spec.get("model") if isinstance(spec, Mapping) else None
            kind = inner.get("type") if isinstance(inner, Mapping) else None
    except CheckpointError as e:
        return {"error": str(e)}
    eos = checkpoint.generation_config.get("eos_token_id", ())
    ids = {*(eos if isinstance(eos, (list, tuple)) else (eos,)), *config.eos_token_ids, *tokenizer.eos_token_ids}
    return {
        "kind": kind,
        "vocab_size": tokenizer.vocab_size,
        "chat_template": tokenizer.chat_template is not None,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_ids": sorted(t for t in ids if isinstance(t, int)),
    }


def _tables(model: str, f: Mapping[str, Any]) -> list[Table]:
    layers = ", ".join(f"{n} {kind}" for kind, n in f["layer_types"].items())
    window = f", window of {f['window']:,} tokens" if f["window"] else ""
    rope = f["rope"]
    scaled = f", {rope['kind']} x {rope['factor']:g}" if rope and rope["kind"] != "default" else ""
    experts = f"{f['experts']}, of which {f['experts_per_token']} for each token" if f["experts"] else "none"
    rows = [
        ("architecture", f["architecture"]),
        ("parameters", f"{number(f['parameters'])} ({f['parameters']:,}) in {f['tensors']} tensors"),
        ("size", f"{size(f['bytes'])}, {f['format']}"),
        ("dtype", f["dtype"]),
        ("quantization", f["quantization"] or "none"),
        *([("cannot run", f["not_runnable_because"])] if f["not_runnable_because"] else []),
        ("layers", f"{f['layers']} ({layers}{window})"),
        ("hidden size", f"{f['hidden_size']:,}, in the MLP {f['intermediate_size']:,}"),
        ("heads", f"{f['heads']}, {f['kv_heads']} for keys and values, {f['head_dim']} wide"),
        ("experts", experts),
        ("vocabulary", f"{f['vocab_size']:,} tokens, {'tied' if f['tied_embeddings'] else 'not tied'} to the output"),
        ("context", f"{f['max_position_embeddings']:,} tokens"),
        ("rope", f"theta {rope['theta']:,.0f}{scaled}" if rope else "none"),
    ]
    rows += [
        (f"KV cache, {name}", f"{n['per_layer']:,} bytes a token a layer, {size(n['in_all'])} a token in all")
        for name, n in f["kv_bytes_per_token"].items()
    ]
    t = f["tokenizer"]
    if "error" in t:
        rows.append(("tokenizer", t["error"]))
    else:
        ends = ", ".join(map(str, t["eos_token_ids"])) or "none"
        rows += [
            ("tokenizer", f"{t['kind']}, {t['vocab_size']:,} tokens, ends with {ends}"),
            ("chat template", "yes" if t["chat_template"] else "no"),
        ]
    weights = [(w["dtype"], f"{w['tensors']:,}", number(w["parameters"]), size(w["bytes"])) for w in f["weights"]]
    columns = ("dtype", "tensors", "parameters", "size")
    return [Table(f"{model}: {f['path']}", rows), Table("Weights", weights, columns)]
