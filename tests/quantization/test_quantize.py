"""What `quantize` writes: transformers and slipstream load it, and its numbers are those of the formats."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from slipstream import LLM, CheckpointError, ConfigError, quantize
from slipstream.checkpoint.manifest import NAME, check_sizes, verify
from slipstream.checkpoint.open import open_checkpoint
from slipstream.ops.formats import decode, encode
from slipstream.quantization.quantize import Report
from slipstream.quantization.select import Selection
from slipstream.tokenizer import Tokenizer
from tests.checkpoint.test_gguf_names import to_gguf
from tests.parity.test_architectures import all_logits
from tests.quantization.tiny import make

GROUP = {"mxfp4": 0, "int8": 0, "int4": 32}
NAMES = (
    "gemma2", "gemma3_text", "gemma3-vision", "gpt_oss", "llama-biases-tied", "mixtral", "olmo2", "phi3", "qwen2",
    "qwen3", "qwen3_moe", "smollm3",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name -> (folder, transformers' model), each made once."""
    made: dict[str, tuple[Path, Any]] = {}
    home = tmp_path_factory.mktemp("models")

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            made[name] = home / name, make(name, home / name)
        return made[name]

    return get


def rounded(model: Any, to: str, *, experts_only: bool = False) -> dict[str, torch.Tensor]:
    """transformers' parameters, with the linear ones of the decoder put through the format and back."""
    found = {}
    for name, p in model.state_dict().items():
        if not is_linear(name, p) or (experts_only and ".experts." not in name):
            found[name] = p
            continue
        transposed = model.config.model_type == "gpt_oss" and ".experts." in name
        rows = p.mT.contiguous() if transposed else p
        value = decode(encode(rows, to, GROUP[to]), torch.float32)
        found[name] = value.mT if transposed else value
    return found


def is_linear(name: str, p: torch.Tensor) -> bool:
    """Told from transformers' own names, in which experts are stacks in every architecture."""
    aside = ("embed", "lm_head", "norm", "vision", "multi_modal", "router", "mlp.gate.", "bias", "sinks")
    return p.dim() >= 2 and not any(a in name for a in aside)


def opened(folder: Path) -> Any:
    """transformers' model of a folder, every weight widened."""
    published = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"
    kind = transformers.Mxfp4Config if published else transformers.CompressedTensorsConfig
    auto = transformers.AutoModelForCausalLM
    if "vision_config" in json.loads((folder / "config.json").read_text()):
        auto = transformers.Gemma3ForConditionalGeneration
    how = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float32}
    return auto.from_pretrained(folder, quantization_config=kind(dequantize=True), **how).float().eval()


@pytest.mark.parametrize(
    ("name", "to"),
    [(name, "mxfp4") for name in NAMES]
    + [("llama-biases-tied", "int8"), ("llama-biases-tied", "int4"), ("mixtral", "int4")],
)
def test_transformers_reads_it(models: Any, tmp_path: Path, name: str, to: str) -> None:
    pytest.importorskip("compressed_tensors")
    source, model = models(name)
    report = quantize(source, tmp_path / "out", to=to)
    want = rounded(model, to, experts_only=name == "gpt_oss")
    got = opened(tmp_path / "out").state_dict()
    changed = [n for n, p in model.state_dict().items() if not torch.equal(p, want[n])]
    assert len(changed) >= 4
    assert got.keys() >= want.keys()
    for n, w in want.items():
        # int8 and int4: the library multiplies codes by scales in bfloat16
        exact = n not in changed or to == "mxfp4"
        torch.testing.assert_close(got[n].float(), w, rtol=0 if exact else 2**-8, atol=0, msg=n)
    assert report.parameters_covered == sum(want[n].numel() for n in changed)
    assert report.parameters == sum(p.numel() for n, p in model.state_dict().items() if n not in tied(model))


