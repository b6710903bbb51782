"""kernelize on tiny models of transformers: the same logits and the same answers, and every layer accounted for."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from slipstream.bridge import Report, kernelize
from slipstream.bridge.attention import Step
from slipstream.errors import ConfigError, KernelError, TrustError
from tests.ops import repositories as repos
from tests.parity.tiny import WINDOW, save

LONG = 3 * WINDOW
NAMES = ("llama", "llama-biases-tied", "gpt_oss", "qwen3_moe-sliding", "mixtral", "gemma2", "phi3", "olmo2", "mistral")


def make(name: str, folder: Path) -> Any:
    save(name, folder)
    options = {"dtype": torch.float32, "attn_implementation": "eager"}  # its sdpa forgets Gemma 2's soft-capping
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.eval()


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(sum(shape)))


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    found: torch.Tensor = model(tokens, **options).logits
    return found


def fates(report: Report) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for layer in report.layers:
        found.setdefault(layer.kind, set()).add((layer.now or "left").split("[")[0])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_before(name: str, tmp_path: Path) -> None:
    model, tokens = make(name, tmp_path), ids(2, LONG)
    want = logits(model, tokens)
    report = kernelize(model, "builtin")
    got = logits(model, tokens)
    assert (got - want).abs().max() < 1e-3
    assert {layer.now.split("[")[0] for layer in report.changed if layer.now} >= {"attention"}
    report.undo()
    assert torch.equal(logits(model, tokens), want)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_what_changed_really_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each op that the report names is called once for each of its layers in a forward pass."""
    from slipstream.ops import activation, attention, moe, norm
    from slipstream.ops.choose import Choice, choose
    from slipstream.ops.used import Used

    used = Used()

    def counting(op: str, impls: Any, case: Any, *more: Any, **options: Any) -> Choice:
        found = choose(op, impls, case)
        return Choice(op, found.name, found.reason, used.counted(found), found.rejected)

    monkeypatch.setattr("slipstream.bridge.kernelize.pick", counting)
    assert activation and attention and moe and norm
    model = make(name, tmp_path)
    report = kernelize(model, "builtin")
    used.calls.clear()
    logits(model, ids(1, 9))
    said: dict[str, int] = {}
    for layer in report.changed:
        op = str(layer.now).split("[")[0]
        said[op] = said.get(op, 0) + 1
    ran = {op: calls for (op, _), calls in used.calls.items() if op in said}
    assert ran == said
    assert said == (
        {"norm": 7, "attention": 3, "moe": 3} if name == "gpt_oss" else {"norm": 7, "attention": 3, "activation": 3}
    )


def test_the_report_lists_every_layer(tmp_path: Path) -> None:
    model = make("gpt_oss", tmp_path)
    leaves = {name for name, m in model.named_modules() if next(m.children(), None) is None}
    kinds = {name: type(m).__name__ for name, m in model.named_modules()}
    report = kernelize(model, "builtin")
    listed = {layer.name for layer in report.layers}
    assert leaves <= listed and len(listed) == len(report.layers)
    assert all(layer.kind == kinds[layer.name] and layer.why for layer in report.layers)
    assert fates(report) == {
        "GptOssRMSNorm": {"norm"}, "GptOssAttention": {"attention"}, "GptOssExperts": {"moe"}, "GptOssTopKRouter": {"left"},
        "Linear": {"left"}, "Embedding": {"left"}, "GptOssRotaryEmbedding": {"left"},
    }  # fmt: skip
    text = str(report)
    assert text.startswith(f"{len(report.changed)} of {len(report.layers)} layers changed")
    assert "3 x GptOssExperts" in text and "a matrix product, which stays torch's" in text
    said = report.to_dict()
    assert said["layers"][0]["name"] == report.layers[0].name
    assert {c["op"] for c in said["choices"]} == {"norm", "attention", "moe", "activation"}
    assert {"implementation": "triton", "why": "is for CUDA devices"} in said["choices"][0]["rejected"]


