"""Ranks as they are started, joined under torchrun and ended. On CPUs, through gloo."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from slipstream import LLM, SamplingParams
from slipstream.cli.main import run
from slipstream.engine import worker
from slipstream.errors import CheckpointError, ConfigError, RankError
from slipstream.parallel import launch
from slipstream.parallel.launch import Others
from tests.cli.tiny import write_chat_model
from tests.parallel.front import OPTIONS

ROOT = Path(__file__).parents[2]
PARAMS = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True)
PROMPTS = [[7, 3, 90, 4, 4, 61], list(range(40)), [11]]
ENV = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
WORDS = [
    "generate", "the tide", "--max-new-tokens", "9", "--temperature", "0", "--dtype", "float32", "--device", "cpu",
    "--max-model-len", "128", "--kv-cache-memory-bytes", "8MiB", "--json",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("launch") / "model")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    gc.collect()
    end = time.monotonic() + 5
    while left := [p for p in Path("/proc").glob("[0-9]*") if is_rank(p)]:
        assert time.monotonic() < end, left
        time.sleep(0.05)
    assert not dist.is_initialized()


def is_rank(process: Path) -> bool:
    """Whether it is a rank that this process started."""
    try:
        parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        return parent == os.getpid() and b"slipstream.engine.rank" in (process / "cmdline").read_bytes()
    except OSError:
        return False


def two(folder: Path, **options: Any) -> LLM:
    return LLM(folder, tensor_parallel_size=2, **{**OPTIONS, **options})


def answers(llm: LLM) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS)]


def test_the_same_tokens_one_model_after_another(folder: Path) -> None:
    want = answers(LLM(folder, **OPTIONS))
    for options in ({}, {"async_scheduling": True}, {"tensor_parallel_size": 3}):
        llm = LLM(folder, **{"tensor_parallel_size": 2, **OPTIONS, **options})
        assert answers(llm) == want, options
        with pytest.raises(ConfigError, match="let go of that one first"):
            two(folder)
        sampled = SamplingParams(seed=5, logprobs=2, presence_penalty=0.5, max_new_tokens=9)
        assert all(len(o.outputs[0].logprobs or []) == 9 for o in llm.generate(PROMPTS, sampled))
        del llm


@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "one by one"])
def test_penalties_count_the_same_tokens_on_every_rank(folder: Path, ahead: bool) -> None:
    """Ranks that choose tokens on their own device have to know what was chosen before, also by rank 0 alone (log-probabilities)."""
    kinds: list[dict[str, Any]] = [
        {"repetition_penalty": 1.8}, {"frequency_penalty": 1.5, "presence_penalty": 0.7}, {"logprobs": 1, "max_new_tokens": 7},
        {"repetition_penalty": 1.4, "temperature": 0.9, "seed": 3}, {}, {"presence_penalty": 2.0, "max_new_tokens": 31},
    ]  # fmt: skip
    params = [SamplingParams(**{"temperature": 0, "max_new_tokens": 25, "ignore_eos": True, **kind}) for kind in kinds]
    prompts = [[5 + i, 9, 40 + 3 * i] * (1 + i % 3) for i in range(len(kinds))]
    found = []
    for size in (1, 2):
        llm = LLM(folder, **{**OPTIONS, "tensor_parallel_size": size, "async_scheduling": ahead, "max_num_seqs": 4})
        found.append([o.outputs[0].token_ids for o in llm.generate_batch(prompts, params, progress=False)])
        del llm
    assert found[0] == found[1]


def test_what_cannot_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cannot share cuda:1"):
        two(folder, device="cuda:1")
    with monkeypatch.context() as patch:
        patch.setattr(Others, "start", lambda *_: pytest.fail("ranks were started for what is known before"))
        with pytest.raises(ConfigError, match="tensor_parallel_size: 64 ranks cannot share 4 heads"):
            LLM(folder, tensor_parallel_size=64, **OPTIONS)
        with pytest.raises(ConfigError, match="enable_expert_parallel: a llama model has no experts"):
            two(folder, enable_expert_parallel=True)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="3 ranks"):
        two(folder)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        two(folder)


def test_what_fails_in_a_rank_while_it_loads_has_its_type(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = Others.start
    monkeypatch.setattr(Others, "start", lambda self, words: start(self, {**words, "model": "/nowhere"}))
    with pytest.raises(CheckpointError, match="/nowhere"):
        two(folder)


@pytest.mark.parametrize("name", ["_default_params", "_tokenizer", "_eos"])
def test_what_fails_on_rank_0_ends_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(f"slipstream.llm.{name}", fail)
    with pytest.raises(ZeroDivisionError):
        two(folder)


def test_ctrl_c_while_it_starts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hear = Others.hear

    def interrupted(self: Others, name: str) -> list[Any]:
        if name == "started":
            os.kill(os.getpid(), signal.SIGINT)
        return hear(self, name)

    monkeypatch.setattr(Others, "hear", interrupted)
    with pytest.raises(KeyboardInterrupt):
        two(folder)


def test_ctrl_c_in_a_step_leaves_the_ranks_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = two(folder)
    want = answers(llm)
    runner = llm.engine.runner._runner  # type: ignore[union-attr]
    launch = runner.launch

    def interrupted(step: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        return launch(step)

    monkeypatch.setattr(runner, "launch", interrupted)
    stream = llm.submit(PROMPTS[0], PARAMS)
    with pytest.raises(KeyboardInterrupt):
        stream.result()
    assert stream.output.outputs[0].finish_reason == "abort"
    monkeypatch.undo()
    assert answers(llm) == want


def break_there(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank gets something else than a step."""
    send = worker.send
    monkeypatch.setattr(worker, "send", lambda _, group: send("no step", group))


