"""Kernels of repositories in a whole model: chosen with a reason, forced or refused, and counted as they run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import LLM, SamplingParams
from slipstream.checkpoint.open import open_checkpoint
from slipstream.config import EngineConfig
from slipstream.errors import ConfigError, KernelError, TrustError
from slipstream.ops import candidate
from slipstream.plan import Plan, make_plan
from tests.engine import tiny
from tests.ops import repositories as repos
from tests.parity.test_architectures import all_logits

PROMPTS = [[3, 9, 27, 81, 12], [5, 7]]
GREEDY = SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True)
OFF = repos.ACTIVATION["__init__.py"].replace("out.copy_(F.silu(gate) * up)", "out.copy_(F.silu(gate) * up * 1.5)")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "model", tiny.LLAMA)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("kernels")
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(model: Path, **options: Any) -> Plan:
    return make_plan(EngineConfig(device="cpu", **options), open_checkpoint(model))


def row(made: Plan, op: str) -> dict[str, Any]:
    return next(c for c in made.to_dict()["choices"] if c["op"] == op)


def test_repositories_run_in_the_model_and_are_counted(model: Path, home: Path) -> None:
    norm, act = (
        repos.publish(files, home / name) for name, files in (("norm", repos.LIGER), ("act", repos.ACTIVATION))
    )
    named = {"norm": f"{norm}:LigerRMSNorm", "activation": str(act)}
    llm = LLM(
        model, device="cpu", kernels=named, count_calls=True, async_scheduling=False, **repos.pin(home, norm, act)
    )
    assert {c.op: c.name for c in llm.plan.choices if c.source} == named
    assert llm.plan.ops.used is not None
    llm.plan.ops.used.calls.clear()
    got = llm.generate(PROMPTS, GREEDY)
    calls = llm.plan.ops.used.calls
    steps, layers = 8, 4  # both prompts in the first
    assert calls["norm", named["norm"]] == steps * (2 * layers + 1)
    assert calls["activation", named["activation"]] == calls["attention", row(llm.plan, "attention")["implementation"]]
    assert calls["activation", named["activation"]] == steps * layers
    want = LLM(model, device="cpu").generate(PROMPTS, GREEDY)
    assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in want]
    source = row(llm.plan, "norm")["source"]
    assert str(norm) in source and "torch-cpu" in source and "sha256" in source


def test_nothing_is_counted_or_wrapped_unless_it_was_asked_for(model: Path) -> None:
    made = plan(model)
    assert made.ops.used is None
    assert made.ops.add_norm is next(c.fn for c in made.choices if c.op == "norm")


def test_a_rotation_of_a_repository_takes_the_place_of_the_fused_op_and_says_so(model: Path, home: Path) -> None:
    rotary = repos.publish(repos.ROTARY, home / "rotary")
    llm = LLM(model, device="cpu", kernels={"rotary": str(rotary)}, **repos.pin(home, rotary))
    found = row(llm.plan, "attention_input")
    assert found["implementation"] == str(rotary)
    assert {"implementation": "torch", "why": f"{rotary} was forced"} in found["rejected"]
    want = LLM(model, device="cpu").generate(PROMPTS, GREEDY)
    assert [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY)] == [o.outputs[0].token_ids for o in want]


def test_attention_by_the_name_that_users_know(model: Path, home: Path) -> None:
    flash = repos.publish(repos.FLASH3, home / "flash")
    llm = LLM(model, device="cpu", dtype="bfloat16", attn_implementation=str(flash), **repos.pin(home, flash))
    assert row(llm.plan, "attention")["implementation"] == str(flash)
    want = LLM(model, device="cpu", dtype="bfloat16", attn_implementation="sdpa")
    ours, theirs = (torch.cat(all_logits(m, PROMPTS)) for m in (llm, want))
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_experts_in_mxfp4_stay_so_with_other_kernels_beside(home: Path) -> None:
    """A norm of a repository and fused experts: each runs, and neither turns the other or the packed weights off."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GptOssConfig(
        vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=5, num_experts_per_tok=3, max_position_embeddings=256,
        sliding_window=16, layer_types=["sliding_attention", "full_attention"], eos_token_id=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ).to_dict()  # fmt: skip
    folder = tiny.write(home / "oss", tiny.LLAMA)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    norm = repos.publish(repos.LIGER, home / "norm")
    experts = repos.publish(repos.TRITON_KERNELS, home / "experts")
    options = {"device": "cpu", "weights": "random", "quantization": "mxfp4", **repos.pin(home, norm, experts)}
    both = {"norm": f"{norm}:LigerRMSNorm", "moe": str(experts)}
    made = plan_random(folder, kernels=both, **options)
    plain = plan_random(folder, **{k: v for k, v in options.items() if not k.startswith("kernels_")})
    for op in ("attention", "attention_input", "router", "sampling"):
        assert row(made, op) == row(plain, op)
    assert {op: row(made, op)["implementation"] for op in both} == both
    packed = [w for w in made.to_dict()["weights"] if w["held"] == "mxfp4"]
    assert packed and made.to_dict()["weights"] == plain.to_dict()["weights"]
    llm = LLM(folder, kernels=both, count_calls=True, **options)
    assert llm.plan.ops.used is not None
    llm.generate(PROMPTS, GREEDY)
    assert llm.plan.ops.used.calls["moe", str(experts)] == 2 * 8
    assert llm.plan.ops.used.calls["norm", both["norm"]] == 5 * 8
    assert llm.plan.why["activation"] == f"is part of moe[{experts}], so nothing calls reference"
    with pytest.raises(KernelError, match="activation: 'reference' was asked for, but it is part of moe"):
        plan_random(folder, kernels=both | {"activation": "reference"}, **options)


