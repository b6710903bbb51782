"""Builds the tokenizer that GGUF metadata describes: byte-level or sentencepiece BPE, words cut as llama.cpp does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from slipstream.errors import CheckpointError

_MAX_TOKENS = 2_000_000
_T = TypeVar("_T")

# GGUF's token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

# How `tokenizer.ggml.pre` cuts text into words. The patterns are those that the models were trained with.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"


def _words(digits: str) -> str:
    return rf"{_CONTRACTION}|{_LEAD}\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased_words(digits: str, suffix: str) -> str:
    return (
        rf"{_LEAD}{_UPPER}*{_LOWER}+{suffix}|{_LEAD}{_UPPER}+{_LOWER}*{suffix}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


def _split(pattern: str) -> list[Any]:
    return [pre_tokenizers.Split(Regex(pattern), "isolated"), _byte_level(use_regex=False)]


def _byte_level(use_regex: bool = True) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


_STYLES: dict[str, Callable[[], list[Any]]] = {
    "gpt2": lambda: [_byte_level()],
    "single digits": lambda: [pre_tokenizers.Digits(individual_digits=True), _byte_level()],
    "falcon": lambda: [
        pre_tokenizers.Punctuation("contiguous"),
        _byte_level(),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ],
    "llama3": lambda: _split(_words(r"\p{N}{1,3}")),
    "qwen2": lambda: _split(_words(r"\p{N}")),
    "tekken": lambda: _split(_cased_words(r"\p{N}", "")),
    "o200k": lambda: _split(_cased_words(r"\p{N}{1,3}", f"{_CONTRACTION}?")),
}
_PRE = {
    **dict.fromkeys(("gpt-2", "gpt2", "olmo", "mpt", "jais", "trillion", "granite-docling"), "gpt2"),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "single digits"
    ),
    **dict.fromkeys(("default", "falcon"), "falcon"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"), "llama3"),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), "llama3"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez"), "qwen2"),
    "tekken": "tekken",
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), "o200k"),
}
# A word that is a token as it stands is taken whole, and a text starts with bos unless the file says otherwise.
_WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2", "tekken"}


def guard(what: str, work: Callable[[], _T]) -> _T:
    """Run the library on data from a checkpoint; whatever it makes of bad data becomes a CheckpointError."""
    try:
        return work()
    except CheckpointError:
        raise
    except BaseException as e:  # a panic in the library derives from BaseException alone
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{what}: {str(e)[:300]}") from e


def read_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What `Tokenizer` is made of, by the names of its parameters.

    Raises:
        CheckpointError: the metadata is incomplete, contradicts itself, or names a kind that is not known.
    """
    tokens = _array(metadata, "tokens", str)
    if not tokens:
        raise CheckpointError("the GGUF metadata has no tokenizer.ggml.tokens; the file holds no vocabulary")
    types = _array(metadata, "token_type", int, len(tokens)) or [_NORMAL] * len(tokens)
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"tokenizer.ggml.model is {kind!r}; known are 'gpt2' (byte-level BPE) and 'llama' (sentencepiece)"
        )
    if kind == "llama":  # sentencepiece writes its space mark even in tokens that are matched in the raw text
        tokens = [t.replace("▁", " ") if k == _USER_DEFINED else t for t, k in zip(tokens, types, strict=True)]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(t for i, t in enumerate(tokens) if vocab[t] != i)
        raise CheckpointError(f"tokenizer.ggml.tokens holds {twice!r} twice; a token must have one id")
    backend = guard("the GGUF tokenizer is not valid", lambda: _backend(metadata, vocab, types))

    def text_of(name: str, default: int | None = None) -> dict[str, str]:
        token_id = metadata.get(f"tokenizer.ggml.{name}_token_id", default)
        inside = isinstance(token_id, int) and 0 <= token_id < len(tokens)
        return {name: tokens[token_id]} if inside and isinstance(token_id, int) else {}

    spm = kind == "llama"
    names = {
        **text_of("bos", 1 if spm else None),
        **text_of("eos", 2 if spm else None),
        **text_of("unknown", 0 if spm else None),
    }
    names |= {**text_of("padding"), **text_of("separator"), **text_of("mask")}
    short = {"unknown": "unk", "padding": "pad", "separator": "sep"}
    ends = {**text_of("eot"), **text_of("eom")}
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", spm or metadata.get("tokenizer.ggml.pre") in _WHOLE_WORDS)
    return {
        "backend": backend,
        "byte_level": not spm,
        "strip_space": spm and _space_prefix(metadata),
        "special_tokens": {f"{short.get(n, n)}_token": t for n, t in names.items()},
        "eos_token_ids": [vocab[t] for t in ends.values()],
        "chat_templates": _templates(metadata),
        "edges": (bool(add_bos), bool(metadata.get("tokenizer.ggml.add_eos_token"))),
    }


