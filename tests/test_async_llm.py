"""AsyncLLM: many tasks, one engine. Answers are those made alone, and nobody's end is another's."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slipstream import LLM, AsyncLLM, RequestError, SamplingParams
from slipstream.request import RequestOutput
from tests.cli.tiny import write_chat_model
from tests.engine import tiny

GREEDY = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True)
LONG = GREEDY.replace(max_new_tokens=150)
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = write_chat_model(tmp_path_factory.mktemp("async") / "tiny")
    return LLM(folder, kv_cache_memory_bytes=1 << 20, max_model_len=200, page_size=4, max_num_seqs=8)


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """Every test leaves the engine idle, no page held and no thread behind."""
    yield shared
    tiny.check_idle(shared)
    assert not [t for t in threading.enumerate() if t.name == "slipstream-engine"]


def prompt_of(i: int) -> list[int]:
    return [12 + i, 15, 17 + i % 7]


async def idle(allm: AsyncLLM) -> None:
    """Wait until nothing is under way; the test's time limit is the limit."""
    while (s := await allm.snapshot()).running or s.waiting:
        await asyncio.sleep(0.001)
    assert not allm._live


def test_fifty_tasks_get_what_each_gets_alone(llm: LLM) -> None:
    alone = [llm.generate([prompt_of(i)], GREEDY)[0] for i in range(50)]

    async def streamed(allm: AsyncLLM, i: int) -> str:
        return "".join([d.text async for d in allm.stream(prompt_of(i), GREEDY)])

    async def main() -> tuple[list[RequestOutput], list[str]]:
        async with AsyncLLM(llm) as allm:
            whole = asyncio.gather(*(allm.generate(prompt_of(i), GREEDY) for i in range(50)))
            pieces = asyncio.gather(*(streamed(allm, i) for i in range(50)))
            return await whole, await pieces

    whole, pieces = asyncio.run(main())
    assert [o.outputs[0].token_ids for o in whole] == [o.outputs[0].token_ids for o in alone]
    assert pieces == [o.text for o in alone]


def test_deltas_end_once_for_each_answer(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=5, max_new_tokens=7, ignore_eos=True)
    alone = llm.generate([prompt_of(0)], params)[0]

    async def main() -> None:
        async with AsyncLLM(llm) as allm:
            stream = allm.stream(prompt_of(0), params)
            with pytest.raises(RequestError, match="has not begun"):
                _ = stream.output
            deltas = [d async for d in stream]
            assert [(d.index, d.finish_reason) for d in deltas[-3:]] == [(i, "length") for i in range(3)]
            for i, c in enumerate(alone.outputs):
                assert "".join(d.text for d in deltas if d.index == i) == c.text == stream.output.outputs[i].text
                assert [d.token_id for d in deltas if d.index == i] == c.token_ids
            with pytest.raises(RequestError, match="iterated already"):
                await stream.result()

    asyncio.run(main())


def test_chat(llm: LLM) -> None:
    async def main() -> tuple[Any, Any]:
        async with AsyncLLM(llm) as allm:
            deltas = [d async for d in allm.stream_chat(HELLO, GREEDY)]
            with pytest.raises(RequestError, match="messages is empty"):
                await allm.chat([], GREEDY)
            with pytest.raises(RequestError, match="enable_thinking"):
                await allm.chat(HELLO, GREEDY, enable_thinking=True)
            return await allm.chat(HELLO, GREEDY), deltas

    output, deltas = asyncio.run(main())
    assert output.message == llm.chat(HELLO, GREEDY).message
    assert "".join(d.text for d in deltas) == output.text and {d.kind for d in deltas} == {"answer"}


