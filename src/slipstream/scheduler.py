"""Which sequences run next, with how many tokens, in which pages. Plain integers; no torch.

First come, first served. A step first goes on with what runs (one token for those that decode, the next piece of
the prompt for the others), then admits what waits, within the token budget. When pages run out, the sequence that
came last gives all of its pages back and is computed again later; its answer does not change. Full pages are offered to
whoever comes later with the same beginning (also to the sequence itself, when it is computed again).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from slipstream.cache.pages import Chain, Pages
from slipstream.errors import CapacityError, RequestError
from slipstream.request import Chunk, FinishReason, SamplingParams, Start, Step

SCORED_TOKENS = 256  # rows of logits that prompt_logprobs may take in one step: bounds the memory for them


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer in the making: prompt and new tokens, and how many of them are in the cache."""

    id: int
    params: SamplingParams
    prompt_length: int
    tokens: list[int]
    seed: int
    end_ids: frozenset[int]  # the model's end tokens (unless ignored) and the request's own
    max_length: int
    chain: Chain | None = None  # names its full pages; None where they are neither looked up nor offered
    computed: int = 0
    known: bool = False  # the runner has been told of it
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def num_new(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def wants_prompt_logits(self) -> bool:
        """The next tokens to compute are scored one by one, so each of them has a row of logits."""
        return self.params.prompt_logprobs is not None and self.computed < self.prompt_length - 1


@dataclass(slots=True)
class Counters:
    """Totals since the start."""

    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # found in the cache instead of computed
    new_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)


