"""Requests in, text out: queue, run, commit, detokenize, stream. A single prompt and a thousand take this one path."""

from __future__ import annotations

import heapq
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from slipstream.cache.pages import Pages
from slipstream.engine.runner import Flight, Runner, StepResult
from slipstream.engine.snapshot import Rate, Snapshot, take_snapshot
from slipstream.engine.worker import Crew, Leader
from slipstream.errors import RankError, RequestError
from slipstream.plan import Plan
from slipstream.request import Completion, FinishReason, Metrics, Request, RequestOutput, Step, as_token_ids
from slipstream.scheduler import Scheduler
from slipstream.sequence import Sequence
from slipstream.tokenizer import Detokenizer, StopStrings, Tokenizer


@dataclass(frozen=True, slots=True)
class Delta:
    """What one token added to one answer. `text` may be empty while a stop string or a character may still come."""

    index: int
    token_id: int | None
    text: str
    finish_reason: FinishReason | None = None


@dataclass(slots=True, eq=False)
class _Answer:
    """One answer being written."""

    sequence: Sequence
    stream: Stream
    completion: Completion
    detokenizer: Detokenizer
    stops: StopStrings


@dataclass(eq=False)
class Stream:
    """The answers to one request as they are written: iterate for `Delta`s; `output` grows as you do.

    Iterating runs the engine, and so serves every other request that is under way too.
    """

    engine: Engine
    output: RequestOutput
    answers: list[_Answer] = field(default_factory=list)
    pending: deque[Delta] = field(default_factory=deque)
    deliver: Callable[[Stream, Delta], None] | None = None

    @property
    def finished(self) -> bool:
        return all(c.finish_reason is not None for c in self.output.outputs)

    def __iter__(self) -> Iterator[Delta]:
        while True:
            while self.pending:
                yield self.pending.popleft()
            with self.engine._lock:  # another thread may be about to add the last delta
                if self.pending:
                    continue
                if self.finished:
                    return
            if not self.engine.step() and not self.pending and not self.finished:
                raise AssertionError("an unfinished answer is in no queue")

    def put(self, delta: Delta) -> None:
        if self.deliver is None:
            self.pending.append(delta)
            return
        try:
            self.deliver(self, delta)
        except Exception as e:  # a caller's code: it may raise anything, and the others are to go on
            self.deliver = None
            self.engine.fail(self, delta, f"deliver: {type(e).__name__}: {e}")

    def result(self) -> RequestOutput:
        """Run to the end."""
        for _ in self:
            pass
        return self.output

    def cancel(self) -> None:
        """End what is unfinished with `abort`; the text so far stays."""
        for answer in self.answers:
            self.engine.end(answer, "abort")