def test_activations_are_found_by_their_numbers(tmp_path: Path) -> None:
    report = kernelize(make("llama-biases-tied", tmp_path), "builtin")
    assert fates(report)["LlamaMLP"] == {"activation"}
    assert next(x.why for x in report.layers if x.name.endswith("mlp.act_fn")) == "computed by the layer around it"


def test_a_norm_that_computes_something_else_is_left_with_the_reason(tmp_path: Path) -> None:
    report = kernelize(make("gemma2", tmp_path), "builtin")
    norms = [layer for layer in report.layers if layer.kind == "Gemma2RMSNorm"]
    assert norms and all(layer.now is None and "gives other numbers than this layer" in layer.why for layer in norms)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "mistral"])
def test_generate_with_padding_and_a_cache(name: str, tmp_path: Path) -> None:
    """Prompts of different lengths, padded on the left, and answers far past the window."""
    model, tokens = make(name, tmp_path), ids(3, LONG)
    mask = torch.ones_like(tokens)
    mask[0, :7], mask[2, : LONG - 2] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    want = model.generate(tokens, **options)
    plain = logits(model, tokens, attention_mask=mask)
    kernelize(model, "builtin")
    assert torch.equal(model.generate(tokens, **options), want)
    got = logits(model, tokens, attention_mask=mask)
    assert (got - plain)[mask.bool()].abs().max() < 1e-3


def test_padding_behind_does_not_matter_to_what_stands_before_it(tmp_path: Path) -> None:
    model, tokens = make("llama", tmp_path), ids(2, 12)
    mask = torch.ones_like(tokens)
    mask[1, 8:] = 0
    want = logits(model, tokens, attention_mask=mask)
    kernelize(model, "builtin")
    got = logits(model, tokens, attention_mask=mask)
    assert (got - want)[mask.bool()].abs().max() < 1e-3


def test_a_static_cache(tmp_path: Path) -> None:
    model, tokens = make("gpt_oss", tmp_path), ids(2, 9)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "cache_implementation": "static"}
    options |= {"disable_compile": True, "attention_mask": torch.ones_like(tokens)}
    want = model.generate(tokens, **options)
    kernelize(model, "builtin")
    assert torch.equal(model.generate(tokens, **options), want)


@pytest.mark.parametrize(("before", "after", "left"), [(2e-6, 9e-6, True), (9e-6, 2e-6, False)])
def test_by_itself_nothing_becomes_slower(
    before: float, after: float, left: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = [before, after] * 2  # of the first norm and the first MLP
    monkeypatch.setattr("slipstream.bridge.kernelize.seconds", lambda run, device, repeats: times.pop(0))
    report = kernelize(make("llama", tmp_path))
    for kind in ("LlamaRMSNorm", "LlamaMLP"):
        assert (fates(report).get(kind) == {"left"}) is left
    why = next(layer.why for layer in report.layers if layer.kind == "LlamaMLP")
    assert ("is slower than it here: 9 us against 2 us for 64 tokens" in why) is left
    assert not times


def test_parameters_keep_their_names_and_numbers(tmp_path: Path) -> None:
    model = make("llama", tmp_path)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    kernelize(model, "builtin")
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], t) for n, t in before.items())
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(again.state_dict()[n], t) for n, t in before.items())


def test_what_the_kernels_cannot_follow_is_refused(tmp_path: Path) -> None:
    model, tokens = make("llama", tmp_path), ids(1, 8)
    kernelize(model, "builtin")
    with pytest.raises(ConfigError, match="four dimensions"):
        logits(model, tokens, attention_mask=torch.ones(1, 1, 8, 8, dtype=torch.bool))
    hole = torch.ones_like(tokens)
    hole[0, 4] = 0
    with pytest.raises(ConfigError, match="padding inside"):
        logits(model, tokens, attention_mask=hole)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    with pytest.raises(ConfigError, match="packed"):
        logits(model, tokens, position_ids=packed, use_cache=False)
    with pytest.raises(ConfigError, match="cannot be trained"):
        model.train()


