"""Several threads may use one engine: their answers are those made alone."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from slipstream import LLM, SamplingParams
from slipstream.engine.engine import Delta
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


def test_the_last_delta_is_seen_though_another_thread_made_it(tmp_path: Path) -> None:
    """An answer has its finish_reason a moment before its last delta is there."""
    llm = LLM(tiny.write(tmp_path, tiny.LLAMA), dtype="float32", kv_cache_memory_bytes=8 << 20, max_model_len=128)
    stream = llm.submit([3, 5, 7], SamplingParams(temperature=0, max_new_tokens=20))
    last, ended = Delta(0, 9, "end", "stop"), threading.Event()

    def another() -> None:
        with llm.engine._lock:
            stream.output.outputs[0].finish_reason = "stop"
            ended.set()
            time.sleep(0.05)
            stream.put(last)

    thread = threading.Thread(target=another)
    thread.start()
    ended.wait()
    assert list(stream) == [last]
    thread.join()
