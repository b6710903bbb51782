"""Tokenizers against `tokenizers` and transformers; streams against whole decodes; stop strings against brute force."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from slipstream.checkpoint.open import open_checkpoint
from slipstream.errors import CheckpointError, RequestError
from slipstream.tokenizer import Detokenizer, StopStrings, Tokenizer
from slipstream.tokenizer_gguf import _PRE

TEXTS = (
    "Hello world, it's 2024 and I'VE 12345 things!",
    "def f(x: int) -> str:\n    return f'{x**2}'\n\n\n\tdone   ",
    "日本語 と 中文 한국어 👩‍👩‍👧 naïve café Straße",
    "Привет, мир! مرحبا ١٢٣ ½ Ⅷ हिन्दी",
    "<|im_start|>user\nhi<|im_end|>\n",
    "",
    " ",
    "HTTPServer camelCase it's IT'S don't  \r\n  x/y//z",
    "\x00\x7f \ufeff \ufffd 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
)


def bpe(pre: Any) -> tokenizers.Tokenizer:
    """A small byte-level tokenizer, trained here; it knows all bytes."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"]
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    return backend


def metadata_of(backend: tokenizers.Tokenizer, pre: str, **extra: Any) -> dict[str, Any]:
    """The GGUF metadata that llama.cpp's converter would write for a byte-level tokenizer."""
    spec = json.loads(backend.to_str())
    vocab = backend.get_vocab(with_added_tokens=True)
    tokens = [t for t, _ in sorted(vocab.items(), key=lambda item: item[1])]
    special = {t["content"] for t in spec["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in special else 1 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(m) for m in spec["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        **{f"tokenizer.ggml.{k}": v for k, v in extra.items()},
    }


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.fixture(scope="module")
def backend() -> tokenizers.Tokenizer:
    return bpe(GPT2)


@pytest.fixture(scope="module")
def tokenizer(backend: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer.from_gguf(metadata_of(backend, "gpt-2"))


def save(folder: Path, backend: tokenizers.Tokenizer, config: dict[str, Any] | None = None) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config or {"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


# -- the patterns that the models' own tokenizer.json files hold, written out in full ---------------------------

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = {
    "llama-bpe": LLAMA3,
    "qwen2": LLAMA3.replace("{1,3}", ""),
    "gpt-4o": O200K,
    "tekken": O200K.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace("{1,3}", ""),
}


@pytest.mark.parametrize("pre", CUTS)
def test_words_are_cut_as_in_the_models_own_file(pre: str) -> None:
    split = pre_tokenizers.Split(tokenizers.Regex(CUTS[pre]), "isolated")
    oracle = bpe(pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]))
    ours = Tokenizer.from_gguf(metadata_of(oracle, pre, add_bos_token=False))
    whole = json.loads(oracle.to_str())
    whole["model"]["ignore_merges"] = pre in ("llama-bpe", "tekken")
    oracle = tokenizers.Tokenizer.from_str(json.dumps(whole))
    for text in TEXTS:
        assert ours.encode(text) == oracle.encode(text).ids, text


def test_smollm_takes_digits_one_by_one() -> None:
    oracle = bpe(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]))
    ours = Tokenizer.from_gguf(metadata_of(oracle, "smollm"))
    for text in TEXTS:
        assert ours.encode(text) == oracle.encode(text).ids, text
    assert len(ours.encode("12345")) == 5


def test_every_known_pre_builds_and_gives_its_text_back(backend: tokenizers.Tokenizer) -> None:
    for pre in _PRE:
        ours = Tokenizer.from_gguf(metadata_of(backend, pre, add_bos_token=False))
        for text in TEXTS:
            assert ours.decode(ours.encode(text), skip_special_tokens=False) == text, pre


def test_the_real_model(smollm2: Path) -> None:
    ours = Tokenizer.from_gguf(open_checkpoint(smollm2).metadata)
    assert ours.vocab_size == 49152 and ours.eos_token_ids == (2,)
    # as transformers 5.17 reads the same file
    assert ours.encode("The tide rose; it's fine.") == [504, 17662, 8739, 43, 357, 506, 4979, 30]
    chat = [1, 4093, 198, 29477, 43424, 17097, 241, 115, 40993, 47, 2, 198]
    assert ours.encode("<|im_start|>user\nWas ist 日本?<|im_end|>\n") == chat


