"""Offline generation over a Ray Data dataset: engines as workers of `map_batches`, on one machine or on a cluster.

    import ray
    from slipstream import distributed

    rows = ray.data.read_json("prompts.jsonl")  # with a column "prompt"
    answers = distributed.generate(rows, model="Qwen/Qwen3-0.6B", sampling_params={"max_new_tokens": 64}, concurrency=2)
    answers.write_parquet("answers")

A row keeps its columns and gets four: `generated_text`, `num_generated_tokens`, `finish_reason` and `error`, which is empty where all
went well. A row that cannot be served says why there, and all others go on. A worker that dies is started again by Ray, and its rows
are answered again; what it had answered in part is nowhere, so every row is in the result once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slipstream.config import EngineConfig
from slipstream.errors import ConfigError, RequestError
from slipstream.request import SamplingParams

if TYPE_CHECKING:
    import numpy as np
    from ray.data import Dataset

COLUMNS = ("generated_text", "num_generated_tokens", "finish_reason", "error")


class Generator:
    """A model that answers batches of rows. For those who call `map_batches` themselves:

        rows.map_batches(Generator, fn_constructor_kwargs={"model": "Qwen/Qwen3-0.6B"}, batch_format="numpy", batch_size=256,
                         compute=ray.data.ActorPoolStrategy(size=2), num_gpus=1)

    Args:
        model: as LLM takes it; every machine of the cluster has to find it.
        prompt_column: text, or lists of token ids.
        sampling_params: one for all rows; a mapping has the fields of SamplingParams. None takes the model's own.
        options: of the engine, as LLM takes them.

    Raises:
        SlipstreamError: the model cannot run as asked.
    """

    def __init__(
        self,
        model: str,
        *,
        prompt_column: str = "prompt",
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        from slipstream.llm import LLM

        self.prompt_column, self.params = prompt_column, _params(sampling_params)
        self.llm = LLM(model, **options)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Raises RequestError: the columns are not as they should be. RankError: a rank of the model is gone."""
        import numpy as np

        from slipstream.engine.worker import Leader

        if self.prompt_column not in batch:
            raise RequestError(f"prompt_column: there is no {self.prompt_column}; the rows have {', '.join(batch)}")
        if taken := [name for name in COLUMNS if name in batch]:
            raise RequestError(
                f"the rows have a column {taken[0]} already, which the answers would overwrite; rename it"
            )
        prompts = [p.tolist() if isinstance(p, np.ndarray) else p for p in batch[self.prompt_column]]
        answers = [o.outputs[0] for o in self.llm.generate_batch(prompts, self.params, progress=False)]
        if isinstance(self.llm.engine.runner, Leader):
            self.llm.engine.runner.check()  # that is no matter of these rows
        texts = np.array([a.text for a in answers], object)
        counts = np.array([len(a.token_ids) for a in answers], np.int64)
        reasons, errors = (np.array([getattr(a, n) or "" for a in answers], object) for n in ("finish_reason", "error"))
        return {**batch, **dict(zip(COLUMNS, (texts, counts, reasons, errors), strict=True))}


def generate(
    dataset: Dataset,
    *,
    model: str,
    prompt_column: str = "prompt",
    sampling_params: SamplingParams | Mapping[str, Any] | None = None,
    concurrency: int | tuple[int, int] = 1,
    batch_size: int = 256,
    num_gpus: float | None = None,
    num_cpus: float | None = None,
    **options: Any,
) -> Dataset:
    """Answer every row. Nothing runs before the result is asked for, as ever with Ray Data.

    Args:
        model, prompt_column, sampling_params, options: see Generator.
        concurrency: how many engines; (m, n) for between m and n of them.
        batch_size: rows that an engine has at a time; it runs as many of them together as it has room for.
        num_gpus: of each engine; None is one for each rank where the cluster has GPUs and `device` is not cpu.
        num_cpus: of each engine; None is Ray's default.

    Raises:
        ConfigError, RequestError: what is asked for cannot be.
    """
    try:
        import ray.data
    except ImportError as e:
        raise ConfigError("slipstream.distributed works on Ray Data: pip install 'slipstream[ray]'") from e
    if not isinstance(dataset, ray.data.Dataset):
        raise RequestError(
            f"dataset: must be a ray.data.Dataset, got {type(dataset).__name__}; ray.data.from_items makes one of a list"
        )
    asked = EngineConfig(**options)  # here rather than in every worker
    low, high = concurrency if isinstance(concurrency, tuple) else (concurrency, concurrency)
    if not 1 <= low <= high:
        raise ConfigError(
            f"concurrency: must be a number of engines from 1 on, or two for the least and the most, got {concurrency}"
        )
    if num_gpus is None:
        wanted = asked.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
        num_gpus = asked.tensor_parallel_size if wanted else 0
    told = {"model": model, "prompt_column": prompt_column, "sampling_params": _params(sampling_params), **options}
    return dataset.map_batches(
        Generator, fn_constructor_kwargs=told, batch_format="numpy", batch_size=batch_size, num_gpus=num_gpus, num_cpus=num_cpus,
        compute=ray.data.ActorPoolStrategy(min_size=low, max_size=high),
    )  # fmt: skip


def _params(given: SamplingParams | Mapping[str, Any] | None) -> SamplingParams | None:
    return SamplingParams(**given) if isinstance(given, Mapping) else given
