"""Text to token ids and back: a checkpoint's own tokenizer, streamed decoding, and stop strings.

The rules come from tokenizer.json or from GGUF metadata and run in the `tokenizers` library. Decoding is done here,
token by token in bytes, so that a stream and a whole decode can never differ.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from slipstream.checkpoint.files import member
from slipstream.errors import CheckpointError, RequestError
from slipstream.tokenizer_gguf import guard, read_gguf

_MAX_JSON_BYTES = 256 << 20
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """One checkpoint's tokenizer.

    Attributes:
        vocab_size: how many token ids it knows; the model's own vocabulary may be padded to more.
        bos_token_id: the token a text starts with, or None.
        eos_token_ids: the tokens that end a text, as far as the tokenizer's own files say.
        special_tokens: names as chat templates use them ("bos_token", "eos_token", ...) and their text.
        chat_templates: name -> jinja template; "default" is what `chat_template` gives.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        byte_level: bool,
        strip_space: bool,
        special_tokens: Mapping[str, str],
        eos_token_ids: Iterable[int] = (),
        chat_templates: Mapping[str, str] | None = None,
        edges: tuple[bool, bool] | None = None,
    ) -> None:
        """`edges`: whether to add (bos, eos); None leaves it to the backend's own post-processor."""
        self._backend = backend
        self._byte_level = byte_level
        self.strip_space = strip_space
        self.special_tokens = dict(special_tokens)
        self.chat_templates = dict(chat_templates or {})
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = {}
        self.bos_token_id = self._special_id("bos_token")
        eos = self._special_id("eos_token")
        self.eos_token_ids = tuple(dict.fromkeys([*([] if eos is None else [eos]), *eos_token_ids]))
        self._edges: tuple[list[int], list[int]] | None = None
        if edges is not None:
            bos_id, add_bos, add_eos = self.bos_token_id, *edges
            self._edges = (
                [bos_id] if add_bos and bos_id is not None else [],
                [eos] if add_eos and eos is not None else [],
            )

    @property
    def chat_template(self) -> str | None:
        """The template for a conversation, or None where the checkpoint has none."""
        return self.chat_templates.get("default") or next(iter(self.chat_templates.values()), None)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens spelled out in it are recognised.

        Raises:
            RequestError: `text` is not a string, or cannot be written in UTF-8.
        """
        if not isinstance(text, str):
            raise RequestError(f"a text must be a string, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise RequestError(
                f"the text holds half of a surrogate pair at position {e.start}; it is not valid Unicode"
            ) from e
        own = add_special_tokens and self._edges is None
        ids: list[int] = guard(
            "the tokenizer failed on this text", lambda: self._backend.encode(text, add_special_tokens=own).ids
        )
        if add_special_tokens and self._edges is not None:
            return [*self._edges[0], *ids, *self._edges[1]]
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        stream = Detokenizer(self, skip_special_tokens)
        return "".join([*map(stream.add, ids), stream.finish()])

    def token_to_id(self, token: str) -> int | None:
        found: int | None = self._backend.token_to_id(token)
        return found

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it, or None outside the vocabulary."""
        if not 0 <= token_id < 1 << 32:
            return None
        found: str | None = self._backend.id_to_token(token_id)
        return found

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; a leading space is still there."""
        data = self._bytes.get(token_id)
        if data is None:
            data = self._bytes[token_id] = self._spell(token_id)
        return data

    def _spell(self, token_id: int) -> bytes:
        token = self.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            if token_id in self._added:
                return token.encode()
            try:
                return bytes(_BYTE_OF[c] for c in token)
            except KeyError:  # not spelled in the byte alphabet: it stands for itself
                return token.encode()
        if token_id in self.special_ids:
            return token.encode()
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return token.replace("▁", " ").encode()

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_to_id(token)

    @classmethod
    def from_folder(cls, path: Path | str) -> Tokenizer:
        """Read tokenizer.json and what stands beside it. No code from the folder is run.

        Raises:
            CheckpointError: a file is missing, damaged, or of a kind that cannot be decoded here.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(
                f"{folder} has no tokenizer.json; only `tokenizers` files are read, save the tokenizer in that format"
            )
        raw = _read(file)
        backend = guard(f"{file} is not a valid tokenizer", lambda: tokenizers.Tokenizer.from_str(raw))
        backend.no_truncation()  # a limit left in the file would silently cut prompts
        backend.no_padding()
        byte_level, strip_space = _decoder_kind(
            file, None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
        )

        config = _read_json(folder / "tokenizer_config.json")
        special = {**_special_names(_read_json(folder / "special_tokens_map.json")), **_special_names(config)}
        edges = None
        if isinstance(config.get("add_bos_token"), bool) or isinstance(config.get("add_eos_token"), bool):
            edges = (config.get("add_bos_token") is True, config.get("add_eos_token") is True)
        return cls(
            backend,
            byte_level=byte_level,
            strip_space=strip_space,
            special_tokens=special,
            chat_templates=_folder_templates(folder, config),
            edges=edges,
        )

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as `from_folder` and transformers read them."""
        spec = json.loads(self._backend.to_str())
        spec["decoder"] = spec["decoder"] or _decoder(self._byte_level, self.strip_space)
        (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens}
        if self._edges is not None:
            config |= {"add_bos_token": bool(self._edges[0]), "add_eos_token": bool(self._edges[1])}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8"
        )

    @classmethod
    def of_bytes(cls) -> Tokenizer:
        """One token for each byte of UTF-8, for a model of random weights that comes without a tokenizer."""
        alphabet = sorted(_BYTE_OF, key=lambda c: _BYTE_OF[c])
        backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return cls(backend, byte_level=True, strip_space=False, special_tokens={})

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build the tokenizer that GGUF metadata describes: byte-level BPE ("gpt2") or sentencepiece BPE ("llama").

        Raises:
            CheckpointError: the metadata is incomplete, contradicts itself, or names a kind that is not known.
        """
        return cls(**read_gguf(metadata))