@pytest.mark.slow
def test_the_real_model_as_transformers_reads_it(smollm2: Path) -> None:
    gguf = pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
    fields = gguf.GGUFReader(smollm2).fields
    ours = Tokenizer.from_gguf({name: f.contents() for name, f in fields.items() if name.startswith("tokenizer.")})
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    assert ours.vocab_size == 49152 and ours.eos_token_ids == (2,) and ours.chat_template
    for text in TEXTS:
        if not any(c.isnumeric() for c in text):  # transformers forgets to cut digits when it reads a GGUF
            assert ours.encode(text) == theirs.encode(text)
    assert ours.encode("2024") == [ours.token_to_id(d) for d in "2024"]
    ids = [(i * 7919) % 49152 for i in range(3000)]
    assert ours.decode(ids, skip_special_tokens=False) == theirs.backend_tokenizer.decode(
        ids, skip_special_tokens=False
    )


def test_a_folder_reads_as_its_own_library_reads_it(tmp_path: Path, backend: tokenizers.Tokenizer) -> None:
    marked = tokenizers.Tokenizer.from_str(backend.to_str())
    marked.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    marked.enable_truncation(4)  # must not cut prompts
    ours = Tokenizer.from_folder(save(tmp_path, marked))
    marked.no_truncation()
    for text in TEXTS:
        assert ours.encode(text) == marked.encode(text).ids
        assert ours.encode(text, add_special_tokens=False) == backend.encode(text).ids
        assert ours.decode(ours.encode(text)) == text.replace("<s>", "")
    assert (ours.bos_token_id, ours.eos_token_ids, ours.vocab_size) == (0, (1,), backend.get_vocab_size())
    assert ours.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert ours.token_to_id("<s>") == 0 and ours.id_to_token(1) == "</s>" and ours.id_to_token(10**9) is None
    assert ours.id_to_token(-1) is None and ours.token_to_id("no such token") is None


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (False, False), (True, True)])
def test_bos_and_eos_are_added_as_the_files_say(
    tmp_path: Path, backend: tokenizers.Tokenizer, bos: bool, eos: bool
) -> None:
    names = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": bos, "add_eos_token": eos}
    folder = Tokenizer.from_folder(save(tmp_path, backend, names))
    gguf = Tokenizer.from_gguf(metadata_of(backend, "gpt-2", add_bos_token=bos, add_eos_token=eos))
    for ours in (folder, gguf):
        assert ours.encode("hi") == [0] * bos + backend.encode("hi").ids + [1] * eos
        assert ours.encode("hi", add_special_tokens=False) == backend.encode("hi").ids


def test_chat_templates_from_each_place(tmp_path: Path, backend: tokenizers.Tokenizer) -> None:
    folder = save(
        tmp_path, backend, {"chat_template": [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]}
    )
    assert Tokenizer.from_folder(folder).chat_templates == {"tools": "T", "default": "D"}
    assert Tokenizer.from_folder(folder).chat_template == "D"
    (folder / "chat_template.json").write_text('{"chat_template": "J"}')
    assert Tokenizer.from_folder(folder).chat_template == "J"
    (folder / "chat_template.jinja").write_text("F")
    assert Tokenizer.from_folder(folder).chat_template == "F"
    data = {**metadata_of(backend, "gpt-2"), "tokenizer.chat_template": "G", "tokenizer.chat_template.rag": "R"}
    assert Tokenizer.from_gguf(data).chat_templates == {"default": "G", "rag": "R"}
    assert Tokenizer.from_gguf(metadata_of(backend, "gpt-2")).chat_template is None


# -- sentencepiece ----------------------------------------------------------------------------------------------

PIECES = ["▁the", "▁t", "he", "▁a", "in", "▁", "t", "h", "e", "a", "i", "n", "b", "▁b", "an", "ana", "▁ban", "the", "é"]


def spm_metadata(**extra: Any) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *PIECES, "  "]
    types = [2, 3, 3, *[6] * 256, *[1] * len(PIECES), 4]
    scores = [0.0] * 259 + [-float(i) for i in range(len(PIECES))] + [0.0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        **{f"tokenizer.ggml.{k}": v for k, v in extra.items()},
    }


