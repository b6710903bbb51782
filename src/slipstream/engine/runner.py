"""Step -> Batch -> model -> tokens. Everything a rank must know to run a step; no queue, no text."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from slipstream.batch import Batch, build_batch, to_device
from slipstream.cache.storage import Storage
from slipstream.engine.graphs import Decoder
from slipstream.layers.transformer import Transformer
from slipstream.ops.sampling import Row, is_plain, on_device
from slipstream.ops.sampling.needs import Asked, Needs, ask
from slipstream.ops.sampling.reference import streams, token_logprobs
from slipstream.plan import Plan
from slipstream.request import UNKNOWN, Chunk, Step, TokenLogprob


@dataclass(slots=True)
class StepResult:
    """Per sequence: the sampled token (None where the logits were not finite), and what was asked about it."""

    tokens: dict[int, int | None] = field(default_factory=dict)
    logprobs: dict[int, TokenLogprob | None] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[tuple[int, TokenLogprob | None]]] = field(default_factory=dict)  # (position, value)


@dataclass(slots=True, eq=False)
class Flight:
    """A step on its way: launched, and not looked at."""

    step: Step
    whole: frozenset[int]  # sequences with the logits of all their tokens
    # None where tokens were picked on the device: the next step can be launched before anybody knows them.
    logits: Tensor | None
    answers: Tensor | None = None  # on the host, once `arrived`: tokens, and whether each is one
    arrived: torch.cuda.Event | None = None

    @property
    def plain(self) -> bool:
        return self.logits is None


class Runner:
    """Holds the model, the cache and, for each live sequence, what its sampler must know."""

    def __init__(self, plan: Plan, model: Transformer) -> None:
        self.plan, self.model = plan, model
        self.storage = Storage(plan.groups, plan.stored_pages, plan.page_size, plan.dtype, plan.device)
        self.rows: dict[int, Row] = {}
        self._plain: set[int] = set()  # whose rows `pick` is enough for, once they have min_new_tokens
        self._needs: dict[int, Needs] = {}  # of those that it was not enough for
        most = plan.max_num_seqs
        self._answers = torch.zeros(9 * most, dtype=torch.uint8, device=plan.device)
        self.answers = _answers(self._answers, most)
        self._sources: dict[int, int] = {}  # whose token of the step before is where
        self.decoder = Decoder(plan, model, self.storage, self.answers) if plan.cuda_graphs else None
        # All steps run one after the other on a stream of our own, whatever thread or stream the caller is in; and after
        # what brought the weights and made the buffers.
        self._stream = torch.cuda.Stream(plan.device) if plan.device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(plan.device))

    def launch(self, step: Step) -> Flight:
        """Set a step going. On a GPU nothing is waited for, unless a step of this size is still to be recorded."""
        with torch.inference_mode(), self.on_stream():
            return self._launch(step)

    def finish(self, flight: Flight) -> StepResult:
        """Wait for a step, and see what came of it."""
        with torch.inference_mode(), self.on_stream():
            return self._finish(flight)

    def follow(self, step: Step) -> None:
        """On a rank that others choose tokens for: note those that this step goes on from, before it is launched."""
        for c in step.chunks:
            row = self.rows.get(c.sequence)
            if row is not None:
                known = len(row.prompt_token_ids) + len(row.output_token_ids)
                new = [t for t in c.token_ids[max(0, known - c.start) :] if t != UNKNOWN]
                row.output_token_ids.extend(new)  # type: ignore[attr-defined]

    def on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _launch(self, step: Step) -> Flight:
        for sequence in step.finished:
            self.rows.pop(sequence, None)
            self._plain.discard(sequence)
            self._needs.pop(sequence, None)
            if self.decoder is not None:
                self.decoder.forget(sequence)
        for s in step.started:
            self.rows[s.sequence] = Row(s.params, s.prompt_token_ids, [], s.seed, s.stop_token_ids)
            if is_plain(s.params):
                self._plain.add(s.sequence)
        whole = frozenset(c.sequence for c in step.chunks if self._wants_prompt(c))
        sampled = [c for c in step.chunks if c.sample]
        plain = (
            self.plan.async_scheduling and not whole and all(on_device(self.rows[c.sequence].params) for c in sampled)
        )
        heat, noise = self._drawing(sampled) if plain or self.decoder else ([], np.zeros(0, np.int64))
        asked = self._ask(sampled, heat, noise) if plain else None
        if self.decoder is not None and not whole and all(c.sample and len(c.token_ids) == 1 for c in step.chunks):
            sources = [self._sources[c.sequence] if c.token_ids[0] == UNKNOWN else 0 for c in step.chunks]
            logits = self.decoder.run(step.chunks, sources, heat, noise)
        else:
            logits = self.model(self._batch(step, whole), self.storage)
            if plain and sampled:
                heats, starts = to_device([np.array(heat, np.float32), noise], self.plan.device)
                self.plan.ops.pick(logits, heats, starts, tuple(t[: len(sampled)] for t in self.answers))
        if asked is not None:
            self.plan.ops.draw(logits, asked, self.answers)
        flight = Flight(step, whole, None if plain else logits)
        self._sources = {c.sequence: i for i, c in enumerate(sampled)} if plain else {}
        if plain and self.plan.device.type == "cuda":
            flight.answers = torch.empty(len(self._answers), dtype=torch.uint8, pin_memory=True)
            flight.answers.copy_(self._answers, non_blocking=True)
            flight.arrived = torch.cuda.Event()
            flight.arrived.record()
        elif plain:
            flight.answers = self._answers.cpu().clone()
        return flight

    def _finish(self, flight: Flight) -> StepResult:
        if flight.logits is not None:
            return self._sample(flight.step, flight.logits.float(), flight.whole)
        if flight.arrived is not None:
            flight.arrived.synchronize()
        assert flight.answers is not None
        tokens, ok = (t.tolist() for t in _answers(flight.answers, self.plan.max_num_seqs))
        result = StepResult()
        for chunk, token, good in zip((c for c in flight.step.chunks if c.sample), tokens, ok, strict=False):
            result.tokens[chunk.sequence] = token if good else None
            row = self.rows.get(chunk.sequence)
            if good and row is not None:  # None: it ended before this step was looked at
                row.output_token_ids.append(token)  # type: ignore[attr-defined]
        return result

    def _is_plain(self, chunk: Chunk) -> bool:
        row = self.rows[chunk.sequence]
        forbidden = row.stop_token_ids and chunk.end - len(row.prompt_token_ids) < row.params.min_new_tokens
        return chunk.sequence in self._plain and not forbidden

    def _ask(self, sampled: list[Chunk], heat: list[float], noise: np.ndarray) -> Asked | None:
        """What is needed by rows that `pick` is not enough for; to it they become greedy, which costs least."""
        found = [i for i, c in enumerate(sampled) if not self._is_plain(c)]
        if not found:
            return None
        needs, positions, sources = [], [], []
        for i in found:
            heat[i], chunk = 0.0, sampled[i]
            row = self.rows[chunk.sequence]
            if chunk.sequence not in self._needs:
                self._needs[chunk.sequence] = Needs(row, self.plan.model_config.vocab_size)
            needs.append(self._needs[chunk.sequence])
            positions.append(chunk.end - len(row.prompt_token_ids))
            sources.append(self._sources[chunk.sequence] if chunk.token_ids[-1] == UNKNOWN else -1)
        return ask(needs, found, positions, noise[found], sources, self.answers[0])

    def _drawing(self, sampled: list[Chunk]) -> tuple[list[float], np.ndarray]:
        """Temperatures, and where the noise of each row starts."""
        rows = [self.rows[c.sequence] for c in sampled]
        heat = [row.params.temperature for row in rows]
        if not any(heat):
            return heat, np.zeros(len(rows), np.int64)
        positions = [c.end - len(row.prompt_token_ids) for c, row in zip(sampled, rows, strict=True)]
        return heat, streams([row.seed for row in rows], positions)

    def _batch(self, step: Step, whole: frozenset[int]) -> Batch:
        batch = build_batch(step.chunks, self.plan.groups, self.plan.page_size, self.plan.device, whole)
        unknown = [
            (c.sequence, row)
            for c, row in zip(step.chunks, batch.query_starts, strict=False)
            if c.token_ids[0] == UNKNOWN
        ]
        if unknown:
            rows = np.array([row for _, row in unknown])
            sources = np.array([self._sources[sequence] for sequence, _ in unknown])
            to, there = to_device([rows, sources], self.plan.device)
            batch.token_ids[to] = self.answers[0][there]
        return batch

    def _wants_prompt(self, chunk: Chunk) -> bool:
        row = self.rows[chunk.sequence]
        return row.params.prompt_logprobs is not None and chunk.start < len(row.prompt_token_ids) - 1

    def _sample(self, step: Step, logits: Tensor, whole: frozenset[int]) -> StepResult:
        result = StepResult()
        chosen: list[int] = []  # rows of `logits` that get a token
        sequences: list[int] = []
        at = 0
        for c in step.chunks:
            count = len(c.token_ids) if c.sequence in whole else int(c.sample)
            if c.sequence in whole:
                result.prompt_logprobs[c.sequence] = self._prompt_logprobs(c, logits[at : at + count])
            at += count
            if c.sample:
                chosen.append(at - 1)
                sequences.append(c.sequence)
        if not chosen:
            return result
        picked = logits if len(chosen) == len(logits) else logits[chosen]
        rows = [self.rows[s] for s in sequences]
        tokens = self.plan.ops.sample(picked, rows)
        asked = [i for i, r in enumerate(rows) if r.params.logprobs is not None and tokens[i] is not None]
        if asked:
            values = token_logprobs(picked[asked], [tokens[i] for i in asked], [rows[i].params.logprobs for i in asked])
            result.logprobs = {sequences[i]: v for i, v in zip(asked, values, strict=True)}
        for sequence, row, token in zip(sequences, rows, tokens, strict=True):
            result.tokens[sequence] = token
            if token is not None:
                row.output_token_ids.append(token)  # type: ignore[attr-defined]
        return result

    def _prompt_logprobs(self, chunk: Chunk, logits: Tensor) -> list[tuple[int, TokenLogprob | None]]:
        """The row at position p tells of the prompt's token at p + 1."""
        row = self.rows[chunk.sequence]
        last = min(chunk.end, len(row.prompt_token_ids) - 1)
        count = last - chunk.start
        tokens = list(row.prompt_token_ids[chunk.start + 1 : last + 1])
        values = token_logprobs(logits[:count], tokens, [row.params.prompt_logprobs] * count)
        return list(zip(range(chunk.start + 1, last + 1), values, strict=True))


def _answers(buffer: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Tokens (most,) int64, and whether each is one, bool."""
    return buffer[: 8 * most].view(torch.int64), buffer[8 * most :].view(torch.bool)
