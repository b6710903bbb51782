"""Which sequences run next, with how many tokens, in which pages. Plain integers; no torch.

First come, first served, unless priorities are asked for. A step first goes on with what runs (one token for those that
decode, the next piece of the prompt for the others), then lets in what waits, within the token budget. When pages run out,
the sequence that was let in last gives all of its pages back and is computed again later; its answer does not change. So
whoever was let in first always moves on, and everyone ends within a number of steps that `bound` computes.

Pages that a step fills are offered to whoever comes with the same beginning (also to the sequence itself, when it is
computed again), and as soon as to those that come later in the same step: every layer writes the keys of all tokens of a
step before it looks at any.

The next step can be made before the one before it has been committed: what that one samples is UNKNOWN until then. Steps
run one after the other, so pages that one of them still reads or writes may be given to the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from slipstream.cache.pages import Chain, Pages
from slipstream.errors import CapacityError, RequestError
from slipstream.request import UNKNOWN, Chunk, FinishReason, SamplingParams, Start, Step
from slipstream.sequence import TURNS, Sequence, Waiting

SCORED_TOKENS = 256  # rows of logits that prompt_logprobs may take in one step: bounds the memory for them


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
        policy: "fcfs", or "priority": SamplingParams.priority decides who is let in next.
    """

    def __init__(self, pages: Pages, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int,
                 enable_prefix_caching: bool = True, policy: str = "fcfs") -> None:  # fmt: skip
        self.pages = pages
        self.enable_prefix_caching = enable_prefix_caching
        self.policy = policy
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.waiting = Waiting()
        self.running: list[Sequence] = []  # by rank
        self._unfinished: dict[int, Sequence] = {}
        # Pages up to this token, which are still to be named, and whether more than that token was computed.
        self._filled: list[tuple[Sequence, Chain, int, bool]] = []
        self.counters = Counters()
        self._ids = self._ranks = 0
        self._forget: list[int] = []

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def max_length(self, prompt_length: int, params: SamplingParams) -> int:
        """Tokens that prompt and answer may reach together.

        Raises:
            RequestError: they cannot fit max_model_len, or it has a priority and priorities are off.
            CapacityError: the whole cache is too small for this one request.
        """
        self.check_priority(params)
        limit = self.max_model_len
        if prompt_length >= limit:
            raise RequestError(
                f"prompt: {prompt_length} tokens leave no room for an answer, as max_model_len is {limit}; "
                "shorten the prompt, or raise max_model_len where the model was made for more",
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

    def check_priority(self, params: SamplingParams) -> None:
        """Raises RequestError if there is one, and priorities are off."""
        if params.priority and self.policy == "fcfs":
            raise RequestError(
                f"priority: {params.priority} has no effect while requests are served in the order in which they come; load the "
                'model with scheduling_policy="priority" (--scheduling-policy priority)',
                field="priority",
            )

    def add(self, prompt: tuple[int, ...], params: SamplingParams, *, seed: int, eos: tuple[int, ...]) -> Sequence:
        """Queue one answer. Raises as `max_length` does, before anything is kept."""
        length = self.max_length(len(prompt), params)
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(eos))
        self._ids += 1
        chain = Chain(self.pages.page_size, params.cache_salt) if self.enable_prefix_caching else None
        seq = Sequence(self._ids, params, len(prompt), list(prompt), seed, ends, length, chain)
        self._unfinished[seq.id] = seq
        self.waiting.add(seq)
        return seq

    def bound(self, seq: Sequence) -> int:
        """Most steps that are run from now on until this one has ended, whoever comes later.

        Whoever was let in first has the first claim on each step and on all pages, so it ends within the steps that it would
        take alone; then the next one is the first. With priorities, TURNS others can pass each time before it is the turn of
        whoever came first, and they may be as long as max_model_len.
        """

        def steps(q: Sequence) -> int:
            scored = q.params.prompt_logprobs is not None
            piece = min(self.max_num_batched_tokens, SCORED_TOKENS) if scored else self.max_num_batched_tokens
            return -(-q.prompt_length // piece) + q.max_length - q.prompt_length - 1

        ahead = [q for q in (*self.running, *self.waiting) if q.place < seq.place]
        total = steps(seq) + sum(map(steps, ahead))
        if self.policy == "priority" and not seq.rank:
            total += TURNS * (1 + sum(not q.rank for q in ahead)) * self.max_model_len
        return total

    def next(self) -> Step | None:
        """The next forward pass, or None when there is nothing to do."""
        self._settle()
        budget = self.max_num_batched_tokens
        scored = SCORED_TOKENS
        chunks: list[Chunk] = []
        started: list[Start] = []
        preempted = False
        i = 0
        while budget:
            if i == len(self.running) and (preempted or not self._let_in()):
                break
            seq = self.running[i]
            count = 0  # where its last token is on its way
            if len(seq.tokens) < seq.max_length:
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
                if not seq.known:
                    seq.known = True
                    prompt = tuple(seq.tokens[: seq.prompt_length])
                    started.append(Start(seq.id, prompt, seq.params, seq.seed, tuple(sorted(seq.end_ids))))
                chunks.append(self._chunk(seq, count))
                budget -= count
                i += 1
        if not chunks:
            return None
        self.counters.steps += 1
        finished, self._forget = tuple(self._forget), []
        return Step(self.counters.steps, tuple(started), finished, tuple(chunks))

    def _let_in(self) -> bool:
        """Who is next in the queue runs from now on, if there is room for all of its tokens: for the first piece alone would
        not do, or it would be thrown out again before it has answered, and take the same pages in the next step."""
        seq = self.waiting.first()
        if seq is None or len(self.running) >= self.max_num_seqs:
            return False
        known = self._known(seq)
        if not self.pages.fits(len(seq.tokens), self.max_num_batched_tokens, known):
            return False
        self.waiting.take(seq)
        if not seq.rank:
            self._ranks += 1
            seq.rank = self._ranks
        self.running.append(seq)
        if known:
            self.pages.share(seq.id, known)
            seq.computed = len(known) * self.pages.page_size
            self.counters.cached_tokens += seq.computed
        return True

    def _known(self, seq: Sequence) -> list[bytes]:
        """The names of the pages at its beginning that are there. The last token is always computed, for its logits;
        so are all that are scored."""
        if seq.chain is None or seq.wants_prompt_logits:
            return []
        self._settle(ones=False)
        most, size = len(seq.tokens) - 1, self.pages.page_size
        if most < size or not self.pages.begins_with(seq.chain.names(seq.tokens, size)[0]):
            return []  # most have nothing in common with those before, and their other pages need no name yet
        names = seq.chain.names(seq.tokens, most)
        return names[: self.pages.known(names)]

    def _chunk(self, seq: Sequence, count: int) -> Chunk:
        start, end = seq.computed, seq.computed + count
        tokens = tuple(seq.tokens[start:end])
        chunk = Chunk(seq.id, start, tokens, self.pages.tables(seq.id), sample=end == len(seq.tokens))
        seq.computed = end
        if tokens[-1] != UNKNOWN:
            self._offer(seq, start, end)
        if chunk.sample:
            seq.tokens.append(UNKNOWN)
        return chunk

    def _offer(self, seq: Sequence, start: int, end: int) -> None:
        """Let others find the pages that are filled by the tokens at start..end-1: not before anybody looks, as the step
        that fills them is still to be launched."""
        size = self.pages.page_size
        if seq.chain is not None and end // size > start // size:
            self._filled.append((seq, seq.chain, end, end - start > 1))

    def _settle(self, *, ones: bool = True) -> None:
        """Name the pages that were filled. Without `ones`, those stay that a single token of this step fills: in a step of such
        tokens alone, one kernel writes keys and reads those that were there (ops/attention/decode.py)."""
        filled, self._filled = self._filled, [] if ones else [f for f in self._filled if not f[-1]]
        for seq, chain, end, more in filled:
            if ones or more:
                self.pages.offer(seq.id, chain.names(seq.tokens, end))

    def spoil(self, step: Step) -> None:
        """The step did not come to its end: nobody shall find the pages that it was to fill."""
        self._settle()
        for chunk in step.chunks:
            seq = self._unfinished.get(chunk.sequence)
            if seq is not None and seq.chain is not None:
                end = chunk.end - (seq.tokens[chunk.end - 1] == UNKNOWN)
                self.pages.forget(seq.chain.names(seq.tokens, end)[chunk.start // self.pages.page_size :])

    def _preempt(self, seq: Sequence) -> None:
        self._settle()
        self.pages.free(seq.id)
        seq.computed = 0
        self.waiting.put_back(seq)
        self.counters.preemptions += 1

    def commit(self, step: Step, tokens: Mapping[int, int | None]) -> list[tuple[Sequence, int | None]]:
        """Take in the sampled tokens; returns (sequence, token) for each that got one, None where its logits were bad.

        A sequence that ended meanwhile (aborted while the step ran) is passed over.
        """
        out: list[tuple[Sequence, int | None]] = []
        for chunk in step.chunks:
            seq = self._unfinished.get(chunk.sequence)
            if seq is None:
                continue
            if chunk.start < seq.prompt_length:
                self.counters.prompt_tokens += min(chunk.end, seq.prompt_length) - chunk.start
            if not chunk.sample:
                continue
            token = tokens[chunk.sequence]
            if token is None:
                self.finish(seq, "error")
            else:
                self._append(seq, chunk.end, token)
            out.append((seq, token))
        return out

    def _append(self, seq: Sequence, at: int, token: int) -> None:
        seq.tokens[at] = token
        self.counters.new_tokens += 1
        if token in seq.end_ids and at >= seq.prompt_length + seq.params.min_new_tokens:
            self.finish(seq, "stop", token)
        elif at + 1 >= seq.max_length:
            self.finish(seq, "length")
        elif seq.computed > at:  # the next step is on its way, and could not yet name a page that it fills
            self._offer(seq, at, at + 1)

    def finish(self, seq: Sequence, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """End a sequence for good and give its pages back; the first reason stays."""
        if seq.finish_reason is not None:
            return
        self._settle()
        seq.finish_reason, seq.stop_reason = reason, stop_reason
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1
        self._unfinished.pop(seq.id, None)
        while seq.tokens[-1] == UNKNOWN:
            seq.tokens.pop()
        if reason == "error" and seq.chain is not None:  # NaN in a page would spread to whoever finds it
            self.pages.forget(seq.chain.names(seq.tokens, len(seq.tokens)))
        self.pages.free(seq.id)
        self.waiting.remove(seq)
        if seq in self.running:
            self.running.remove(seq)
        if seq.known:
            self._forget.append(seq.id)

    def reset(self) -> None:
        """Begin anew with empty queues and free pages, after an interrupt that may have left them half-changed."""
        self.pages = Pages(self.pages.groups, [pool.num_pages for pool in self.pages.pools], self.pages.page_size)
        self.running.clear()
        self._filled.clear()
        self._unfinished.clear()
        self.waiting = Waiting()

    def amend(self, seq: Sequence, reason: FinishReason, stop_reason: str | None = None) -> None:
        """End a sequence, or say of one that ended with this very token how it ends instead."""
        self.finish(seq, reason, stop_reason)
        if seq.finish_reason is not None and seq.finish_reason != reason:
            self.counters.finished[seq.finish_reason] -= 1
            self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1
        seq.finish_reason, seq.stop_reason = reason, stop_reason