class Engine:
    """One model, its cache and its queue.

    Args:
        plan: from `make_plan`, its model filled by `checkpoint.load`.
        tokenizer: turns tokens into text.
        eos_token_ids: the model's own end tokens.
        crew: the other ranks that share the model.
    """

    def __init__(
        self, plan: Plan, tokenizer: Tokenizer, eos_token_ids: tuple[int, ...], crew: Crew | None = None
    ) -> None:
        self.plan, self.tokenizer, self.eos_token_ids = plan, tokenizer, eos_token_ids
        runner = Runner(plan, plan.model)
        self.runner = runner if crew is None else Leader(runner, crew)
        self.scheduler = Scheduler(
            Pages(plan.groups, plan.num_pages, plan.page_size),
            max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=plan.max_num_batched_tokens,
            max_model_len=plan.max_model_len,
            enable_prefix_caching=plan.asked.enable_prefix_caching,
            policy=plan.asked.scheduling_policy,
        )
        self._flight: Flight | None = None  # launched before the one before it was looked at
        self._in_runner = False
        self._answers: dict[int, _Answer] = {}
        self._deadlines: list[tuple[float, int]] = []  # a heap: when, and whose sequence
        self._lock = threading.RLock()  # any thread may submit, step and cancel; one at a time does
        self._stepping = False
        self._seeds = None if plan.asked.seed is None else _seeds(plan.asked.seed)
        self._rate, self._started = Rate(), time.perf_counter()

    def submit(self, request: Request, deliver: Callable[[Stream, Delta], None] | None = None) -> Stream:
        """Queue a request.

        Args:
            deliver: is called with the stream and each delta as it is made, in the thread that runs the step, which waits
                for it. It may submit and cancel, but not run the engine. If it raises, the request ends in `error`, and
                it is not called again. Whoever gives it does not iterate the stream.

        Raises:
            RequestError: it names tokens that do not exist, or is longer than max_model_len.
            CapacityError: the cache could never hold it.
        """
        params = request.params
        vocab = self.plan.model_config.vocab_size
        as_token_ids(request.prompt_token_ids, vocab)
        for name in ("logit_bias", "stop_token_ids"):
            bad = [t for t in getattr(params, name) if t >= vocab]
            if bad:
                raise RequestError(f"{name}: token {bad[0]} is not in the vocabulary of {vocab}", field=name)
        self.scheduler.max_length(len(request.prompt_token_ids), params)  # refuse before anything is queued
        with self._lock:
            return self._queue(request, deliver)

    def _queue(self, request: Request, deliver: Callable[[Stream, Delta], None] | None) -> Stream:
        params = request.params
        now = time.perf_counter()
        prompt_logprobs = None if params.prompt_logprobs is None else [None] * len(request.prompt_token_ids)
        output = RequestOutput(
            request.id,
            request.prompt,
            request.prompt_token_ids,
            [Completion(i, logprobs=None if params.logprobs is None else []) for i in range(params.n)],
            prompt_logprobs,  # type: ignore[arg-type]
            Metrics(arrived=now),
        )
        stream = Stream(self, output, deliver=deliver)
        base = params.seed if params.seed is not None else self._draw_seed()
        for completion in output.outputs:
            seed = (base + completion.index) % 2**64
            if completion.index == 1 and params.prompt_logprobs is not None:
                params = params.replace(prompt_logprobs=None)  # the first answer scores the prompt for all
            sequence = self.scheduler.add(request.prompt_token_ids, params, seed=seed, eos=self.eos_token_ids)
            detokenizer = Detokenizer(self.tokenizer, params.skip_special_tokens, continues=True)
            stops = StopStrings(params.stop, params.include_stop_str_in_output)
            answer = _Answer(sequence, stream, completion, detokenizer, stops)
            stream.answers.append(answer)
            self._answers[sequence.id] = answer
            if params.deadline is not None:
                heapq.heappush(self._deadlines, (now + params.deadline, sequence.id))
        return stream

    def _draw_seed(self) -> int:
        return secrets.randbits(63) if self._seeds is None else next(self._seeds)

    def step(self) -> bool:
        """One forward pass, if there is anything to do. What raises in it also ends the answers that were in the pass.

        An interrupt (Ctrl-C) ends them with `abort`, anything else with `error`; the engine stays usable.
        """
        with self._lock:
            if self._stepping:
                raise RequestError(
                    "deliver: a callback runs inside a step, so it cannot run the engine itself; keep what came, and ask for "
                    "more after the step"
                )
            counters = self.scheduler.counters
            self._rate.begin(time.perf_counter(), counters.prompt_tokens, counters.new_tokens)
            ran = True
            try:
                try:
                    self._stepping = True
                    ran = self._step()
                finally:
                    self._stepping = False
            finally:  # once more, as an interrupt may have come in the line above
                self._stepping = False
                if ran:
                    self._rate.end(time.perf_counter())
            return ran

    def _step(self) -> bool:
        self._keep_deadlines(time.perf_counter())
        flight, self._flight = self._flight, None
        running = [] if flight is None else [flight.step]
        try:
            if flight is None:
                flight = self._launch(running)
                if flight is None:
                    return False
            failed = None
            if flight.plain:
                try:
                    self._flight = self._launch(running)
                except BaseException as e:  # this step is as good as it was, if only the next one could not be launched
                    failed = e
                    if not self._in_runner:
                        raise
            self._in_runner = True
            result = self.runner.finish(flight)
            self._in_runner = False
            del running[0]
            self._take_prompt_logprobs(result)
            for sequence, token in self.scheduler.commit(flight.step, result.tokens):
                if answer := self._answers.get(sequence.id):  # or the delivery of one before it has ended this one too
                    self._advance(answer, token, result)
            if failed is not None:
                self._in_runner = True
                raise failed
        except BaseException as e:
            self._break(e, running)
            raise
        return True

    def _launch(self, running: list[Step]) -> Flight | None:
        step = self.scheduler.next()
        if step is None:
            return None
        self._note_started(step)
        running.append(step)
        self._in_runner = True
        flight = self.runner.launch(step)
        self._in_runner = False
        return flight

    def _break(self, e: BaseException, running: list[Step]) -> None:
        """End whom a step that raised leaves with nothing to go on from."""
        self._flight = None
        if self._in_runner and not isinstance(e, RankError):  # half-run: the cache of these passes cannot be trusted
            lost = [self._answers[c.sequence] for step in running for c in step.chunks if c.sequence in self._answers]
            for step in running:
                self.scheduler.spoil(step)
        else:  # half-counted: no queue and no page table can be trusted; or there is nobody left to run anything
            lost = list(self._answers.values())
            self.scheduler.reset()
        self._in_runner = False
        for answer in lost:
            if answer.completion.finish_reason is not None:  # the delivery of one before it has ended this one too
                continue
            if isinstance(e, Exception):
                answer.completion.error = f"{type(e).__name__}: {e}"
            self.end(answer, "error" if isinstance(e, Exception) else "abort")

    def _keep_deadlines(self, now: float) -> None:
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][1] not in self._answers):
            _, sequence = heapq.heappop(self._deadlines)
            if sequence in self._answers:
                self.end(self._answers[sequence], "abort", "deadline")

    def _note_started(self, step: Step) -> None:
        now = time.perf_counter()
        begun = {c.sequence: c.start for c in step.chunks} if step.started else {}
        for s in step.started:
            metrics = self._answers[s.sequence].stream.output.metrics
            if metrics is not None and not metrics.started:
                metrics.started, metrics.cached_tokens = now, begun[s.sequence]

    def _take_prompt_logprobs(self, result: StepResult) -> None:
        for sequence, values in result.prompt_logprobs.items():
            answer = self._answers.get(sequence)  # None: it has ended since
            kept = None if answer is None else answer.stream.output.prompt_logprobs
            for position, value in values:
                if kept is not None:
                    kept[position] = value

    def _advance(self, answer: _Answer, token: int | None, result: StepResult) -> None:
        sequence, completion = answer.sequence, answer.completion
        if token is None:
            completion.error = "no token to choose: logits that are not finite numbers, or every token is forbidden"
            self._close(answer, self._rest(answer), None)
            return
        completion.token_ids.append(token)
        if completion.logprobs is not None and (logprob := result.logprobs.get(sequence.id)) is not None:
            completion.logprobs.append(logprob)
        metrics = answer.stream.output.metrics
        if metrics is not None and not metrics.first_token:
            metrics.first_token = time.perf_counter()
        ended_by_token = sequence.finish_reason == "stop"
        text, matched = ("", None) if ended_by_token else answer.stops.feed(answer.detokenizer.add(token))
        if matched is not None:
            self.scheduler.amend(sequence, "stop", matched)  # wins over a length or an end token
        if sequence.finish_reason is None:
            completion.text += text
            answer.stream.put(Delta(completion.index, token, text))
        else:
            self._close(answer, text if matched is not None else text + self._rest(answer), token)

    def _rest(self, answer: _Answer) -> str:
        """What was held back, at the end. A stop string that only now is certain still cuts."""
        text, matched = answer.stops.feed(answer.detokenizer.finish())
        if matched is None:
            return text + answer.stops.flush()
        if answer.sequence.finish_reason in ("length", "stop"):
            self.scheduler.amend(answer.sequence, "stop", matched)
        return text

    def _close(self, answer: _Answer, text: str, token: int | None) -> None:
        sequence, completion = answer.sequence, answer.completion
        completion.text += text
        completion.finish_reason, completion.stop_reason = sequence.finish_reason, sequence.stop_reason
        metrics = answer.stream.output.metrics
        if metrics is not None and answer.stream.finished:
            metrics.finished = time.perf_counter()
        del self._answers[sequence.id]
        answer.stream.put(Delta(completion.index, token, text, sequence.finish_reason))

    def end(self, answer: _Answer, reason: FinishReason, stop_reason: str | None = None) -> None:
        """End one answer from outside; one that has ended already stays as it is."""
        with self._lock:
            if answer.sequence.id in self._answers:
                self.scheduler.amend(answer.sequence, reason, stop_reason)  # its last token may not be out yet
                self._close(answer, self._rest(answer), None)

    def fail(self, stream: Stream, delta: Delta, message: str) -> None:
        """End a request with `error`, as the caller's code failed at this delta. Its answers that ended before stay."""
        for answer in stream.answers:
            completion = answer.completion
            if completion.finish_reason is None or completion.index == delta.index:
                completion.error = message
                self.end(answer, "error")
                self.scheduler.amend(answer.sequence, "error")
                completion.finish_reason, completion.stop_reason = "error", None

    def snapshot(self) -> Snapshot:
        """What is going on, between two steps."""
        with self._lock:
            now = time.perf_counter()
            oldest = self.scheduler.waiting.oldest()
            metrics = None if oldest is None else self._answers[oldest.id].stream.output.metrics
            wait = 0.0 if metrics is None else now - metrics.arrived
            return take_snapshot(self.scheduler, self._rate, now, self._started, wait)

    def expert_load(self) -> dict[int, list[int]]:
        """For each layer with experts: how many tokens went to each of them since the start.

        Counted with enable_expert_parallel, else {}. A GPU adds up beside the steps; asking waits for the step under way.
        """
        with self._lock:
            return {i: counts.tolist() for i, counts in self.runner.model.expert_load().items()}


def _seeds(seed: int) -> Iterator[int]:
    """A repeatable row of seeds for requests that bring none."""
    import random

    source = random.Random(seed)
    while True:
        yield source.getrandbits(63)