def _backend(metadata: Mapping[str, Any], vocab: dict[str, int], types: list[int]) -> tokenizers.Tokenizer:
    kind = metadata["tokenizer.ggml.model"]
    backend = (_byte_level_backend if kind == "gpt2" else _sentencepiece_backend)(metadata, vocab, types)
    for special, kinds in ((True, (_CONTROL, _UNKNOWN)), (False, (_USER_DEFINED,))):
        # in the order of ids, and so of `types`
        found = [t for t, kind in zip(vocab, types, strict=True) if kind in kinds and t]
        tokens = [AddedToken(t, normalized=False, special=special) for t in found]
        (backend.add_special_tokens if special else backend.add_tokens)(tokens)
    return backend


def _byte_level_backend(metadata: Mapping[str, Any], vocab: dict[str, int], types: list[int]) -> tokenizers.Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE:
        raise CheckpointError(
            f"tokenizer.ggml.pre is {pre!r}, a way to cut words that is not known; known are {', '.join(_PRE)}"
        )
    merges: list[Any] = [tuple(m.split(" ")) for m in _array(metadata, "merges", str)]
    if not merges:
        raise CheckpointError("the GGUF metadata has no tokenizer.ggml.merges, which byte-level BPE needs")
    if set(map(len, merges)) != {2}:
        raise CheckpointError("tokenizer.ggml.merges must hold two tokens parted by one space in each entry")
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_WORDS))
    backend.pre_tokenizer = pre_tokenizers.Sequence(_STYLES[_PRE[pre]]())
    return backend


_LONGEST_TOKEN = 4096  # real ones have some dozens; the work below grows with the square


def _sentencepiece_backend(
    metadata: Mapping[str, Any], vocab: dict[str, int], types: list[int]
) -> tokenizers.Tokenizer:
    scores = _array(metadata, "scores", float, len(types))
    if not scores:
        raise CheckpointError("the GGUF metadata has no tokenizer.ggml.scores, which a sentencepiece vocabulary needs")
    merges: list[tuple[float, int, str, str]] = []
    for token, i in vocab.items():
        if types[i] != _NORMAL:
            continue
        if len(token) > _LONGEST_TOKEN:
            raise CheckpointError(
                f"token {i} has {len(token)} characters, more than {_LONGEST_TOKEN}; the file is damaged"
            )
        score = -scores[i]
        for cut in range(1, len(token)):
            left = token[:cut]
            if left in vocab and (right := token[cut:]) in vocab:
                merges.append((score, -cut, left, right))
    merges.sort(key=lambda m: m[:2])  # the best piece is made first; of its halves, the longer left one
    unknown = next((t for t, i in vocab.items() if types[i] == _UNKNOWN), None)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab, merges=[m[2:] for m in merges], unk_token=unknown, fuse_unk=True, byte_fallback=_BYTE in types
        )
    )
    space = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if _space_prefix(metadata) else space
    return backend


def _space_prefix(metadata: Mapping[str, Any]) -> bool:
    return bool(metadata.get("tokenizer.ggml.add_space_prefix", True))


def _array(metadata: Mapping[str, Any], name: str, kind: Callable[[Any], _T], length: int | None = None) -> list[_T]:
    """The metadata array as a list of one type; [] where there is none."""
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        return []
    try:
        if isinstance(value, (str, bytes)) or len(value) > _MAX_TOKENS:
            raise TypeError(f"not an array of at most {_MAX_TOKENS}")
        if kind is str:
            items = list(value)
            if not set(map(type, items)) <= {str}:
                raise TypeError("not strings")
        else:
            items = list(map(kind, value))
    except (TypeError, ValueError) as e:
        raise CheckpointError(f"tokenizer.ggml.{name} is damaged: {e}") from e
    if length is not None and len(items) != length:
        raise CheckpointError(f"tokenizer.ggml.{name} has {len(items)} entries for {length} tokens")
    return items


def _templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    key = "tokenizer.chat_template"
    names = [name for name in metadata if name == key or name.startswith(f"{key}.")]
    found = {name[len(key) + 1 :] or "default": metadata[name] for name in names}
    for name, value in found.items():
        if not isinstance(value, str):
            raise CheckpointError(f"the GGUF chat template {name!r} is not a string")
    return found