class Detokenizer:
    """Turns token ids into text as they come: `add` gives only text that later tokens cannot change.

    Half of a UTF-8 character waits for its other half. All `add`s and the `finish` together are `tokenizer.decode`.
    With `continues`, the text goes on from a prompt, so that a sentencepiece tokenizer's first space is kept.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, *, continues: bool = False) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._at_start = tokenizer.strip_space and not continues

    def add(self, token_id: int) -> str:
        """The text that this token makes certain; often its own, sometimes none."""
        if token_id in self._skip:
            return ""
        return self._strip(self._decode(self._token_bytes(token_id)))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole."""
        return self._strip(self._decode(b"", True))

    def _strip(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ")
        return text


class StopStrings:
    """Cuts a stream at the first stop string, wherever the pieces of text happen to be cut.

    The stop string that is complete first wins; of those complete at the same character, the longest. Text that may
    be the beginning of a stop string is held back until it is not.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = [(stop, _failures(stop)) for stop in stops if stop]
        self._matched = [0] * len(self._stops)  # how much of each stop the text now ends with
        self._include = include
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """(text that may be shown, the stop string it ended with or None). After a match, feed no more."""
        if not self._stops:
            return text, None
        seen = self._held + text
        for end, char in enumerate(text, len(self._held) + 1):
            found = ""
            for i, (stop, failures) in enumerate(self._stops):  # Knuth, Morris, Pratt 1977
                n = self._matched[i]
                while n and (n == len(stop) or stop[n] != char):
                    n = failures[n - 1]
                self._matched[i] = n = n + (stop[n] == char)
                if n == len(stop) > len(found):
                    found = stop
            if found:
                self._held = ""
                return seen[: end if self._include else end - len(found)], found
        keep = len(seen) - max(self._matched, default=0)
        self._held = seen[keep:]
        return seen[:keep], None

    def flush(self) -> str:
        """The text still held back, at the end of the stream."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held


def _failures(stop: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that it also ends with."""
    table = [0] * len(stop)
    n = 0
    for i in range(1, len(stop)):
        while n and stop[i] != stop[n]:
            n = table[n - 1]
        n += stop[i] == stop[n]
        table[i] = n
    return table


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable spelling of the 256 bytes: itself where it prints, the next free one from U+0100 where not."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()


def _folder_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return {"default": _read(file)}
    value = _read_json(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    named = (
        value
        if isinstance(value, list)
        else [{"name": k, "template": v} for k, v in value.items()]
        if isinstance(value, dict)
        else []
    )
    if named and all(
        isinstance(t, dict) and isinstance(t.get("name"), str) and isinstance(t.get("template"), str) for t in named
    ):
        return {t["name"]: t["template"] for t in named}
    raise CheckpointError(f"the chat template in {folder} must be a string or a list of named templates")


def _special_names(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name, value in config.items():
        if isinstance(value, dict):  # an AddedToken written out
            value = value.get("content")
        if name.endswith("_token") and isinstance(value, str):
            found[name] = value
    return found


def _decoder(byte_level: bool, strip_space: bool) -> dict[str, Any]:
    """For tokenizer.json: what `_decoder_kind` would read back."""
    if byte_level:
        return {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
    steps += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    return {
        "type": "Sequence",
        "decoders": steps + [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * strip_space,
    }


def _decoder_kind(file: Path, decoder: Any) -> tuple[bool, bool]:
    """(bytes in GPT-2's alphabet, a first space is dropped) from the decoder of tokenizer.json."""
    steps = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
    steps = [s for s in steps if isinstance(s, dict)] if isinstance(steps, list) else []
    kinds = {s.get("type") for s in steps if isinstance(s.get("type"), str)}
    if "ByteLevel" in kinds:
        return True, False
    if "Metaspace" in kinds:
        return False, any(s.get("prepend_scheme", "always") != "never" for s in steps if s.get("type") == "Metaspace")
    if "Replace" in kinds and any(s.get("content") == " " for s in steps):
        return False, "Strip" in kinds
    raise CheckpointError(
        f"{file} decodes with {sorted(kinds) or 'nothing'}; known are ByteLevel and sentencepiece (Metaspace, Replace)"
    )


def _read(file: Path) -> str:
    member(file.parent.resolve(), file.name)  # no link may lead out of the folder
    try:
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{file} is larger than {_MAX_JSON_BYTES >> 20} MiB, which no tokenizer needs")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise CheckpointError(f"{file} cannot be read: {e}") from e


def _parse(file: Path, raw: str) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{file} is not valid JSON: {e}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not {type(value).__name__}")
    return value


def _read_json(file: Path) -> dict[str, Any]:
    return _parse(file, _read(file)) if file.is_file() else {}