def test_a_parser_that_ends_an_answer_loses_nothing_of_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """As gpt-oss's does at a stop string: the engine's last delta comes while the one before it is being read."""
    text = llm.chat(HELLO, LONG).text

    class UntilFifth:
        def __init__(self) -> None:
            self.stopped: str | None = None
            self.texts: list[str] = []

        def feed(self, delta: Any) -> list[Any]:
            if self.stopped is not None:
                return []
            self.texts.append(delta.text)
            self.stopped = "enough" if delta.text and len(self.texts) >= 5 else None
            return [HarmonyEvent("answer", delta.text)]

        @property
        def answer(self) -> ChatAnswer:
            return ChatAnswer("".join(self.texts))

    from slipstream.conversation import ChatAnswer
    from slipstream.harmony import HarmonyEvent

    monkeypatch.setattr("slipstream.conversation._Plain", UntilFifth)

    async def main() -> tuple[str, Any]:
        async with AsyncLLM(llm) as allm:
            stream = allm.stream_chat(HELLO, LONG)
            return "".join([d.text async for d in stream]), stream.output

    found, output = asyncio.run(main())
    assert found == output.text == text[: len(found)] and found
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", "enough")
    assert 5 <= len(output.outputs[0].token_ids) < 100


def test_a_parser_that_fails_fails_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        stopped = None

        def feed(self, delta: Any) -> list[Any]:
            raise LookupError("a bug")

    monkeypatch.setattr("slipstream.conversation._Plain", Broken)
    alone = llm.generate([prompt_of(1)], GREEDY)[0].text

    async def main() -> None:
        async with AsyncLLM(llm) as allm:
            other = asyncio.create_task(allm.generate(prompt_of(1), GREEDY))
            with pytest.raises(LookupError, match="a bug"):
                await allm.chat(HELLO, LONG)
            assert (await other).text == alone
            await idle(allm)

    asyncio.run(main())


def test_tasks_cancelled_at_any_moment_give_all_pages_back(llm: LLM) -> None:
    draw = random.Random(4)
    alone = {i: llm.generate([prompt_of(i)], GREEDY)[0].text for i in range(0, 60, 3)}

    async def main() -> None:
        async with AsyncLLM(llm) as allm:
            tasks = {
                i: asyncio.create_task(allm.generate(prompt_of(i), GREEDY if i % 3 == 0 else LONG)) for i in range(60)
            }
            doomed = [i for i in tasks if i % 3]
            draw.shuffle(doomed)
            for i in doomed:
                await asyncio.sleep(draw.choice([0, 0, 0.001, 0.004]))
                tasks[i].cancel()
            ends = dict(zip(tasks, await asyncio.gather(*tasks.values(), return_exceptions=True), strict=True))
            assert sum(isinstance(ends[i], asyncio.CancelledError) for i in doomed) > 30
            for i, text in alone.items():
                end = ends[i]
                assert isinstance(end, RequestOutput) and end.text == text
            await idle(allm)
            assert all(g.held == 0 for g in (await allm.snapshot()).pages)

    asyncio.run(main())


def test_cancelled_by_name_the_answer_so_far_stays(llm: LLM) -> None:
    whole = llm.generate([prompt_of(2)], LONG)[0].text

    async def main() -> None:
        async with AsyncLLM(llm) as allm:
            stream, got = allm.stream(prompt_of(2), LONG), []
            async for delta in stream:
                got.append(delta)
                if len(got) == 3:
                    allm.cancel(stream)
            assert got[-1].finish_reason == "abort" and stream.output.outputs[0].finish_reason == "abort"
            assert whole.startswith(stream.output.text) and len(stream.output.text) < len(whole)
            early = allm.stream(prompt_of(2), LONG)
            early.cancel()
            assert (await early.result()).outputs[0].finish_reason == "abort"
            async for _ in allm.stream(prompt_of(3), LONG):
                break  # leaving the loop is enough
            await idle(allm)

    asyncio.run(main())


def test_one_consumer_that_fails_disturbs_no_other(llm: LLM) -> None:
    alone = llm.generate([prompt_of(4)], LONG)[0].text

    async def fails(allm: AsyncLLM) -> None:
        async for _ in allm.stream(prompt_of(5), LONG):
            raise ZeroDivisionError

    async def main() -> None:
        async with AsyncLLM(llm) as allm:
            good = [asyncio.create_task(allm.generate(prompt_of(4), LONG)) for _ in range(3)]
            bad = await asyncio.gather(*(fails(allm) for _ in range(5)), return_exceptions=True)
            assert all(isinstance(b, ZeroDivisionError) for b in bad)
            refused = await asyncio.gather(
                *(allm.generate(p, GREEDY) for p in ([], [10**6], [5] * 300, None)),  # type: ignore[arg-type]
                return_exceptions=True,
            )
            assert all(isinstance(r, RequestError) for r in refused)
            assert [o.text for o in await asyncio.gather(*good)] == [alone] * 3
            await idle(allm)

    asyncio.run(main())


