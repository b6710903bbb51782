"""Generation over a dataset: rows in, rows out. The ring of two workers on a real Ray is slow, as it starts one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipstream import LLM, ConfigError, RequestError, SamplingParams, distributed
from slipstream.distributed import COLUMNS, Generator
from tests.engine.tiny import LLAMA, write

OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "kv_cache_memory_bytes": 4 << 20,
    "max_num_seqs": 8,
    "num_threads": 1,
}
PARAMS = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write(tmp_path_factory.mktemp("model"), LLAMA))


def column(*values: Any) -> np.ndarray:
    found = np.empty(len(values), object)
    found[:] = values
    return found


def test_rows_keep_what_they_have_and_get_their_answers(model: str) -> None:
    """Those that cannot be served say why."""
    prompts = column("the tide", None, np.array([7, 9, 40]), "x" * 600, "", "in order")
    generator = Generator(model, prompt_column="text", sampling_params=PARAMS, **OPTIONS)
    found = generator({"text": prompts, "id": np.arange(6)})
    assert list(found) == ["text", "id", *COLUMNS] and found["id"].tolist() == list(range(6))
    llm, params = LLM(model, **OPTIONS), SamplingParams(**PARAMS)
    for i, prompt in ((0, "the tide"), (2, [7, 9, 40]), (5, "in order")):
        (want,) = llm.generate([prompt], params)
        assert found["generated_text"][i] == want.text and found["num_generated_tokens"][i] == 6
        assert found["finish_reason"][i] == "length" and not found["error"][i]
    for i, why in ((1, "prompt"), (3, "512"), (4, "empty")):
        assert found["finish_reason"][i] == "error" and why in found["error"][i] and not found["generated_text"][i], i


def test_columns_that_are_missing_or_taken(model: str) -> None:
    generator = Generator(model, **OPTIONS)
    with pytest.raises(RequestError, match="no prompt; the rows have text, id"):
        generator({"text": column("a"), "id": column(1)})
    with pytest.raises(RequestError, match="a column error already"):
        generator({"prompt": column("a"), "error": column("")})


def test_ray_that_is_not_there_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(ConfigError, match=r"slipstream\[ray\]"):
        distributed.generate([], model="any")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    found = pytest.importorskip("ray", reason="pip install 'slipstream[ray]'")
    pytest.importorskip("ray.data")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    found.init(
        num_cpus=3, include_dashboard=False, object_store_memory=1 << 28, logging_level="error", log_to_driver=False
    )
    yield found
    found.shutdown()


@pytest.mark.slow
def test_mistakes_are_told_before_anything_runs(ray: Any, model: str) -> None:
    rows = ray.data.from_items([{"prompt": "a"}])
    with pytest.raises(RequestError, match="got list"):
        distributed.generate([{"prompt": "a"}], model=model)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did you mean max_num_seqs"):
        distributed.generate(rows, model=model, max_num_seq=3)
    for concurrency in (0, (2, 1)):
        with pytest.raises(ConfigError, match="concurrency"):
            distributed.generate(rows, model=model, concurrency=concurrency)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_worker_that_is_killed_loses_no_row(ray: Any, model: str, tmp_path: Path) -> None:
    """1,000 prompts, of which one cannot be served; two engines, of which one dies in the middle of a batch."""

    class Marked(Generator):
        """Leaves its process's number, and when it works how far it is."""

        def __init__(self, folder: str, **told: Any) -> None:
            super().__init__(**told)
            self.mark = Path(folder, str(os.getpid()))
            self.mark.touch()

        def __call__(self, batch: Any) -> Any:
            with self.mark.open("a") as file:
                file.write("begun\n")
            found = super().__call__(batch)
            with self.mark.open("a") as file:
                file.write("done\n")
            return found

    marks = tmp_path / "marks"
    marks.mkdir()
    rows = ray.data.from_items(
        [{"id": i, "prompt": f"the tide {i}"} if i != 555 else {"id": i, "prompt": ""} for i in range(1000)]
    )
    told = {"folder": str(marks), "model": model, "sampling_params": PARAMS, **OPTIONS}
    answered = rows.map_batches(
        Marked, fn_constructor_kwargs=told, batch_format="numpy", batch_size=20, num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=2),
    )  # fmt: skip
    killed: list[int] = []

    def kill() -> None:
        while not killed:
            for mark in marks.iterdir():
                lines = mark.read_text().split()
                if len(list(marks.iterdir())) == 2 and lines.count("done") >= 3 and lines[-1] == "begun":
                    killed.append(int(mark.name))
                    os.kill(int(mark.name), signal.SIGKILL)
                    return
            time.sleep(0.002)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    found = answered.take_all()
    assert len(killed) == 1 and len(list(marks.iterdir())) == 3, "and a third took its place"
    assert sorted(row["id"] for row in found) == list(range(1000))
    want = LLM(model, **OPTIONS).generate([f"the tide {i}" for i in range(1000)], SamplingParams(**PARAMS))
    for row in found:
        if row["id"] == 555:
            assert row["finish_reason"] == "error" and "empty" in row["error"]
        else:
            assert row["generated_text"] == want[row["id"]].text and not row["error"], row


@pytest.mark.slow
def test_the_example(ray: Any, model: str) -> None:
    ray.shutdown()
    ran = subprocess.run(
        [sys.executable, ROOT / "examples/ray_data.py", model], capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    lines = [line for line in ran.stdout.splitlines() if "A short story set in" in line]
    assert len(lines) == 5 and all(line.partition(":")[2].strip() for line in lines)