def reference_spm(text: str) -> list[str]:
    """Sentencepiece BPE by definition: join the neighbours whose piece scores best, the leftmost first."""
    parts = list(("▁" + text.replace(" ", "▁")) if text else "")
    while True:
        joined = [(PIECES.index(a + b), i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in PIECES]
        if not joined:
            break
        _, i = min(joined)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [q for p in parts for q in ([p] if p in PIECES else [f"<0x{b:02X}>" for b in p.encode()])]


@given(st.text(alphabet="thean bié日", max_size=12).filter(lambda s: "  " not in s))
@settings(deadline=None, max_examples=200)
def test_sentencepiece_merges_by_score(text: str) -> None:
    ours = SPM
    ids = ours.encode(text)
    assert ids[0] == 1, "the metadata has no add_bos_token: sentencepiece adds it by default"
    assert [ours.id_to_token(i) for i in ids[1:]] == reference_spm(text)
    assert ours.decode(ids) == text


SPM = Tokenizer.from_gguf(spm_metadata())


def test_sentencepiece_spaces_and_specials() -> None:
    assert SPM.decode(SPM.encode("the ban")) == "the ban"
    assert SPM.eos_token_ids == (2,) and SPM.special_tokens["unk_token"] == "<unk>"
    no_prefix = Tokenizer.from_gguf(spm_metadata(add_space_prefix=False, add_bos_token=False))
    assert no_prefix.id_to_token(no_prefix.encode("the")[0]) == "the"
    assert no_prefix.decode(no_prefix.encode(" the")) == " the"
    spaced = no_prefix.encode("a  b")
    assert no_prefix.token_to_id("  ") in spaced and no_prefix.decode(spaced) == "a  b"
    the = SPM.token_to_id("▁the")
    assert the is not None
    assert Detokenizer(SPM).add(the) == "the"
    assert Detokenizer(SPM, continues=True).add(the) == " the", "text that goes on from a prompt keeps its space"
    assert SPM.decode([1, the, 2], skip_special_tokens=False) == "<s> the</s>"


def test_a_sentencepiece_folder_decodes_as_its_library(tmp_path: Path) -> None:
    oracle = tokenizers.Tokenizer(SPM._backend.model)
    oracle.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    oracle.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    oracle.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    ours = Tokenizer.from_folder(save(tmp_path, oracle))
    for text in TEXTS:
        ids = oracle.encode(text).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == oracle.decode(ids)


# -- streaming --------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 620), max_size=40), st.booleans())
@settings(deadline=None, max_examples=300)
def test_a_stream_is_the_whole_decode(ids: list[int], skip: bool) -> None:
    ours, oracle = BYTES
    stream = Detokenizer(ours, skip)
    pieces = [stream.add(i) for i in ids]
    whole = oracle.decode(ids, skip_special_tokens=skip)
    assert "".join(pieces) + stream.finish() == whole == ours.decode(ids, skip)
    text = ""
    for n, piece in enumerate(pieces, 1):
        text += piece
        assert whole.startswith(text), f"token {n} showed text that later tokens changed"


BYTES = (lambda backend: (Tokenizer.from_gguf(metadata_of(backend, "gpt-2")), backend))(bpe(GPT2))


@given(st.text(max_size=30))
@settings(deadline=None, max_examples=200)
def test_no_half_characters_on_the_way(text: str) -> None:
    ours = BYTES[0]
    stream = Detokenizer(ours, False)
    pieces = [stream.add(i) for i in ours.encode(text)]
    assert "".join(pieces) == text and stream.finish() == ""


@given(st.lists(st.integers(3, 280), max_size=30))
@settings(deadline=None, max_examples=200)
def test_a_sentencepiece_stream_is_the_whole_decode(ids: list[int]) -> None:
    stream = Detokenizer(SPM)
    text = "".join(map(stream.add, ids)) + stream.finish()
    raw = b"".join(SPM.token_bytes(i) for i in ids).decode("utf-8", errors="replace")
    assert text == SPM.decode(ids) == raw.removeprefix(" ")


def test_special_tokens_are_kept_or_left_out(tokenizer: Tokenizer) -> None:
    ids = [0, *tokenizer.encode("hi"), 1]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>hi</s>"
    assert tokenizer.decode([10**6]) == "", "models pad their vocabulary: an id beyond it is no text"


# -- stop strings -----------------------------------------------------------------------------------------------


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By definition: the shortest beginning of the text that ends with a stop string; the longest such string."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            best = max(found, key=len)
            return text[: end - len(best)], best
    return text, None


@given(
    st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4),
    st.lists(st.text(alphabet="abc", max_size=4), max_size=12),
    st.booleans(),
)
@settings(deadline=None, max_examples=500)
def test_stop_strings_do_not_depend_on_token_boundaries(stops: list[str], pieces: list[str], include: bool) -> None:
    want, match = first_stop("".join(pieces), stops)
    stream = StopStrings(tuple(stops), include)
    shown, found = "", None
    for piece in pieces:
        text, found = stream.feed(piece)
        shown += text
        if found:
            break
    else:
        shown += stream.flush()
    assert (shown, found) == (want + (match if include and match else ""), match)