def test_a_pass_that_fails_ends_those_in_it_and_the_thread_goes_on(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = llm.engine.runner.launch, 0

    def fail(step: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise RuntimeError("a cosmic ray")
        return run(step)

    monkeypatch.setattr(llm.engine.runner, "launch", fail)

    async def main() -> None:
        async with AsyncLLM(llm) as allm:
            first = await allm.generate(prompt_of(6), GREEDY)
            assert (first.outputs[0].finish_reason, first.outputs[0].error) == ("error", "RuntimeError: a cosmic ray")
            assert (await allm.generate(prompt_of(6), GREEDY)).outputs[0].finish_reason == "length"

    asyncio.run(main())


def test_closed_while_requests_run(llm: LLM) -> None:
    async def main() -> None:
        allm = AsyncLLM(llm)
        tasks = [asyncio.create_task(allm.generate(prompt_of(i), LONG)) for i in range(20)]
        while not (await allm.snapshot()).running:
            await asyncio.sleep(0.001)
        await allm.close()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        reasons = {e.outputs[0].finish_reason if isinstance(e, RequestOutput) else type(e) for e in ends}
        assert "abort" in reasons and reasons <= {"abort", "length", RequestError}
        with pytest.raises(RequestError, match="is closed"):
            await allm.generate(prompt_of(0), GREEDY)
        assert (await allm.snapshot()).running == 0
        await allm.close()

    asyncio.run(main())
    assert llm.generate([prompt_of(0)], GREEDY)[0].outputs[0].finish_reason == "length", "the LLM stays usable"


def test_loops_in_several_threads_and_the_llm_itself(llm: LLM) -> None:
    allm = AsyncLLM(llm)
    alone = [llm.generate([prompt_of(i)], GREEDY)[0].text for i in range(12)]
    found: dict[int, str] = {}

    async def ask(i: int) -> None:
        found[i] = (await allm.generate(prompt_of(i), GREEDY)).text

    async def some(start: int) -> None:
        await asyncio.gather(*(ask(i) for i in range(start, start + 4)))

    threads = [threading.Thread(target=lambda s=s: asyncio.run(some(s))) for s in (0, 4)]
    for t in threads:
        t.start()
    for i in range(8, 12):
        found[i] = llm.generate([prompt_of(i)], GREEDY)[0].text
    for t in threads:
        t.join()
    asyncio.run(allm.close())
    assert [found[i] for i in range(12)] == alone


def test_a_loop_that_is_gone_leaves_no_request_behind(llm: LLM) -> None:
    allm = AsyncLLM(llm)
    loop = asyncio.new_event_loop()
    steps = allm.stream(prompt_of(7), LONG.replace(max_new_tokens=None)).__aiter__()
    loop.run_until_complete(steps.__anext__())
    loop.close()

    async def main() -> None:
        await idle(allm)
        await allm.close()

    asyncio.run(main())
    assert llm.snapshot().finished["abort"]


def test_waiting_costs_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing to do the engine is not stepped, however long that lasts."""
    step, calls = llm.engine.step, 0

    def count() -> bool:
        nonlocal calls
        calls += 1
        return step()

    monkeypatch.setattr(llm.engine, "step", count)

    async def main() -> None:
        async with AsyncLLM(llm) as allm:
            await allm.generate(prompt_of(0), GREEDY)
            await asyncio.sleep(0.05)
            before = calls
            await asyncio.sleep(0.1)
            assert calls == before <= 20

    asyncio.run(main())


def test_an_llm_takes_no_more_options(llm: LLM) -> None:
    with pytest.raises(RequestError, match="dtype"):
        AsyncLLM(llm, dtype="float32")


def test_it_loads_by_name(tmp_path: Path) -> None:
    async def main() -> str:
        async with AsyncLLM(write_chat_model(tmp_path / "m"), max_model_len=64) as allm:
            return (await allm.generate("a", GREEDY)).text

    assert asyncio.run(main())