class Scheduler:
    """Owns the queue and the pages.

    Args:
        pages: the page tables.
        max_num_seqs: sequences that run together.
        max_num_batched_tokens: tokens in one step.
        max_model_len: longest prompt + answer.
        enable_prefix_caching: share pages between sequences that begin alike.
    """

    def __init__(self, pages: Pages, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int,
                 enable_prefix_caching: bool = True) -> None:  # fmt: skip
        self.pages = pages
        self.enable_prefix_caching = enable_prefix_caching
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.counters = Counters()
        self._ids = 0
        self._forget: list[int] = []

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def max_length(self, prompt_length: int, params: SamplingParams) -> int:
        """Tokens that prompt and answer may reach together.

        Raises:
            RequestError: they cannot fit max_model_len.
            CapacityError: the whole cache is too small for this one request.
        """
        limit = self.max_model_len
        if prompt_length >= limit:
            raise RequestError(
                f"prompt: {prompt_length} tokens leave no room for an answer, as max_model_len is {limit}; "
                "shorten the prompt or raise max_model_len",
                field="prompt",
            )
        length = limit if params.max_new_tokens is None else prompt_length + params.max_new_tokens
        if length > limit:
            raise RequestError(
                f"max_new_tokens: {prompt_length} prompt tokens + {params.max_new_tokens} new ones are more than "
                f"max_model_len={limit}; ask for at most {limit - prompt_length}, or None for what fits",
                field="max_new_tokens",
            )
        page_size = self.pages.page_size
        for group, pool in zip(self.pages.groups, self.pages.pools, strict=True):
            need = group.max_pages(length, self.max_num_batched_tokens, page_size)
            if need > pool.num_pages:
                raise CapacityError(
                    f"a request of up to {length} tokens needs {need} pages of {page_size} tokens in the "
                    f"{group.name} cache, which has {pool.num_pages} in all; lower max_new_tokens or the prompt, "
                    "or raise kv_cache_memory_bytes"
                )
        return length

    def add(self, prompt: tuple[int, ...], params: SamplingParams, *, seed: int, eos: tuple[int, ...]) -> Sequence:
        """Queue one answer. Raises as `max_length` does, before anything is kept."""
        length = self.max_length(len(prompt), params)
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(eos))
        self._ids += 1
        chain = Chain(self.pages.page_size, params.cache_salt) if self.enable_prefix_caching else None
        seq = Sequence(self._ids, params, len(prompt), list(prompt), seed, ends, length, chain)
        self.waiting.append(seq)
        return seq

    def next(self) -> Step | None:
        """The next forward pass, or None when there is nothing to do."""
        budget = self.max_num_batched_tokens
        scored = SCORED_TOKENS
        chunks: list[Chunk] = []
        started: list[Start] = []
        preempted = False
        i = 0
        while i < len(self.running) and budget:
            seq = self.running[i]
            count = min(budget, len(seq.tokens) - seq.computed)
            if seq.wants_prompt_logits:
                count = min(count, scored)
                scored -= count
                if not count:
                    i += 1
                    continue
            while not self.pages.reserve(seq.id, seq.computed, seq.computed + count):
                preempted = True
                last = self.running.pop()
                self._preempt(last)
                if last is seq:
                    break
            else:
                chunks.append(self._chunk(seq, count))
                budget -= count
                i += 1
        while self.waiting and budget and not preempted and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            # Room for all of its tokens, not for the first piece: or it would be thrown out again before it has
            # answered, and take the same pages and the same work in the next step.
            known = self._known(seq)
            if not self.pages.fits(len(seq.tokens), self.max_num_batched_tokens, known):
                break
            start = len(known) * self.pages.page_size
            count = min(budget, len(seq.tokens) - start)
            if seq.wants_prompt_logits:
                count = min(count, scored)
                scored -= count
                if not count:
                    break
            if known:
                self.pages.share(seq.id, known)
                seq.computed = start
                self.counters.cached_tokens += start
            self.pages.reserve(seq.id, start, start + count)
            self.running.append(self.waiting.popleft())
            if not seq.known:
                seq.known = True
                prompt = tuple(seq.tokens[: seq.prompt_length])
                started.append(Start(seq.id, prompt, seq.params, seq.seed, tuple(sorted(seq.end_ids))))
            chunks.append(self._chunk(seq, count))
            budget -= count
        if not chunks:
            return None
        self.counters.steps += 1
        finished, self._forget = tuple(self._forget), []
        return Step(self.counters.steps, tuple(started), finished, tuple(chunks))

    def _known(self, seq: Sequence) -> list[bytes]:
        """The names of the pages at its beginning that are there. The last token is always computed, for its logits;
        so are all that are scored."""
        if seq.chain is None or seq.wants_prompt_logits:
            return []
        names = seq.chain.names(seq.tokens, len(seq.tokens) - 1)
        return names[: self.pages.known(names)]

    def _chunk(self, seq: Sequence, count: int) -> Chunk:
        end = seq.computed + count
        tokens = tuple(seq.tokens[seq.computed : end])
        return Chunk(seq.id, seq.computed, tokens, self.pages.tables(seq.id), sample=end == len(seq.tokens))

    def _preempt(self, seq: Sequence) -> None:
        self.pages.free(seq.id)
        seq.computed = 0
        self.waiting.appendleft(seq)
        self.counters.preemptions += 1

    def commit(self, step: Step, tokens: Mapping[int, int | None]) -> list[tuple[Sequence, int | None]]:
        """Take in the sampled tokens; returns (sequence, token) for each that got one, None where its logits were bad.

        A sequence that ended meanwhile (aborted while the step ran) is passed over.
        """
        by_id = {s.id: s for s in self.running}
        out: list[tuple[Sequence, int | None]] = []
        for chunk in step.chunks:
            seq = by_id.get(chunk.sequence)
            if seq is None:
                continue
            if chunk.start < seq.prompt_length:
                self.counters.prompt_tokens += min(chunk.end, seq.prompt_length) - chunk.start
            seq.computed = chunk.end
            if chunk.sample and tokens[chunk.sequence] is None:
                self.finish(seq, "error")
                out.append((seq, None))
                continue
            if seq.chain is not None:
                self.pages.offer(seq.id, seq.chain.names(seq.tokens, seq.computed))
            if not chunk.sample:
                continue
            token = tokens[chunk.sequence]
            assert token is not None
            seq.tokens.append(token)
            self.counters.new_tokens += 1
            if token in seq.end_ids and seq.num_new > seq.params.min_new_tokens:
                self.finish(seq, "stop", token)
            elif len(seq.tokens) >= seq.max_length:
                self.finish(seq, "length")
            out.append((seq, token))
        return out

    def finish(self, seq: Sequence, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """End a sequence for good and give its pages back; the first reason stays."""
        if seq.finish_reason is not None:
            return
        seq.finish_reason, seq.stop_reason = reason, stop_reason
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1
        if reason == "error" and seq.chain is not None:  # NaN in a page would spread to whoever finds it
            self.pages.forget(seq.chain.names(seq.tokens, len(seq.tokens)))
        self.pages.free(seq.id)
        for queue in (self.running, self.waiting):
            if seq in queue:
                queue.remove(seq)
        if seq.known:
            self._forget.append(seq.id)

    def reset(self) -> None:
        """Begin anew with empty queues and free pages, after an interrupt that may have left them half-changed."""
        self.pages = Pages(self.pages.groups, [pool.num_pages for pool in self.pages.pools], self.pages.page_size)
        self.running.clear()
        self.waiting.clear()

    def stop(self, seq: Sequence, string: str) -> None:
        """A stop string stands in the text: it wins over a length or an end token reached with the same token."""
        self.finish(seq, "stop", string)
        if seq.finish_reason == "length":
            self.counters.finished["length"] -= 1
            self.counters.finished["stop"] = self.counters.finished.get("stop", 0) + 1
        seq.finish_reason, seq.stop_reason = "stop", string