def test_only_a_possible_beginning_is_held_back() -> None:
    stream = StopStrings(("END",))
    assert stream.feed("so E") == ("so ", None)
    assert stream.feed("N") == ("", None)
    assert stream.feed("E") == ("EN", None), "the E may begin another END"
    assert stream.feed("ND more") == ("", "END")
    assert StopStrings(()).feed("anything") == ("anything", None)


# -- what is wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("pre", "no-such", "no-such.*known are.*smollm"),
        ("pre", ["smollm"], "not valid|known"),
        ("model", "bert", "bert.*gpt2"),
        ("model", None, "known are"),
        ("tokens", None, "no tokenizer.ggml.tokens"),
        ("tokens", 5, "damaged"),
        ("tokens", "abc", "damaged"),
        ("tokens", [1, 2], "damaged"),
        ("tokens", ["a", "a"], "twice|entries"),
        ("merges", None, "merges"),
        ("merges", ["a"], "two tokens"),
        ("merges", ["zz1 zz2"], "not valid"),
        ("merges", [["a", "b"]], "damaged"),
        ("token_type", [1], "entries"),
        ("token_type", ["x"] * 3, "damaged"),
    ],
)
def test_damaged_gguf_metadata(backend: tokenizers.Tokenizer, name: str, value: Any, message: str) -> None:
    data = metadata_of(backend, "gpt-2")
    data[f"tokenizer.ggml.{name}"] = value
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_gguf(data)


def test_damaged_sentencepiece_metadata() -> None:
    with pytest.raises(CheckpointError, match="scores"):
        Tokenizer.from_gguf(spm_metadata(scores=None))
    with pytest.raises(CheckpointError, match="entries"):
        Tokenizer.from_gguf(spm_metadata(scores=[0.0]))
    duplicate = [*spm_metadata()["tokenizer.ggml.tokens"][:-1], "▁the"]
    with pytest.raises(CheckpointError, match="twice"):
        Tokenizer.from_gguf(spm_metadata(tokens=duplicate, token_type=[1] * len(duplicate)))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"{}",
        b'{"model": {"type": "BPE"}}',
        b'{"version": "1.0", "model": 5}',
        b"[" * 100000,
    ],
)
def test_damaged_tokenizer_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        Tokenizer.from_folder(tmp_path)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_mutated_tokenizer_json_loads_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    raw = bytearray(BYTES[1].to_str().encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 30))] = data.draw(st.binary(max_size=6))
    folder = tmp_path_factory.mktemp("t")
    (folder / "tokenizer.json").write_bytes(raw)
    try:
        ours = Tokenizer.from_folder(folder)
        assert isinstance(ours.decode(ours.encode("Hello 1234 é")), str)
    except CheckpointError:
        pass


def test_other_damaged_files(tmp_path: Path, backend: tokenizers.Tokenizer) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    folder = save(tmp_path, backend)
    for content in ("[]", "{", '{"chat_template": 5}', '{"chat_template": [{"name": 1}]}'):
        (folder / "tokenizer_config.json").write_text(content)
        with pytest.raises(CheckpointError):
            Tokenizer.from_folder(folder)
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(folder).bos_token_id is None
    spec = json.loads(backend.to_str())
    spec["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(CheckpointError, match=r"WordPiece.*ByteLevel"):
        Tokenizer.from_folder(folder)


def test_texts_that_are_none(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="string"):
        tokenizer.encode(5)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode("a\ud800")


def test_torch_is_not_imported() -> None:
    code = "import slipstream.tokenizer, slipstream.chat, slipstream.harmony, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_saved_tokenizer_reads_back_the_same_and_opens_in_transformers(smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from slipstream.checkpoint.open import open_checkpoint

    ours = Tokenizer.from_gguf(open_checkpoint(smollm2).metadata)
    ours.save(tmp_path)
    back, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "The year 2026: naïve café, 日本語, and\tx = 12 * 3;"
    ids = ours.encode(text)
    assert back.encode(text) == ids == theirs(text).input_ids
    assert back.decode(ids) == text == theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert (back.chat_template, back.special_tokens) == (ours.chat_template, ours.special_tokens)