def test_gradients_are_an_error_and_not_missing_in_silence(tmp_path: Path) -> None:
    for name in ("llama", "gpt_oss"):
        model = make(name, tmp_path / name)
        report = kernelize(model, "builtin")
        loss = model(ids(1, 8)).logits.sum()
        with pytest.raises(ConfigError, match="no derivatives"):
            loss.backward()
        report.undo()
        model(ids(1, 8)).logits.sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_gradients_of_sinks_alone_are_an_error_too(tmp_path: Path) -> None:
    model = make("gpt_oss", tmp_path)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("sinks"))
    kernelize(model, "builtin")
    with pytest.raises(ConfigError, match="no derivatives"):
        model(ids(1, 8)).logits.sum().backward()


def test_weights_that_change_afterwards_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the copies that a kernel made for itself: MegaBlocks has its experts' matrices in another layout."""
    pytest.importorskip("kernels")
    from slipstream.trust import Policy

    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path / "home"))
    tokens, experts = ids(2, 9), repos.publish(repos.MEGABLOCKS, tmp_path / "experts")
    options = repos.pin(tmp_path, experts)
    policy = Policy.find(options["kernels_lock"], options["kernels_policy"])
    for name, kernels in (("llama", "builtin"), ("gpt_oss", {"moe": str(experts)})):
        model, other = make(name, tmp_path / name), make(name, tmp_path / name)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        want, plain = logits(other, tokens), logits(model, tokens)
        kernelize(model, kernels, policy=policy)
        assert (logits(model, tokens) - plain).abs().max() < 1e-3
        model.load_state_dict(other.state_dict(), assign=name == "llama")
        assert (logits(model, tokens) - want).abs().max() < 1e-3 < (want - plain).abs().max()
    assert logits(model.to(torch.float64), tokens).dtype == torch.float64


