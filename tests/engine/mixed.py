"""A load of everything that users bring at once, for an engine that is to bear it for hours: threads, tasks and jobs; answers
that are left, refused, late or spoiled; handlers and forward passes that raise. What can be known of an answer is checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import LLM, AsyncLLM, CapacityError, RequestError, SamplingParams
from slipstream.engine.engine import Delta, Stream
from slipstream.engine.runner import Flight
from slipstream.jobs import run_batch
from slipstream.request import RequestOutput, Step
from tests.engine import tiny

SPOILED = 95  # "~": its vector is NaN
PLANTED = "planted"  # what a pass or a handler of ours raises
FORBID = {SPOILED: -float("inf")}
GREEDY = SamplingParams(temperature=0, max_new_tokens=30, logit_bias=FORBID)
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}{% if add_generation_prompt %}bot: {% endif %}"
)
SAFE = 1e-3  # a best token that leads by less could change with the company that a request is in
NAN = [8, SPOILED, 9]


def write(folder: Path) -> Path:
    """The tiny hybrid model, with a chat template."""
    tiny.write(folder, tiny.HYBRID)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": TEMPLATE}))
    return folder


def spoil(llm: LLM) -> None:
    """From here on a prompt with "~" has logits that are NaN."""
    assert llm.tokenizer.token_to_id("~") == SPOILED
    with torch.inference_mode():
        llm.engine.runner.model.embed.held.data[SPOILED] = float("nan")  # type: ignore[union-attr]


class Load:
    """Bursts of mixed requests against one LLM; `seen` counts how they ended.

    Args:
        work: a folder for batch jobs.
    """

    def __init__(self, llm: LLM, work: Path, seed: int) -> None:
        self.llm, self.work, self.rng = llm, work, random.Random(seed)
        self.seen: Counter[str] = Counter()
        self.bursts = 0
        self.known = list(self._certain())
        assert len(self.known) > 15
        spoil(llm)
        run = llm.engine.runner.launch

        def now_and_then(step: Step) -> Flight:
            result = run(step)
            if step.number % 700 == 0:
                raise RuntimeError(PLANTED)
            return result

        llm.engine.runner.launch = now_and_then  # type: ignore[method-assign]

    def _certain(self) -> Iterator[tuple[str, RequestOutput]]:
        """Prompts that begin alike, of all lengths, with the answers they get alone."""
        text = "in an ore near the station there are no others, and he said that the sea is a rose"
        for prompt in [text[:end] for end in range(1, len(text), 4)] + [text[i:] for i in range(1, 60, 6)]:
            output = self.llm.generate(prompt, GREEDY.replace(logprobs=2))
            (c,) = output.outputs
            if all(t.top[0][1] - t.top[1][1] > SAFE for t in c.logprobs or ()):
                yield prompt, output

    async def burst(self, tasks: int) -> None:
        """So many tasks, beside two threads that use the LLM itself. All of them have ended when it returns."""
        kinds: list[Callable[[AsyncLLM], Awaitable[None]]] = [
            self._good, self._good, self._alike, self._left, self._dropped, self._cancelled, self._refused, self._late,
            self._spoiled, self._several, self._chat,
        ]  # fmt: skip
        threads = [self._batch, self._pieces, self._job if self.bursts % 5 == 0 else self._handler]
        self.bursts += 1
        async with AsyncLLM(self.llm) as allm:
            some = (self.rng.choice(kinds)(allm) for _ in range(tasks))
            await asyncio.gather(*some, *(asyncio.to_thread(t) for t in self.rng.sample(threads, 2)))

    # Tasks.

    async def _good(self, allm: AsyncLLM) -> None:
        await asyncio.sleep(self.rng.uniform(0, 0.05))
        prompt, want = self.rng.choice(self.known)
        params = GREEDY.replace(priority=self.rng.randint(-2, 2), cache_salt=self.rng.choice(("", "", "a", "b")))
        self._check(await allm.generate(prompt, params), want)

    async def _alike(self, allm: AsyncLLM) -> None:
        """New tokens each time behind an old beginning, sampled. No new text: the package tokenizers keeps the last 10,000
        words, which here are whole prompts (2 KB each, measured), and would seem to leak for an hour."""
        old = self.rng.choice(self.known)[1].prompt_token_ids
        prompt = [*old, *(self.rng.randrange(2, SPOILED) for _ in range(self.rng.randint(1, 40)))]
        params = SamplingParams(max_new_tokens=self.rng.randint(1, 30), logit_bias=FORBID, seed=self.rng.randint(0, 99))
        self._check(await allm.generate(prompt, params.replace(logprobs=self.rng.choice((None, 2)))))

    async def _left(self, allm: AsyncLLM) -> None:
        left, stream = self.rng.randint(0, 20), allm.stream(*self._long())
        async with contextlib.aclosing(stream.__aiter__()) as deltas:  # type: ignore[type-var]
            async for _ in deltas:
                left -= 1
                if left < 0:
                    break
        self.seen["cancelled"] += 1

    async def _dropped(self, allm: AsyncLLM) -> None:
        task = asyncio.create_task(allm.generate(*self._long()))
        await asyncio.sleep(self.rng.choice((0, 0.001, 0.01, 0.1)) * self.rng.random())
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        self.seen["cancelled"] += 1

    async def _cancelled(self, allm: AsyncLLM) -> None:
        stream = allm.stream(*self._long())
        asyncio.get_running_loop().call_later(self.rng.uniform(0, 0.05), allm.cancel, stream)
        (c,) = (await stream.result()).outputs
        assert c.finish_reason in ("abort", "stop", "length") or PLANTED in (c.error or "")
        self.seen["cancelled"] += 1

    async def _refused(self, allm: AsyncLLM) -> None:
        prompt: Any = self.rng.choice(([5] * 5000, [5] * 150, [], [131], [-1], "the" * 500, 7, ["a"], None))
        with pytest.raises((RequestError, CapacityError)):
            await allm.generate(prompt, GREEDY)
        with pytest.raises(RequestError):
            await allm.generate("the", GREEDY.replace(**self.rng.choice(({"n": 2}, {"logit_bias": {131: 1.0}}))))
        self.seen["refused"] += 2

    async def _late(self, allm: AsyncLLM) -> None:
        prompt, params = self._long()
        (c,) = (await allm.generate(prompt, params.replace(deadline=10 ** self.rng.uniform(-5, -1)))).outputs
        if c.finish_reason == "abort":
            assert c.stop_reason == "deadline"
            self.seen["late"] += 1
        else:
            assert c.finish_reason in ("stop", "length") or PLANTED in (c.error or "")
            self.seen["good"] += 1

    async def _spoiled(self, allm: AsyncLLM) -> None:
        (c,) = (await allm.generate([*([7] * self.rng.randint(0, 30)), *NAN], GREEDY)).outputs
        assert c.finish_reason == "error" and not c.token_ids and c.error
        self.seen["spoiled"] += 1

    async def _several(self, allm: AsyncLLM) -> None:
        params = SamplingParams(n=3, max_new_tokens=10, logit_bias=FORBID, prompt_logprobs=1, stop=("th", "e "))
        self._check(await allm.generate("the tide " * self.rng.randint(1, 5), params))

    async def _chat(self, allm: AsyncLLM) -> None:
        messages = [{"role": "user", "content": "the sea"}] * self.rng.randint(1, 3)
        self._check(await allm.chat(messages, GREEDY))

    # Threads.

    def _batch(self) -> None:
        """Good, bad and spoiled prompts through one batch; its handler raises now and then; some are left early."""
        some = [*self.rng.choices(self.known, k=10), ([], None), ([131], None), (NAN, None), ([5] * 200, None)]
        self.rng.shuffle(some)
        leave = self.rng.choice((len(some), self.rng.randrange(len(some))))

        def handler(output: RequestOutput) -> None:
            if self.rng.random() < 0.1:
                raise ValueError(PLANTED)

        with contextlib.closing(self.llm.generate_batch([p for p, _ in some], GREEDY, on_result=handler)) as outputs:
            for i, (output, (_, want)) in enumerate(zip(outputs, some, strict=False)):
                if want is None:
                    assert output.outputs[0].finish_reason == "error"
                    self.seen["refused"] += 1
                else:
                    self._check(output, want)
                if i == leave:
                    break
        self.seen["cancelled"] += max(0, len(some) - 1 - leave)

    def _pieces(self) -> None:
        """One thread that reads as it is written, and goes away. A pass that raises is raised where it was run."""
        for _ in range(3):
            with contextlib.closing(self.llm.stream(*self._long())) as pieces, contextlib.suppress(RuntimeError):
                for _ in range(self.rng.randint(0, 25)):
                    next(pieces, None)
            self.seen["cancelled"] += 1

    def _handler(self) -> None:
        """A `deliver` that raises ends its own request, at any delta."""
        left = self.rng.randint(0, 15)

        def deliver(stream: Stream, delta: Delta) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise ValueError(PLANTED)

        stream = self.llm.engine.submit(self.llm.make_request(*self._long()), deliver)
        while not stream.finished:
            with contextlib.suppress(RuntimeError):  # a pass that raises
                self.llm.engine.step()
        (c,) = stream.output.outputs
        assert (c.finish_reason == "error" and PLANTED in (c.error or "")) or (c.finish_reason == "stop" and left >= 0)
        self.seen["handler raised"] += left < 0

    def _job(self) -> None:
        some = self.rng.choices(self.known, k=6)
        sampling = {"temperature": 0, "max_new_tokens": GREEDY.max_new_tokens, "logit_bias": {str(SPOILED): -1e30}}
        lines: list[dict[str, Any]] = [{"id": i, "prompt": p, **sampling} for i, (p, _) in enumerate(some)]
        lines.append({"id": "bad", "prompt": ""})
        (self.work / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
        run_batch(self.llm, self.work / "in", self.work / "out", overwrite=True)
        answers = [json.loads(line) for line in (self.work / "out").read_text().splitlines()]
        assert [a["id"] for a in answers] == [line["id"] for line in lines] and answers[-1]["error"]
        for answer, (_, want) in zip(answers, some, strict=False):
            assert answer["text"] == want.text if not answer["error"] else PLANTED in str(answer["error"])
        self.seen["job lines"] += len(lines)

    def _long(self) -> tuple[str, SamplingParams]:
        return self.rng.choice(self.known)[0], GREEDY.replace(max_new_tokens=70, ignore_eos=True)

    def _check(self, output: RequestOutput, want: RequestOutput | None = None) -> None:
        for c in output.outputs:
            if c.finish_reason == "error":
                assert PLANTED in (c.error or ""), c.error
                self.seen["failed"] += 1
                continue
            assert c.finish_reason in ("stop", "length")
            assert want is None or c.token_ids == want.outputs[0].token_ids, "not the answer made alone"
            self.seen["good"] += 1
