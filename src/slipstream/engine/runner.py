"""Step -> Batch -> model -> tokens. Everything a rank must know to run a step; no queue, no text."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from slipstream.batch import build_batch
from slipstream.cache.storage import Storage
from slipstream.engine.graphs import Decoder
from slipstream.layers.transformer import Transformer
from slipstream.ops.sampling import Row
from slipstream.ops.sampling.reference import token_logprobs
from slipstream.plan import Plan
from slipstream.request import Chunk, Step, TokenLogprob


@dataclass(slots=True)
class StepResult:
    """Per sequence: the sampled token (None where the logits were not finite), and what was asked about it."""

    tokens: dict[int, int | None] = field(default_factory=dict)
    logprobs: dict[int, TokenLogprob | None] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[tuple[int, TokenLogprob | None]]] = field(default_factory=dict)  # (position, value)


class Runner:
    """Holds the model, the cache and, for each live sequence, what its sampler must know."""

    def __init__(self, plan: Plan, model: Transformer) -> None:
        self.plan, self.model = plan, model
        self.storage = Storage(plan.groups, plan.num_pages, plan.page_size, plan.dtype, plan.device)
        self.rows: dict[int, Row] = {}
        self.decoder: Decoder | None = Decoder(plan, model, self.storage) if plan.cuda_graphs else None

    @torch.inference_mode()
    def run(self, step: Step) -> StepResult:
        for sequence in step.finished:
            self.rows.pop(sequence, None)
            if self.decoder is not None:
                self.decoder.forget(sequence)
        for s in step.started:
            self.rows[s.sequence] = Row(s.params, s.prompt_token_ids, [], s.seed, s.stop_token_ids)
        whole = frozenset(c.sequence for c in step.chunks if self._wants_prompt(c))
        if self.decoder is not None and not whole and all(c.sample and len(c.token_ids) == 1 for c in step.chunks):
            return self._sample(step, self.decoder.run(step.chunks), whole)
        batch = build_batch(step.chunks, self.plan.groups, self.plan.page_size, self.plan.device, whole)
        return self._sample(step, self.model(batch, self.storage), whole)

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
