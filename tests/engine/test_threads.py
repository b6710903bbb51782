"""Several threads may use one engine: their answers are those made alone."""

from __future__ import annotations

import threading
from pathlib import Path

from slipstream import LLM, SamplingParams
from tests.engine import tiny


def test_threads_share_an_engine(tmp_path: Path) -> None:
    tiny.write(tmp_path, tiny.LLAMA)
    llm = LLM(tmp_path, dtype="float32", kv_cache_memory_bytes=8 << 20, max_model_len=128)
    params = SamplingParams(temperature=0, max_new_tokens=20, ignore_eos=True)
    prompts = [[3 + i, 5, 7 + i] for i in range(6)]
    alone = [llm.generate([p], params)[0].outputs[0].token_ids for p in prompts]
    found: dict[int, list[int]] = {}

    def run(i: int) -> None:
        found[i] = llm.generate([prompts[i]], params)[0].outputs[0].token_ids

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [found[i] for i in range(len(prompts))] == alone
