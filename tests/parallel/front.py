"""Rank 0 as a program, which says what it does and never stops by itself. How it ends is the last line: the error as JSON.

python -m tests.parallel.front FOLDER SIZE
"""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any

from slipstream import LLM, SamplingParams
from slipstream.errors import SlipstreamError

OPTIONS: dict[str, Any] = {
    "dtype": "float32", "device": "cpu", "kv_cache_memory_bytes": 8 << 20, "max_model_len": 128, "num_threads": 1,
}  # fmt: skip


def main() -> None:
    folder, size = sys.argv[1], int(sys.argv[2])
    params = SamplingParams(temperature=0, max_new_tokens=40, ignore_eos=True)
    try:
        print("starts", flush=True)
        llm = LLM(folder, tensor_parallel_size=size, **OPTIONS)
        while True:
            print("steps", flush=True)
            for n in range(3):
                prompts = [[random.randrange(3, 90) for _ in range(k)] for k in (5, 30, 1)]
                assert all(len(o.outputs[0].token_ids) == 40 for o in llm.generate(prompts, params)), n
            print("idle", flush=True)
            time.sleep(0.5)
    except SlipstreamError as e:
        again = "it was not there yet"
        if "llm" in locals():
            try:
                llm.generate([[5, 6]], params)
            except SlipstreamError as second:
                again = str(second)
        print(json.dumps({"kind": type(e).__name__, "message": str(e), "again": again}), flush=True)
        sys.exit(e.exit_code)


if __name__ == "__main__":
    main()