def test_a_projection_that_is_wrapped_afterwards_is_called(tmp_path: Path) -> None:
    """As adapters are put in."""
    model, tokens = make("llama", tmp_path), ids(1, 8)
    kernelize(model, "builtin")

    class Twice(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    mlp = model.model.layers[1].mlp
    plain, old = logits(model, tokens), mlp.gate_proj
    mlp.gate_proj = Twice(old.in_features, old.out_features, bias=False)
    mlp.gate_proj.weight = old.weight
    wrapped = logits(model, tokens)
    mlp.gate_proj = old
    old.register_forward_hook(lambda module, args, out: 2 * out)
    assert torch.equal(logits(model, tokens), wrapped) and not torch.allclose(wrapped, plain, atol=1e-3)


def test_a_layer_with_hooks_is_left(tmp_path: Path) -> None:
    model, seen = make("llama", tmp_path), []
    layer = model.model.layers[1]
    for hooked in (layer.mlp.act_fn, layer.input_layernorm):
        hooked.register_forward_hook(lambda module, *_: seen.append(module))
    report = kernelize(model, "builtin")
    left = [x.name for x in report.left if x.why == "it has hooks, which would not be called"]
    assert left == ["model.layers.1.mlp", "model.layers.1.input_layernorm"]
    seen.clear()
    logits(model, ids(1, 5))
    assert seen == [layer.input_layernorm, layer.mlp.act_fn]


def test_a_norm_in_another_precision_is_left(tmp_path: Path) -> None:
    model = make("llama", tmp_path).to(torch.bfloat16)
    model.model.norm.float()
    report = kernelize(model, "builtin")
    (why,) = (x.why for x in report.left if x.name == "model.norm")
    assert "bfloat16 and not" in why and "float32 as this layer does" in why


def test_what_is_kernelized_is_copied_freed_and_not_done_twice(tmp_path: Path) -> None:
    model, tokens = make("gpt_oss", tmp_path), ids(1, 8)
    report = kernelize(model, "builtin")
    want = logits(model, tokens)
    assert torch.equal(logits(copy.deepcopy(model), tokens), want)
    with pytest.raises(ConfigError, match=r"has been here before; call undo\(\)"):
        kernelize(model, "builtin")
    report.undo()
    kernelize(model, "builtin")
    assert torch.equal(logits(model, tokens), want)
    experts = weakref.ref(model.model.layers[0].mlp.experts)
    del model, report
    gc.collect()
    assert experts() is None


def test_models_that_it_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model of transformers"):
        kernelize(torch.nn.Linear(2, 3))
    model = make("llama", tmp_path)
    with pytest.raises(ConfigError, match="eval"):
        kernelize(model.train())
    with pytest.raises(ConfigError, match="no op 'linear'"):
        kernelize(model.eval(), {"linear": "a/b"})
    with pytest.raises(KernelError, match="no implementation is called 'fast'"):
        kernelize(model, {"norm": "fast"})
    for op in ("rotary", "moe"):
        with pytest.raises(KernelError, match=f"{op}: 'torch' was asked for, but no layer"):
            kernelize(model, {op: "torch"})


def test_kernels_of_repositories_under_the_same_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("kernels")
    from slipstream.trust import Policy

    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    model, tokens = make("llama", tmp_path / "model"), ids(2, 9)
    want = logits(model, tokens)
    norm, act = (repos.publish(f, tmp_path / n) for n, f in (("norm", repos.LIGER), ("act", repos.ACTIVATION)))
    options = repos.pin(tmp_path, norm, act)
    policy = Policy.find(options["kernels_lock"], options["kernels_policy"])
    named = {"norm": f"{norm}:LigerRMSNorm", "activation": str(act)}
    report = kernelize(model, named, policy=policy)
    assert (logits(model, tokens) - want).abs().max() < 1e-3
    assert {layer.now for layer in report.changed} >= {f"norm[{named['norm']}]", f"activation[{act}]"}
    assert all("sha256" in layer.source for layer in report.changed if str(tmp_path) in str(layer.now))
    report.undo()
    with pytest.raises(TrustError):
        kernelize(model, named, policy=Policy())
    assert torch.equal(logits(model, tokens), want)  # nothing of it was left half done


def test_rows_of_a_step() -> None:
    """Three sequences of 4 queries after 2 keys, with paddings of 0, 3 and 5 keys."""
    step = Step(4, 2, (0, 3, 5), None, torch.device("cpu"))
    assert step.rows is not None
    assert step.rows.tolist() == [0, 1, 2, 3, 5, 6, 7, 11]
    batch = step.batch(10, 2, 8)
    assert batch.query_starts == (0, 4, 7, 8) and batch.starts == (2, 0, 0)
    assert batch.groups[0].pages.tolist() == [[0, 1, 2, 3, 4, 5], [13, 14, 15, 0, 0, 0], [25, 0, 0, 0, 0, 0]]
    assert [(c.first, c.end, c.slots) for c in batch.groups[0].contexts] == [
        (0, 6, slice(0, 6)), (0, 3, slice(13, 16)), (0, 1, slice(25, 26)),
    ]  # fmt: skip


@pytest.mark.parametrize("cut", [slice(None), slice(20, None)])
def test_the_cache_is_seen_as_slots_without_a_copy(cut: slice) -> None:
    """A sliding cache is a part of one."""
    from slipstream.bridge.attention import _slots

    key, value = (t[:, :, cut] for t in torch.randn(2, 3, 2, 50, 16))
    keys, values, stride = _slots(key, value, copies=False)
    assert keys.data_ptr() == key.data_ptr() and values.data_ptr() == value.data_ptr()
    for i in range(3):
        rows = slice(i * stride, i * stride + key.shape[2])
        assert torch.equal(keys[rows], key[i].transpose(0, 1)) and torch.equal(values[rows], value[i].transpose(0, 1))
    keys, values, stride = _slots(key, value, copies=True)
    assert stride == key.shape[2] and torch.equal(keys.view(3, stride, 2, 16), key.transpose(1, 2))