def tied(model: Any) -> set[str]:
    return {"lm_head.weight"} if model.config.get_text_config().tie_word_embeddings else set()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "to"),
    [("gpt_oss", "mxfp4"), ("gpt_oss", "int8"), ("gpt_oss", "int4"), ("gemma3-vision", "mxfp4"), ("mixtral", "int8"),
     ("qwen3_moe", "mxfp4"), ("phi3", "int4")],
)  # fmt: skip
def test_slipstream_runs_it(models: Any, tmp_path: Path, name: str, to: str) -> None:
    source, model = models(name)
    report = quantize(source, tmp_path / "out", to=to, max_shard_bytes=150_000)
    assert report.shards > 1
    before = {n: p.clone() for n, p in model.state_dict().items()}
    model.load_state_dict(rounded(model, to, experts_only=(name, to) == ("gpt_oss", "mxfp4")))
    prompts = [torch.arange(3, 3 + n)[None] for n in (17, 5)]
    want = [model(p).logits[0] for p in prompts]
    model.load_state_dict(before)
    for quantization in ("auto", "dequantize"):
        llm = LLM(tmp_path / "out", dtype="float32", quantization=quantization, kv_cache_memory_bytes=8 << 20,
                  max_model_len=64)  # fmt: skip
        for mine, theirs in zip(all_logits(llm, [p[0].tolist() for p in prompts]), want, strict=True):
            tolerance = 1e-4 if quantization == "dequantize" else 2e-2  # a kernel may round activations
            assert (mine - theirs).abs().max() / theirs.abs().max() < tolerance, quantization


def test_what_is_not_converted_keeps_its_bytes(models: Any, tmp_path: Path) -> None:
    source, _ = models("llama-biases-tied")
    report = quantize(source, tmp_path / "out", to="mxfp4", modules=["*.mlp.*"], skip=["*.layers.1.*", "*gate_proj"])
    assert set(report.errors) == {"model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"}
    with (
        safe_open(source / "model.safetensors", "pt") as old,
        safe_open(tmp_path / "out/model.safetensors", "pt") as new,
    ):
        kept = set(old.keys()) & set(new.keys())
        assert len(set(old.keys()) - kept) == 2 and len(set(new.keys()) - kept) == 4
        for name in kept:
            assert torch.equal(old.get_tensor(name), new.get_tensor(name))
    ignored = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.0.mlp.gate_proj" in ignored and "model.layers.1.self_attn.q_proj" in ignored
    assert "lm_head" in ignored and "model.layers.0.mlp.up_proj" not in ignored


def test_the_errors_are_those_of_float64(models: Any, tmp_path: Path) -> None:
    source, model = models("llama-biases-tied")
    for to in ("mxfp4", "int8", "int4"):
        report = quantize(source, tmp_path / to, to=to)
        values = list(report.errors.values())
        assert values == sorted(values, reverse=True) and len(values) == 2 * 7
        for module, error in report.errors.items():
            w = model.state_dict()[f"{module}.weight"].double()
            again = decode(encode(w.float(), to, GROUP[to]), torch.float64)
            assert error == pytest.approx(((again - w).norm() / w.norm()).item(), rel=1e-5)


def test_the_manifest(models: Any, tmp_path: Path) -> None:
    source, _ = models("qwen2")
    out = tmp_path / "out"
    report = quantize(source, out, to="int4", skip=["*.v_proj"], max_shard_bytes=100_000)
    content = json.loads((out / NAME).read_text())
    assert (content["source"], content["to"], content["skip"], content["group_size"]) == (
        "qwen2",
        "int4",
        ["*.v_proj"],
        32,
    )
    assert content["errors"] == report.errors and len(content["shards"]) == report.shards > 2
    names = sorted(p.name for p in out.glob("*.safetensors"))
    assert sorted(content["shards"]) == names
    check_sizes(out, names)
    verify(out)
    damaged = bytearray((out / names[1]).read_bytes())
    damaged[-7] ^= 1
    (out / names[1]).write_bytes(damaged)
    with pytest.raises(CheckpointError, match=names[1]):
        verify(out)