def plan_random(folder: Path, **options: Any) -> Plan:
    from slipstream.checkpoint.open import open_random

    return make_plan(EngineConfig(**options), open_random(folder, 0))


BROKEN = {
    "wrong": ({"__init__.py": OFF}, r"is wrong: it differs from the reference by 0\.\d+"),
    "broken at import": ({"__init__.py": "import a_package_that_is_not_there\n"}, "importing it failed"),
    "of another op": (repos.LIGER, "has no silu_and_mul"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_forced_and_cannot_run_is_an_error(name: str, model: Path, home: Path) -> None:
    files, why = BROKEN[name]
    act = repos.publish(files, home / "act")
    with pytest.raises(KernelError, match=why):
        plan(model, kernels={"activation": str(act)}, **repos.pin(home, act))


@pytest.mark.parametrize("name", BROKEN)
def test_by_itself_it_is_passed_over_with_the_same_reason(
    name: str, model: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, why = BROKEN[name]
    act = repos.publish(files, home / "act")
    monkeypatch.setattr(candidate, "KNOWN", {"activation": (str(act),)})
    found = row(plan(model, kernels="auto", **repos.pin(home, act)), "activation")
    assert found["implementation"] == "reference"
    assert found["rejected"][0]["implementation"] == str(act)
    assert re.search(why, found["rejected"][0]["why"])


def test_for_another_device(model: Path, home: Path) -> None:
    act = repos.publish(repos.ACTIVATION, home / "act", "torch-cuda")
    with pytest.raises(KernelError, match="no build for cpu"):
        plan(model, kernels={"activation": str(act)}, **repos.pin(home, act))


@pytest.mark.parametrize(("ours", "theirs", "taken"), [(2e-6, 9e-6, False), (9e-6, 2e-6, True)])
def test_by_itself_it_must_not_be_slower(
    ours: float, theirs: float, taken: bool, model: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    act = repos.publish(repos.ACTIVATION, home / "act")
    monkeypatch.setattr(candidate, "KNOWN", {"activation": (str(act),)})
    clock = iter((ours, theirs))
    monkeypatch.setattr(candidate, "seconds", lambda run, device: next(clock))
    found = row(plan(model, use_kernels=True, **repos.pin(home, act)), "activation")
    assert (found["implementation"] == str(act)) is taken
    if not taken:
        assert found["rejected"][0]["why"] == "is slower here: 9.0 us against 2.0 us for 64 tokens"


def test_by_itself_nothing_is_opened_that_is_not_pinned(model: Path, home: Path) -> None:
    found = row(plan(model, kernels="auto"), "activation")
    assert found["implementation"] == "reference"
    assert found["rejected"][0]["implementation"] == "kernels-community/activation"
    assert "kernels-policy.toml" in found["rejected"][0]["why"]


def test_what_is_forced_and_not_pinned_is_not_trusted(model: Path, home: Path) -> None:
    act = repos.publish(repos.ACTIVATION, home / "act")
    options = repos.pin(home, act)
    with pytest.raises(TrustError, match="kernels lock kernels-community/activation"):
        plan(model, kernels={"activation": "kernels-community/activation"}, **options)
    (act / "build/torch-cpu/__init__.py").write_text(OFF)  # another one than was pinned
    with pytest.raises(TrustError):
        plan(model, kernels={"activation": str(act)}, **options)


def test_by_itself_what_is_not_what_was_pinned_is_passed_over_aloud(
    model: Path, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    act = repos.publish(repos.ACTIVATION, home / "act")
    monkeypatch.setattr(candidate, "KNOWN", {"activation": (str(act),)})
    options = repos.pin(home, act)
    (act / "build/torch-cpu/__init__.py").write_text(OFF)
    with caplog.at_level("WARNING", logger="slipstream"):
        found = row(plan(model, kernels="auto", **options), "activation")
    assert found["implementation"] == "reference" and "None of it was run" in found["rejected"][0]["why"]
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "is not trusted" in caplog.text


def test_what_would_do_nothing_is_not_taken_in_silence(model: Path, home: Path) -> None:
    with pytest.raises(KernelError, match="moe: 'loop' was asked for, but this model has no experts"):
        plan(model, kernels={"moe": "loop"})


def test_norms_of_heads_stay_with_the_fused_op(home: Path) -> None:
    from tests.parity.tiny import save

    save("qwen3", home / "model")
    norm = repos.publish(repos.LIGER, home / "norm")
    made = plan(home / "model", kernels={"norm": str(norm)}, **repos.pin(home, norm))
    assert made.why["norms of heads"] == f"are part of attention_input[torch]; {norm} computes all others"
    assert "norms of heads" not in plan(home / "model").why


def test_batch_invariance_is_not_given_up_for_a_kernel(model: Path, home: Path) -> None:
    act = repos.publish(repos.ACTIVATION, home / "act")
    with pytest.raises(KernelError, match="same bits in any batch is not known"):
        plan(model, kernels={"activation": str(act)}, batch_invariant=True, **repos.pin(home, act))


def test_reference_runs_plain_torch_everywhere(model: Path) -> None:
    made = plan(model, kernels="reference")
    assert {c.name for c in made.choices} == {"reference"}


def test_an_implementation_of_our_own_is_named_in_the_same_way(model: Path) -> None:
    made = plan(model, kernels={"norm": "reference", "attention": "reference"})
    assert {c.op for c in made.choices if c.reason == "forced"} == {"norm", "attention"}
    with pytest.raises(
        KernelError, match="norm: no implementation is called 'fast'; known are triton, torch, reference"
    ):
        plan(model, kernels={"norm": "fast"})


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "two words": ({"use_kernels": True, "kernels": "builtin"}, "use_kernels: true contradicts"),
    "no kernels, but one": ({"use_kernels": False, "kernels": {"norm": "a/b"}}, "use_kernels: false contradicts"),
    "no kernels, but auto": ({"use_kernels": False, "kernels": "auto"}, "use_kernels: false contradicts"),
    "no kernels, but attention": ({"use_kernels": False, "attn_implementation": "a/b"}, "use_kernels=False forbids"),
    "attention twice": (
        {"kernels": {"attention": "a/b"}, "attn_implementation": "sdpa"},
        "attn_implementation: 'sdpa'",
    ),
    "experts twice": ({"kernels": {"moe": "loop"}, "moe_implementation": "a/b"}, "moe_implementation: 'a/b'"),
    "all but one reference": ({"kernels": "reference", "attn_implementation": "sdpa"}, "'reference' for attention"),
    "no such word": ({"kernels": "fast"}, "must be auto, builtin, reference"),
    "no such op": ({"kernels": {"linear": "a/b"}}, "no op 'linear'"),
    "no name": ({"kernels": {"norm": ""}}, "norm must be org/name"),
    "nothing named": ({"kernels": {}}, "must be auto"),
    "not yes or no": ({"use_kernels": 1}, "true or false"),
    "a lock without use": ({"kernels_lock": "kernels.lock"}, "kernels_lock: has no effect"),
    "a policy without use": ({"kernels": "builtin", "kernels_policy": "p.toml"}, "kernels_policy: has no effect"),
    "a lock that is no path": ({"kernels": "auto", "kernels_lock": 3}, "kernels_lock: must be the path"),
    "auto over ranks": ({"kernels": "auto", "tensor_parallel_size": 2}, "measures kernels on each rank"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_errors(name: str) -> None:
    options, why = CONTRADICTIONS[name]
    with pytest.raises(ConfigError, match=why):
        EngineConfig(**options)


def test_the_same_said_twice_is_none() -> None:
    asked = EngineConfig(kernels={"attention": "a/b"}, attn_implementation="a/b", use_kernels=True).kernels_asked
    assert asked.hub == {"attention": "a/b"} and asked.word == "auto"
    assert EngineConfig(use_kernels=False).kernels_asked.word == EngineConfig().kernels_asked.word == "builtin"


def test_what_is_replayed_counts_as_it_was_recorded() -> None:
    from slipstream.ops.choose import Choice
    from slipstream.ops.used import Used

    used = Used()
    norm = used.counted(Choice("norm", "a", "", lambda x: x + 1, ()))
    act = used.counted(Choice("activation", "b", "", lambda x: x * 2, ()))

    def step() -> int:
        return act(norm(norm(3)))

    def record(run: Any) -> Any:
        run(), run()  # once to warm up, once recorded
        return lambda: 10

    norm(1)
    replay = used.record(record, step)
    assert used.calls == {("norm", "a"): 1}
    assert [replay() for _ in range(3)] == [10, 10, 10]
    assert used.calls == {("norm", "a"): 1 + 2 * 3, ("activation", "b"): 3}
    with pytest.raises(ZeroDivisionError):
        used.record(lambda run: run() / 0, step)
    assert used.calls == {("norm", "a"): 7, ("activation", "b"): 3}


def test_a_counted_linear_kernel_is_otherwise_itself() -> None:
    from slipstream.ops.choose import Choice
    from slipstream.ops.used import Used

    class Kernel:
        few = 3

        def prepare(self) -> str:
            return "laid out"

        def __call__(self, x: int, packed: int, bias: int | None) -> int:
            return x * packed

        def wide(self, x: int, packed: int, out: int | None) -> float:
            return float(x * packed)

    used = Used()
    kernel = used.counted(Choice("linear[dense]", "k", "", Kernel(), ()))
    assert (kernel(2, 3, None), kernel.wide(2, 3, None), kernel.few, kernel.prepare()) == (6, 6.0, 3, "laid out")
    assert not hasattr(kernel, "held_bytes")
    assert used.calls == {("linear[dense]", "k"): 2}


def test_a_log_says_what_runs_and_from_where(model: Path, home: Path, caplog: pytest.LogCaptureFixture) -> None:
    act = repos.publish(repos.ACTIVATION, home / "act")
    with caplog.at_level("INFO", logger="slipstream"):
        plan(model, kernels={"activation": str(act)}, **repos.pin(home, act))
    assert any(r.message.startswith(f"activation runs {act}, ") and "sha256" in r.message for r in caplog.records)
    assert "norm runs torch, our own" in caplog.messages


def test_what_is_two_ops_in_one_is_called_in_decoding_steps_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts as a call of attention. Steps with prompts go through both ops."""
    from slipstream.ops import attention
    from slipstream.ops.attention.reference import attention as attend
    from slipstream.ops.attention_input.reference import attention_input

    sizes: list[int] = []

    def both(qkv: Any, turns: Any, norms: Any, keys: Any, values: Any, batch: Any, group: Any, **options: Any) -> Any:
        sizes.append(len(qkv))
        assert batch.decode_only
        q = attention_input(qkv, turns, norms, keys, values, group.slots)
        return attend(q, keys, values, batch, group, **options)

    want = LLM(model, device="cpu").generate(PROMPTS, GREEDY)
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(attention, "fused", lambda *names: asked.append(names) or both)
    llm = LLM(model, device="cpu", count_calls=True, async_scheduling=False, max_num_batched_tokens=6)
    name = row(llm.plan, "attention")["implementation"]
    assert {*asked} == {(row(llm.plan, "attention_input")["implementation"], name)}
    assert f"part of attention[{name}]" in llm.plan.why["attention_input"]
    assert llm.plan.ops.used is not None
    llm.plan.ops.used.calls.clear()
    got = llm.generate(PROMPTS, GREEDY)
    assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in want]
    calls, layers = llm.plan.ops.used.calls, 4
    # The first step has five tokens and one, the second the last token of a prompt beside an answer: one each, as in all others.
    assert sizes == [2] * 7 * layers + [1] * layers
    assert calls["attention", name] == 9 * layers and calls["attention_input", "torch"] == layers