def break_here(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise MemoryError("of this rank")

    monkeypatch.setattr(llm.engine.runner._runner, "launch", fail)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("break_one", "said"),
    [
        (break_there, "rank 1 failed: AttributeError: 'str' object"),
        (break_here, "rank 0 failed: MemoryError: of this rank"),
    ],
)
def test_a_step_that_fails_on_one_rank(
    folder: Path, monkeypatch: pytest.MonkeyPatch, break_one: Callable[..., None], said: str
) -> None:
    llm = two(folder, max_num_seqs=2)
    break_one(llm, monkeypatch)
    streams = [llm.submit(prompt, PARAMS) for prompt in PROMPTS]
    with pytest.raises(RankError, match=said):
        streams[0].result()
    assert [s.output.outputs[0].finish_reason for s in streams] == ["error"] * 3, "also who waited in the queue"
    monkeypatch.undo()
    for _ in range(2):
        with pytest.raises(RankError, match=said):
            llm.generate(PROMPTS, PARAMS)
    results = [o.outputs[0] for o in llm.generate_batch(PROMPTS, PARAMS)]
    assert all(r.finish_reason == "error" and said in str(r.error) for r in results)
    assert answers(two(folder)) == answers(LLM(folder, **OPTIONS)), "a new one, beside the broken one"


def test_the_log_of_a_rank_is_in_the_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = two(folder)
    break_there(llm, monkeypatch)
    with pytest.raises(RankError, match="Traceback|AttributeError"):
        answers(llm)


def test_the_command(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def said(*more: str) -> str:
        assert run([*WORDS[:1], str(folder), *WORDS[1:], *more]) == 0
        out = capfd.readouterr().out
        return out[: out.index('"usage"')]

    assert said("--tensor-parallel-size", "2") == said()


# -- torchrun ----------------------------------------------------------------------------------------------------------


def torchrun(*words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "slipstream", *words]
    return subprocess.run(
        command, env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
    )


def alone(folder: Path) -> str:
    command = [sys.executable, "-m", "slipstream", WORDS[0], str(folder), *WORDS[1:]]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, check=True).stdout


def test_torchrun(folder: Path) -> None:
    done = torchrun(WORDS[0], str(folder), *WORDS[1:], "--tensor-parallel-size", "2")
    assert done.returncode == 0, done.stderr
    want = alone(folder)
    assert done.stdout.partition('"usage"')[0] == want.partition('"usage"')[0]


@pytest.mark.parametrize("size", ["1", "3"])
def test_torchrun_with_another_number_of_ranks(folder: Path, size: str) -> None:
    done = torchrun(WORDS[0], str(folder), *WORDS[1:], "--tensor-parallel-size", size)
    assert done.returncode and "the launcher has started 2 ranks" in done.stderr and not done.stdout


def test_torchrun_of_what_needs_no_ranks(folder: Path) -> None:
    done = torchrun("explain", str(folder), "--device", "cpu", "--tensor-parallel-size", "2")
    assert done.returncode == 0 and done.stdout.count("Plan for") == 1, done.stderr


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them."""
    names = (f"slip{os.getpid()}a", f"slip{os.getpid()}b")

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for i, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as e:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        pytest.skip(f"network namespaces cannot be made: {e}")
    yield names
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_two_hosts(folder: Path, hosts: tuple[str, str]) -> None:
    """torchrun on each of two hosts, two ranks each."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2",
                "--master-addr", "10.77.0.1", "--master-port", "29411"]  # fmt: skip
    words = ["-m", "slipstream", WORDS[0], str(folder), *WORDS[1:], "--tensor-parallel-size", "4"]
    env = {**ENV, "GLOO_SOCKET_IFNAME": "cable"}
    ranks = [
        subprocess.Popen(["ip", "netns", "exec", host, *torchrun, "--node-rank", str(i), *words], env=env, cwd=ROOT,
                         stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i, host in enumerate(hosts)
    ]  # fmt: skip
    (out, error), (other, more) = [r.communicate(timeout=200) for r in ranks]
    assert [r.returncode for r in ranks] == [0, 0], error + more
    assert out.partition('"usage"')[0] == alone(folder).partition('"usage"')[0] and not other


def test_graphs_are_gone_before_their_group_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL waits for the graphs that have it in them, also where all of the model goes at once, by the garbage collector."""
    ended: list[str] = []

    class Graph:
        def __del__(self) -> None:
            ended.append("graph")

    others = launch.Others(1)
    group: Any = object()
    others.group = group
    whole = SimpleNamespace(is_initialized=lambda: True, group=SimpleNamespace(WORLD=group))
    monkeypatch.setattr(launch, "dist", whole)
    monkeypatch.setattr(launch, "_leave", lambda group: ended.append("group") or True)
    crew = object.__new__(worker.Crew)
    crew._others, crew.wires = others, SimpleNamespace(words=())  # type: ignore[assignment]
    crew._finalizer = weakref.finalize(crew, others.close)
    runner: Any = SimpleNamespace(decoder=SimpleNamespace(recorded={1: Graph()}))
    runner.leader = worker.Leader(runner, crew)
    del crew, runner
    gc.collect()
    assert ended == ["graph", "group"]