def test_dtypes_and_the_same_bytes_from_bfloat16(models: Any, tmp_path: Path) -> None:
    source, model = models("qwen3")
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    (tmp_path / "half/tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    quantize(tmp_path / "half", tmp_path / "out", to="int8")
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert {str(t.dtype)[6:] for t in tensors.values()} == {"bfloat16", "int32", "int64"}
    name = "model.layers.1.mlp.down_proj"
    want = encode(model.state_dict()[f"{name}.weight"].bfloat16(), "int8")
    codes = tensors[f"{name}.weight_packed"].view(torch.uint8).int() - 128  # four in an element, from its low end
    assert torch.equal(codes, want.data.int())
    assert want.scales is not None and torch.equal(tensors[f"{name}.weight_scale"], want.scales)


@pytest.fixture(scope="module")
def oss_gguf(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, model = models("gpt_oss")
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    letters = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = [*sorted(letters, key=lambda t: letters[t])[:-1], "!!"]

    def tokenizer(w: Any) -> None:
        w.add_tokenizer_model("gpt2")
        w.add_token_list(tokens)
        w.add_token_merges(["! !"])

    return to_gguf("gpt-oss", model.config, open_checkpoint(source), path, tokenizer)


@pytest.mark.parametrize("to", ["mxfp4", "int8"])
def test_gguf_becomes_what_safetensors_become(models: Any, oss_gguf: Path, tmp_path: Path, to: str) -> None:
    source, _ = models("gpt_oss")
    quantize(source, tmp_path / "a", to=to)
    quantize(oss_gguf, tmp_path / "b", to=to)
    a, b = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name
    configs = [json.loads((tmp_path / x / "config.json").read_text()) for x in "ab"]
    assert configs[0]["architectures"] == configs[1]["architectures"] == ["GptOssForCausalLM"]
    mine = [sorted(c["quantization_config"].pop("ignore", [])) for c in configs]
    assert mine[0] == mine[1] and configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_packed_weights_stay_unless_named(models: Any, tmp_path: Path) -> None:
    source, _ = models("gpt_oss")
    quantize(source, tmp_path / "a", to="mxfp4")
    with pytest.raises(ConfigError, match="nothing is left to convert"):
        quantize(tmp_path / "a", tmp_path / "b", to="mxfp4")
    report = quantize(tmp_path / "a", tmp_path / "b", to="int8")
    assert any("slipstream only" in note for note in report.notes)
    assert len(report.errors) == 2 * 4  # queries, keys, values, output
    a, b = (open_checkpoint(tmp_path / x) for x in "ab")
    experts = "model.layers.1.mlp.experts."
    whole = a.dequantize(f"{experts}gate_up_proj_blocks", torch.float32)
    for e in range(5):
        for i, part in enumerate(("gate_proj", "up_proj")):
            name = f"{experts}{e}.{part}.weight"
            assert b.tensors[name].dtype == "mxfp4"
            assert torch.equal(b.dequantize(name, torch.float32), whole[e, i::2])
    assert b.tensors["model.layers.0.self_attn.q_proj.weight"].dtype == "int8"
    report = quantize(tmp_path / "a", tmp_path / "c", to="int8", modules=["*.experts.down_proj"])
    assert set(report.errors) == {f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)}
    c = open_checkpoint(tmp_path / "c")
    assert c.tensors[f"{experts}3.down_proj.weight"].dtype == "int8"
    assert c.tensors[f"{experts}3.up_proj.weight"].dtype == "mxfp4"
    assert c.tensors["model.layers.0.self_attn.q_proj.weight"].dtype == "F32"


def test_two_formats_in_one_folder(models: Any, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    source, model = models("qwen3")
    quantize(source, tmp_path / "a", to="int4", modules=["*.mlp.*"])
    quantize(tmp_path / "a", tmp_path / "b", to="mxfp4")
    kinds = {n: i.dtype for n, i in open_checkpoint(tmp_path / "b").tensors.items()}
    assert kinds["model.layers.0.mlp.up_proj.weight"] == "int4"
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == "mxfp4"
    got = opened(tmp_path / "b").state_dict()
    for part, to in (("mlp.up_proj", "int4"), ("self_attn.q_proj", "mxfp4")):
        name = f"model.layers.1.{part}.weight"
        want = decode(encode(model.state_dict()[name], to, GROUP[to]), torch.float32)
        torch.testing.assert_close(got[name], want, rtol=2**-8, atol=0)


def test_a_real_gguf(smollm2: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    report = quantize(smollm2, tmp_path / "out", to="int8", skip=["*.layers.[0-9].*", "*.layers.1?.*", "*.mlp.*"])
    assert report.bytes_before == open_checkpoint(smollm2).total_bytes
    assert report.parameters == 134_515_008
    assert "not to be converted, became bfloat16: model.embed_tokens.weight" in report.notes[0]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours, was = Tokenizer.from_folder(tmp_path / "out"), Tokenizer.from_gguf(open_checkpoint(smollm2).metadata)
    for text in ("Hello  world, 1234\n\tnaïve 日本語 🙂", "<|im_start|>user\nHi<|im_end|>\n", " x"):
        assert ours.encode(text) == was.encode(text) == theirs(text).input_ids
    assert ours.chat_template == was.chat_template == theirs.chat_template
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "bfloat16")
    tensors = open_checkpoint(tmp_path / "out").tensors
    assert {t.dtype for t in tensors.values()} == {"BF16", "F32", "int8"}  # norms stay as they are
    want = open_checkpoint(smollm2).dequantize("model.layers.3.self_attn.q_proj.weight", torch.bfloat16)
    assert torch.equal(open_checkpoint(tmp_path / "out").read("model.layers.3.self_attn.q_proj.weight"), want)


def test_code_is_not_copied(models: Any, tmp_path: Path) -> None:
    source, _ = models("qwen3")
    copy = tmp_path / "in"
    copy.mkdir()
    for path in source.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    for name in ("modeling.py", "pytorch_model.bin", "chat_template.jinja", "merges.txt"):
        (copy / name).write_text(name)
    quantize(copy, tmp_path / "out", modules=["*.q_proj"])
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names >= {"chat_template.jinja", "merges.txt", "tokenizer.json", "generation_config.json"}
    assert not names & {"modeling.py", "pytorch_model.bin"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("to", ["mxfp4", "int8", "int4"])
def test_what_is_no_number_is_an_error(models: Any, tmp_path: Path, value: float, to: str) -> None:
    source, _ = models("qwen3")
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in source.iterdir():
        (bad / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 9] = value
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="model.layers.1.mlp.down_proj: holds NaN or infinity"):
        quantize(bad, tmp_path / "out", to=to)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad"]
    quantize(bad, tmp_path / "out", to=to, skip=["*.1.mlp.down_proj"])  # as it is, NaN and all


def test_rows_that_do_not_fit(models: Any, tmp_path: Path) -> None:
    source, _ = models("qwen3")
    with pytest.raises(ConfigError, match=r"int4 needs rows of a multiple of 64 weights.*rows of a multiple of 32"):
        quantize(source, tmp_path / "out", to="int4", group_size=64)
    assert isinstance(quantize(source, tmp_path / "out", to="int4", group_size=64, modules=["*.o_proj"]), Report)
    assert Selection("int4", "qwen3", group_size=64).takes("model.layers.0.self_attn.o_proj.weight", (96, 384))


def test_a_damaged_source_is_refused(models: Any, tmp_path: Path) -> None:
    """What was hashed is checked before damage could get a hash of its own."""
    source, _ = models("qwen3")
    quantize(source, tmp_path / "a", to="mxfp4", modules=["*.mlp.*"])
    shard = tmp_path / "a/model.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1000] ^= 4
    shard.write_bytes(raw)
    with pytest.raises(CheckpointError, match="is damaged"):
        quantize(tmp_path / "a", tmp_path / "b", to="int8")
    assert not (tmp_path / "b").exists()


def test_advice_that_works(models: Any, tmp_path: Path) -> None:
    source, _ = models("qwen3")
    quantize(source, tmp_path / "a", to="int8", skip=["lm_head", "*.embed_tokens"])  # never converted anyway
    for option, value, says in (
        ("modules", ["lm_head"], "never embeddings, head, norms and routers"),
        ("modules", ["down_proj"], r"'\*down_proj\*' would"),
        ("skip", ["*.q_proj,*.k_proj"], "once for each pattern"),
    ):
        with pytest.raises(ConfigError, match=says):
            quantize(source, tmp_path / "b", to="int8", **{option: value})
    with pytest.raises(ConfigError, match="model: must be a name or a path, got int"):
        quantize(5, tmp_path / "b")  # type: ignore[arg-type]
