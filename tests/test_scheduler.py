"""Random traces against scheduler and pages, with a fake model that reads what it is told to from a fake cache.

After every step: no page lost or owned twice, every table covers exactly what is seen, the budget is kept, whoever was let
in first moves on, and what the fake cache holds at each visible position is that request's own token. At the end: each
request has ended as it would have alone, within the steps that were promised when it came.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from slipstream.cache.pages import Chain, PagePool, Pages
from slipstream.cache.spec import CacheGroup, group_layers
from slipstream.config import ModelConfig
from slipstream.errors import CapacityError, RequestError
from slipstream.request import UNKNOWN, SamplingParams, Step
from slipstream.scheduler import SCORED_TOKENS, Scheduler
from slipstream.sequence import TURNS, Sequence

EOS = 1


def groups_of(*windows: int | None) -> tuple[CacheGroup, ...]:
    return tuple(CacheGroup(w, (i,), num_kv_heads=2, head_dim=16) for i, w in enumerate(windows))


def answer_token(seed: int, position: int) -> int:
    """What the fake model says at this position: one in 24 is the end token, one in 400 is no token at all (0)."""
    x = random.Random(seed * 100_003 + position).random()
    return 0 if x < 1 / 400 else EOS if x < 1 / 24 else 2 + int(x * 1000)


def alone(seq: Sequence) -> tuple[list[int], str, int | str | None]:
    """How a request must end if nothing cancels it: tokens, finish_reason, stop_reason. No pages, no queue."""
    tokens = list(seq.tokens[: seq.prompt_length])
    while True:
        token = answer_token(seq.seed, len(tokens))
        if token == 0:
            return tokens, "error", None
        tokens.append(token)
        if token in seq.end_ids and len(tokens) - seq.prompt_length > seq.params.min_new_tokens:
            return tokens, "stop", token
        if len(tokens) == seq.max_length:
            return tokens, "length", None


@dataclass
class Model:
    """Runs steps on a cache of plain integers and checks every one of them. It has its own tokens, as a device has."""

    scheduler: Scheduler
    slots: list[dict[int, int]] = field(default_factory=list)  # slot -> hash of the salt and all tokens up to there
    salts: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    computed: dict[int, int] = field(default_factory=dict)
    known: set[int] = field(default_factory=set)
    forgotten: set[int] = field(default_factory=set)
    sampled: set[int] = field(default_factory=set)  # in the step before
    peak: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slots = [{} for _ in self.scheduler.pages.groups]
        self.peak = [0 for _ in self.scheduler.pages.groups]

    def run(self, step: Step, sequences: dict[int, Sequence]) -> dict[int, int | None]:
        s = self.scheduler
        assert 0 < step.num_tokens <= s.max_num_batched_tokens
        assert len({c.sequence for c in step.chunks}) == len(step.chunks) <= s.max_num_seqs >= len(s.running)
        for start in step.started:
            seq = sequences[start.sequence]
            assert start.sequence not in self.known
            assert list(start.prompt_token_ids) == seq.tokens[: seq.prompt_length] and start.seed == seq.seed
            self.known.add(start.sequence)
            self.tokens[seq.id] = list(start.prompt_token_ids)
        for gone in step.finished:
            assert gone in self.known - self.forgotten and sequences[gone].finish_reason is not None
            self.forgotten.add(gone)
        tokens: dict[int, int | None] = {}
        work: list[tuple[int, int, int, list[int], tuple]] = []
        for chunk in step.chunks:
            seq = sequences[chunk.sequence]
            assert seq.id in self.known - self.forgotten
            assert chunk.token_ids
            if chunk.start != self.computed.get(seq.id, 0):  # it begins, or begins again, behind what is cached
                assert chunk.start % s.pages.page_size == 0
            elif seq.id not in self.computed:
                assert chunk.start == 0
            mine, last = self.tokens[seq.id], chunk.token_ids[-1]
            if last == UNKNOWN:
                assert chunk.end == len(mine) > seq.prompt_length and seq.id in self.sampled
                last = mine[-1]
            assert [*chunk.token_ids[:-1], last] == mine[chunk.start : chunk.end]
            assert chunk.sample == (chunk.end == len(mine))
            self.computed[seq.id] = chunk.end
            work.append((chunk.sequence, chunk.start, chunk.end, list(mine), chunk.tables))
            if chunk.sample:
                tokens[seq.id] = answer_token(seq.seed, chunk.end) or None
                mine.append(tokens[seq.id] or 0)
        self.sampled = set(tokens)
        if all(len(c.token_ids) == 1 for c in step.chunks):  # one kernel reads what was there, and writes
            for part in work:
                self._write_and_read(*part, write=False)
        for part in work:
            self._write_and_read(*part)
        return tokens

    def _write_and_read(
        self, sequence: int, start: int, end: int, tokens: list[int], tables: tuple, write: bool = True
    ) -> None:
        pages = self.scheduler.pages
        size = pages.page_size
        for i, (group, table, cache) in enumerate(zip(pages.groups, tables, self.slots, strict=True)):
            first = group.first_visible(start)
            live = range(first // size, (end - 1) // size + 1)
            assert (table.first, len(table.pages)) == (live.start, len(live)), "exactly the live window"
            assert len(table.pages) <= group.max_pages(end, self.scheduler.max_num_batched_tokens, size)
            slot = {p: table.pages[p // size - table.first] * size + p % size for p in range(first, end)}
            rows = [hash(self.salts.get(sequence, ""))]
            for token in tokens[:end]:
                rows.append(hash((rows[-1], token)))
            for p in range(start, end) if write else ():
                cache[slot[p]] = rows[p + 1]
            for p in range(first, end if write else start):
                assert cache.get(slot[p]) == rows[p + 1], "other tokens stand here"
            self.peak[i] = max(self.peak[i], pages.pools[i].num_pages - pages.pools[i].num_free)


def check_queues(s: Scheduler) -> None:
    s.pages.check()
    places = [q.place for q in (*s.running, *s.waiting)]
    assert places == sorted(places), "whoever was let in stays before whoever was not, and before whoever came later"
    if s.policy == "fcfs":
        ids = [q.id for q in (*s.running, *s.waiting)]
        assert ids == sorted(ids), "first come, first served: whoever runs came before whoever waits"
    assert all(q.finish_reason is None for q in (*s.running, *s.waiting))
    assert all(s.pages.held(q.id) == () for q in s.waiting), "who waits holds nothing"
    assert set(s.pages._tables) == {q.id for q in s.running if s.pages.held(q.id)}


def trace(seed: int, *, longest: int = 40) -> Counter[str]:
    rng = random.Random(seed)
    windows = rng.choice([(None,), (None, 6), (3,), (None, 1, 9), (None, 17)])
    size, budget, max_len = rng.choice([1, 2, 4, 7, 16]), rng.choice([1, 2, 3, 8, 64]), rng.randint(8, longest)
    groups = groups_of(*windows)
    least = [g.max_pages(max_len, budget, size) for g in groups]
    pages = Pages(groups, [n + rng.choice([0, 1, n, 9 * n]) for n in least], size)
    s = Scheduler(
        pages, max_num_seqs=rng.choice([1, 2, 5, 50]), max_num_batched_tokens=budget, max_model_len=max_len,
        enable_prefix_caching=rng.random() < 0.8, policy=rng.choice(["fcfs", "fcfs", "priority"]),
    )  # fmt: skip
    model = Model(s)
    ahead = rng.random() < 0.5  # each step is made before the one before it is committed
    pending: Step | None = None
    promised: dict[int, int] = {}
    ended_at: dict[int, int] = {}
    beginnings = [[rng.randint(2, 900) for _ in range(max_len)] for _ in range(2)]
    sequences: dict[int, Sequence] = {}
    cancelled: set[int] = set()
    arrivals = rng.randint(1, 10)

    def cancel() -> None:
        seq = rng.choice(list(sequences.values()))
        if seq.finish_reason is None:
            cancelled.add(seq.id)
        s.finish(seq, "abort")

    for _ in range(20_000):
        if arrivals and (rng.random() < 0.4 or not s.busy):
            arrivals -= 1
            length = rng.randint(1, max_len - 1)
            new = rng.choice([None, rng.randint(1, max_len - length)])
            least_new = rng.randint(0, new or 3)
            params = SamplingParams(
                max_new_tokens=new, min_new_tokens=least_new, ignore_eos=rng.random() < 0.3, stop_token_ids=(2,),
                priority=rng.randint(-2, 2) if s.policy == "priority" else 0, cache_salt=rng.choice(["", "", "other"]),
                prompt_logprobs=rng.choice([None, None, None, 0]),
            )  # fmt: skip
            same = rng.randint(0, length)
            known = rng.choice([*beginnings, *(q.tokens for q in sequences.values())])  # also an answer, gone on with
            known = [t for t in known if t != UNKNOWN]
            prompt = tuple([*known[:same], *(rng.randint(2, 900) for _ in range(length))][:length])
            for _ in range(rng.choice([1, 1, 1, 4])):  # as n = 4 does
                seq = s.add(prompt, params, seed=rng.getrandbits(32), eos=(EOS,))
                sequences[seq.id], model.salts[seq.id] = seq, params.cache_salt
                promised[seq.id] = s.counters.steps + s.bound(seq)
        if rng.random() < 0.02 and sequences:
            cancel()
            check_queues(s)
        oldest = min((q for q in (*s.running, *s.waiting)), key=lambda q: q.place, default=None)
        if oldest is not None and not oldest.rank:
            oldest = s.waiting.first()
        made = s.next()
        check_queues(s)
        busy = {c.sequence for step in (pending, made) if step is not None for c in step.chunks}
        assert oldest is None or oldest.id in busy, "the first must move on"
        step, pending = (pending, made) if ahead else (made, None)
        if step is None:
            if not arrivals and pending is None and oldest is None:
                break
            continue
        tokens = model.run(step, sequences)
        if rng.random() < 0.02:
            cancel()  # while the step runs
        due = {i: t for i, t in tokens.items() if sequences[i].finish_reason is None}
        got = s.commit(step, tokens)
        assert {q.id: t for q, t in got} == due
        check_queues(s)
        for seq in sequences.values():
            if seq.finish_reason is not None:
                ended_at.setdefault(seq.id, step.number)
    else:
        raise AssertionError("the trace does not end")
    assert all(p.num_free == p.num_pages for p in pages.pools), "every page has come back"
    ended: Counter[str] = Counter()
    for seq in sequences.values():
        assert seq.finish_reason is not None
        ended[seq.finish_reason] += 1
        assert ended_at.get(seq.id, 0) <= promised[seq.id], "within its bound"
        want, reason, stop = alone(seq)
        if seq.id in cancelled:
            assert seq.finish_reason == "abort" and seq.tokens == want[: len(seq.tokens)]
        else:
            assert (seq.tokens, seq.finish_reason, seq.stop_reason) == (want, reason, stop)
    assert s.counters.finished == ended
    assert s.counters.new_tokens == sum(q.num_new for q in sequences.values())
    assert model.known - model.forgotten == set(s._forget), "the runner hears of every end"
    ended["preemptions"] = s.counters.preemptions
    ended["reused"] = s.counters.cached_tokens
    assert s.enable_prefix_caching or not ended["reused"]
    return ended


def test_random_traces() -> None:
    total: Counter[str] = Counter()
    for seed in range(1500):
        try:
            total += trace(seed)
        except AssertionError as e:
            raise AssertionError(f"trace({seed}): {e}") from e
    for what in ("stop", "length", "abort", "error", "preemptions", "reused"):
        assert total[what] > 20, f"the traces hardly ever saw {what}: {total}"


@pytest.mark.slow
def test_many_random_traces() -> None:
    for seed in range(10_000, 20_000):
        try:
            trace(seed, longest=40 if seed % 10 else 300)
        except AssertionError as e:
            raise AssertionError(f"trace({seed}): {e}") from e


# A test that cannot fail is worth nothing: bugs are patched in, and the traces must notice.


def traces_fail() -> None:
    with pytest.raises(AssertionError):
        for seed in range(200):
            trace(seed)


def test_a_leak_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    give = PagePool.give
    monkeypatch.setattr(PagePool, "give", lambda self, pages: give(self, pages[1:]))
    traces_fail()


def test_a_double_free_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def free(self: Pages, sequence: int) -> None:
        for pool, table in zip(self.pools, self._tables.get(sequence, ()), strict=False):
            pool.give(table.pages)

    monkeypatch.setattr(Pages, "free", free)
    traces_fail()


def test_a_page_given_away_too_early_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = CacheGroup.first_visible
    monkeypatch.setattr(
        Pages, "_drop",
        lambda self, group, pool, table, start, drop=Pages._drop: drop(self, Early(group), pool, table, start),
    )  # fmt: skip

    class Early:
        def __init__(self, group: CacheGroup) -> None:
            self.group = group

        def first_visible(self, position: int) -> int:
            return seen(self.group, position) + (self.group.window is not None)

    traces_fail()


def test_a_name_without_the_tokens_before_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(Chain):
        def names(self, tokens: list[int], end: int) -> list[bytes]:  # type: ignore[override]
            size = self._size
            return [bytes(str(tokens[at : at + size]), "ascii") for at in range(0, end - size + 1, size)]

    monkeypatch.setattr("slipstream.scheduler.Chain", Short)
    with pytest.raises(AssertionError, match="other tokens stand here"):
        for seed in range(1500):
            trace(seed)


def test_a_salt_left_out_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slipstream.scheduler.Chain", lambda size, salt: Chain(size))
    with pytest.raises(AssertionError, match="other tokens stand here"):
        for seed in range(1500):
            trace(seed)


def test_a_lost_token_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    preempt = Scheduler._preempt

    def lose(self: Scheduler, seq: Sequence) -> None:
        preempt(self, seq)
        if seq.num_new:
            seq.tokens.pop()

    monkeypatch.setattr(Scheduler, "_preempt", lose)
    traces_fail()


def test_a_younger_request_going_first_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def back(self: Scheduler, seq: Sequence) -> None:
        self.pages.free(seq.id)
        seq.computed = seq.rank = 0
        self.waiting.add(seq)

    monkeypatch.setattr(Scheduler, "_preempt", back)
    traces_fail()


def test_a_promise_that_is_too_short_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = Scheduler.bound
    monkeypatch.setattr(Scheduler, "bound", lambda self, seq: bound(self, seq) // 2)
    traces_fail()


# Single rules.


def scheduler(
    *windows: int | None, num_pages: int = 64, size: int = 4, caching: bool = False, policy: str = "fcfs", **limits: int
) -> Scheduler:
    groups = groups_of(*(windows or (None,)))
    kept = {"max_num_seqs": 8, "max_num_batched_tokens": 16, "max_model_len": 64} | limits
    return Scheduler(
        Pages(groups, [num_pages] * len(groups), size), enable_prefix_caching=caching, policy=policy, **kept
    )


def add(s: Scheduler, length: int, **params: object) -> Sequence:
    return s.add(tuple(range(2, 2 + length)), SamplingParams(**{"max_new_tokens": None, **params}), seed=0, eos=(EOS,))


def tick(s: Scheduler, token: int = 9) -> Step | None:
    step = s.next()
    if step is not None:
        s.commit(step, {c.sequence: token for c in step.chunks if c.sample})
    return step


def lengths(step: Step | None) -> list[tuple[int, int, int]]:
    return [] if step is None else [(c.sequence, c.start, len(c.token_ids)) for c in step.chunks]


def test_an_idle_scheduler_has_no_step() -> None:
    s = scheduler()
    assert s.next() is None and not s.busy and s.counters.steps == 0


def test_decoding_goes_first_and_prompts_share_what_is_left() -> None:
    s = scheduler()
    add(s, 3, max_new_tokens=9)
    assert lengths(tick(s)) == [(1, 0, 3)]
    add(s, 20, max_new_tokens=9)
    add(s, 5, max_new_tokens=9)
    assert lengths(tick(s)) == [(1, 3, 1), (2, 0, 15)]
    assert lengths(tick(s)) == [(1, 4, 1), (2, 15, 5), (3, 0, 5)]
    assert lengths(tick(s)) == [(1, 5, 1), (2, 20, 1), (3, 5, 1)]


def test_only_the_last_piece_of_a_prompt_gets_a_token() -> None:
    s = scheduler(max_num_batched_tokens=4)
    seq = add(s, 10, max_new_tokens=1)
    samples = []
    while (step := tick(s)) is not None:
        samples.append(step.chunks[0].sample)
    assert samples == [False, False, True] and seq.finish_reason == "length" and seq.num_new == 1


def test_preempted_last_come_and_answered_all_the_same() -> None:
    """Four pages of four tokens; two requests of eight tokens that will be twelve long."""
    s = scheduler(num_pages=4, max_model_len=16)
    first, second = add(s, 7, max_new_tokens=5), add(s, 7, max_new_tokens=5)
    assert lengths(tick(s)) == [(1, 0, 7), (2, 0, 7)]
    assert lengths(tick(s)) == [(1, 7, 1), (2, 7, 1)]
    assert lengths(tick(s)) == [(1, 8, 1)], "a fifth page is not there, so the second waits"
    assert s.pages.held(second.id) == () and second.num_new == 2 and s.counters.preemptions == 1
    assert lengths(tick(s)) == [(1, 9, 1)], "and is not let in again before all of its tokens have room"
    assert lengths(tick(s)) == [(1, 10, 1)]
    assert first.finish_reason == "length"
    assert lengths(tick(s)) == [(2, 0, 9)], "prompt and answer so far, computed anew"
    while tick(s):
        pass
    assert second.finish_reason == "length" and second.num_new == 5


def test_a_long_prompt_is_not_let_in_piece_by_piece_where_it_has_no_room() -> None:
    """Else it would take the budget, be thrown out at the last piece, and begin again, while the first runs."""
    s = scheduler(num_pages=10, max_num_batched_tokens=8, max_model_len=40)
    add(s, 8, max_new_tokens=20)
    tick(s)
    late = add(s, 36, max_new_tokens=2)
    for _ in range(19):
        tick(s)
    assert s.counters.preemptions == 0 and s.counters.prompt_tokens == 8 and late.computed == 0
    while tick(s):
        pass
    assert late.finish_reason == "length" and s.counters.prompt_tokens == 8 + 36


def test_the_oldest_never_throws_itself_out() -> None:
    s = scheduler(num_pages=4, max_model_len=16)
    sequences = [add(s, 5, max_new_tokens=11) for _ in range(6)]
    steps = 0
    while tick(s):
        steps += 1
        assert s.running[:1] in ([], [next((q for q in sequences if q.finish_reason is None), None)])
    assert all(q.finish_reason == "length" and q.num_new == 11 for q in sequences)
    assert steps <= 6 * 11


def test_min_new_tokens_and_ignore_eos() -> None:
    s = scheduler()
    plain = add(s, 2, max_new_tokens=9)
    later = add(s, 2, max_new_tokens=9, min_new_tokens=3)
    never = add(s, 2, max_new_tokens=9, ignore_eos=True)
    own = add(s, 2, max_new_tokens=9, ignore_eos=True, stop_token_ids=(EOS,))
    while tick(s, EOS):
        pass
    assert (plain.finish_reason, plain.stop_reason, plain.num_new) == ("stop", EOS, 1)
    assert (later.finish_reason, later.num_new) == ("stop", 4)
    assert (never.finish_reason, never.num_new) == ("length", 9)
    assert (own.finish_reason, own.num_new) == ("stop", 1)


def test_an_end_token_as_the_last_one_allowed_is_a_stop() -> None:
    s = scheduler()
    seq = add(s, 2, max_new_tokens=1)
    tick(s, EOS)
    assert seq.finish_reason == "stop"


def test_a_stop_string_wins_and_is_counted_once() -> None:
    s = scheduler()
    seq = add(s, 2, max_new_tokens=1)
    tick(s)
    assert s.counters.finished == {"length": 1}
    s.amend(seq, "stop", "END")
    assert (seq.finish_reason, seq.stop_reason) == ("stop", "END")
    assert sum(s.counters.finished.values()) == s.counters.finished["stop"] == 1


def test_the_first_reason_stays() -> None:
    s = scheduler()
    seq = add(s, 2)
    s.finish(seq, "abort")
    s.finish(seq, "error")
    assert seq.finish_reason == "abort" and s.counters.finished == {"abort": 1} and not s.busy


def test_one_bad_row_ends_alone() -> None:
    s = scheduler()
    good, bad = add(s, 2, max_new_tokens=3), add(s, 2, max_new_tokens=3)
    step = s.next()
    assert step is not None
    assert s.commit(step, {good.id: 9, bad.id: None}) == [(good, 9), (bad, None)]
    assert bad.finish_reason == "error" and good.finish_reason is None and s.pages.held(bad.id) == ()
    step = s.next()
    assert step is not None and step.finished == (bad.id,)


def test_who_never_ran_need_not_be_forgotten() -> None:
    s = scheduler(max_num_seqs=1)
    first, waits = add(s, 2), add(s, 2)
    tick(s)
    s.finish(waits, "abort")
    s.finish(first, "abort")
    add(s, 2)
    step = s.next()
    assert step is not None and step.finished == (first.id,)


def test_reset_gives_everything_back() -> None:
    s = scheduler()
    add(s, 9)
    add(s, 40)
    s.next()
    s.reset()
    assert not s.busy and s.next() is None
    assert all(p.num_free == p.num_pages == 64 for p in s.pages.pools)


@pytest.mark.parametrize(
    ("length", "new", "error", "numbers"),
    [
        (64, 1, RequestError, ("64 tokens", "max_model_len is 64")),
        (200, None, RequestError, ("200 tokens", "64")),
        (60, 5, RequestError, ("60 prompt tokens", "5 new", "max_model_len=64", "at most 4")),
        (40, 10, CapacityError, ("50 tokens", "13 pages of 4", "full_attention", "10 in all")),
    ],
)
def test_what_can_never_fit_is_refused_with_the_numbers(
    length: int, new: int | None, error: type[Exception], numbers: tuple[str, ...]
) -> None:
    s = scheduler(num_pages=10)
    with pytest.raises(error) as caught:
        add(s, length, max_new_tokens=new)
    assert all(n in str(caught.value) for n in numbers), caught.value
    assert not s.busy and s._ids == 0
    add(s, 30, max_new_tokens=10)


def test_the_longest_that_fits_is_taken() -> None:
    s = scheduler()
    assert add(s, 63, max_new_tokens=None).max_length == 64
    assert add(s, 60, max_new_tokens=4).max_length == 64
    while tick(s):
        pass
    assert s.counters.finished == {"length": 2}


def test_a_sliding_cache_serves_what_a_full_one_of_its_size_refuses() -> None:
    sliding, full = (scheduler(w, num_pages=4, max_num_batched_tokens=4) for w in (5, None))
    with pytest.raises(CapacityError):
        add(full, 10, max_new_tokens=30)
    seq = add(sliding, 10, max_new_tokens=30)
    while tick(sliding):
        pass
    assert seq.finish_reason == "length" and seq.num_new == 30 and sliding.counters.preemptions == 0


GPT_OSS = {
    "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
    "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "max_position_embeddings": 131072,
}  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 128, 2048])
def test_4096_tokens_of_gpt_oss_use_at_most_55_percent(chunk: int) -> None:
    """12 of 24 layers see 128 tokens. Peak bytes of pages that are held, against a cache of 24 full layers."""
    page_size, length, prompt = 16, 4096, 37
    groups = group_layers(ModelConfig.from_hf(GPT_OSS))
    assert [(g.window, len(g.layers)) for g in groups] == [(None, 12), (128, 12)]
    pages = Pages(groups, [g.max_pages(length, chunk, page_size) for g in groups], page_size)
    s = Scheduler(pages, max_num_seqs=4, max_num_batched_tokens=chunk, max_model_len=length)
    seq = s.add(tuple(range(2, 2 + prompt)), SamplingParams(max_new_tokens=length - prompt), seed=0, eos=())
    page_bytes = [g.bytes_per_token(2) * page_size for g in groups]
    peak, peak_sliding = 0, 0
    while (step := s.next()) is not None:
        held = pages.held(seq.id)
        peak = max(peak, sum(n * b for n, b in zip(held, page_bytes, strict=True)))
        peak_sliding = max(peak_sliding, held[1])
        s.commit(step, {c.sequence: 5 for c in step.chunks if c.sample})
    assert seq.finish_reason == "length" and len(seq.tokens) == length
    full = 24 * 2 * 8 * 64 * 2 * length
    assert peak <= 0.55 * full, peak / full
    # The window's pages: 128 tokens decoded one by one touch at most ceil(127 / 16) + 1 pages.
    assert peak_sliding == groups[1].max_pages(length, 1, page_size) == 9
    assert peak == (length // page_size * page_bytes[0]) + 9 * page_bytes[1]


def test_a_long_prompt_holds_one_chunk_beside_the_window() -> None:
    groups = group_layers(ModelConfig.from_hf(GPT_OSS))
    bound = groups[1].max_pages(131072, 2048, 16)
    assert bound == -(-(127 + 2048 - 1) // 16) + 1 == 137
    pages = Pages(groups, [131072 // 16, bound], 16)
    s = Scheduler(pages, max_num_seqs=1, max_num_batched_tokens=2048, max_model_len=131072)
    seq = s.add((3,) * 20_000, SamplingParams(max_new_tokens=2), seed=0, eos=())
    peak = 0
    while (step := s.next()) is not None:
        peak = max(peak, pages.held(seq.id)[1])
        s.commit(step, {c.sequence: 5 for c in step.chunks if c.sample})
    assert 128 < peak <= bound


def test_scored_tokens_are_bounded_in_a_step_and_all_come_in_the_end() -> None:
    group = CacheGroup(None, (0,), 1, 1)
    scheduler = Scheduler(Pages((group,), (1000,), 16), max_num_seqs=8, max_num_batched_tokens=4096, max_model_len=4096,
                          enable_prefix_caching=False)  # fmt: skip
    scored = SamplingParams(prompt_logprobs=0, max_new_tokens=1)
    for length in (600, 300, 20):
        scheduler.add(tuple(range(length)), scored, seed=0, eos=())
    plain = scheduler.add(tuple(range(50)), SamplingParams(max_new_tokens=1), seed=0, eos=())
    done = 0
    while scheduler.busy:
        step = scheduler.next()
        assert step is not None
        done += step.num_tokens
        assert sum(len(c.token_ids) for c in step.chunks if c.sequence != plain.id) <= SCORED_TOKENS
        scheduler.commit(step, {c.sequence: 7 for c in step.chunks})
    assert done == 600 + 300 + 20 + 50


# Who is next.


def numbers(s: Scheduler, *priorities: int) -> list[Sequence]:
    params = [SamplingParams(max_new_tokens=2, priority=p) for p in priorities]
    return [s.add((5, 6, 7), p, seed=0, eos=()) for p in params]


def order(s: Scheduler) -> list[int]:
    found: list[int] = []
    while (step := tick(s)) is not None:
        found += [c.sequence for c in step.chunks if c.sequence not in found]
    return found


def test_the_lower_priority_goes_first_and_equals_as_they_came() -> None:
    s = scheduler(max_num_seqs=1, policy="priority")
    numbers(s, 0, 5, -1, 0, -1)
    assert order(s) == [3, 5, 1, 4, 2]


def test_a_queue_keeps_nothing_of_those_that_left() -> None:
    s = scheduler(max_num_seqs=1, policy="priority")
    numbers(s, 0, 9)
    for _ in range(1000):
        (seq,) = numbers(s, 5)
        s.finish(seq, "abort")
    assert len(s.waiting) == 2 and len(s.waiting._heap) < 100
    assert order(s) == [1, 2]


def test_priorities_that_are_off_are_refused() -> None:
    s = scheduler()
    with pytest.raises(RequestError, match="scheduling_policy"):
        numbers(s, 1)
    assert not s.busy


def test_who_came_first_is_let_in_now_and_then() -> None:
    s = scheduler(max_num_seqs=1, policy="priority")
    last, first = numbers(s, 7, 7)
    promised = s.bound(first)
    steps = 0
    while first.finish_reason is None:
        numbers(s, 0, 0)  # more than there is time for
        tick(s)
        steps += 1
        if steps == (TURNS + 1) * 2:
            assert last.finish_reason == "length"
    assert steps == 2 * (TURNS + 1) * 2 <= promised


def test_who_runs_is_not_thrown_out_for_a_priority() -> None:
    s = scheduler(max_num_seqs=1, policy="priority")
    (slow,) = numbers(s, 9)
    tick(s)
    numbers(s, -9)
    tick(s)
    assert slow.finish_reason == "length" and s.counters.preemptions == 0


def test_the_bound_is_what_those_before_take_one_by_one() -> None:
    s = scheduler(max_num_batched_tokens=4)
    first, second = add(s, 9, max_new_tokens=5), add(s, 4, max_new_tokens=2)
    assert (s.bound(first), s.bound(second)) == (3 + 4, 3 + 4 + 1 + 1)
    while second.finish_reason is None:
        left = s.bound(second)
        assert left > 0
        tick(s)
    assert s.counters.steps <= 9


# Pages that are found again.


def test_what_a_step_computes_is_shared_in_the_same_step() -> None:
    """Three with the same beginning, and one without."""
    s = scheduler(caching=True, max_num_batched_tokens=64)
    prompt = tuple(range(100, 130))
    for tokens in (prompt, prompt, (*prompt[:9], 5), tuple(range(10))):
        s.add(tokens, SamplingParams(max_new_tokens=2), seed=0, eos=())
    assert lengths(tick(s)) == [(1, 0, 30), (2, 28, 2), (3, 8, 2), (4, 0, 10)]
    assert s.counters.cached_tokens == 28 + 8 and s.counters.preemptions == 0


def single_token_fills(others: int) -> list[list[tuple[int, int, int]]]:
    """The last token of a prompt comes alone, and fills a page that others begin with."""
    s = scheduler(caching=True, max_num_batched_tokens=7)
    prompt = tuple(range(100, 108))
    sequences = {}
    for tokens in (prompt, (*prompt, 3), (*prompt, 4, 5))[: 1 + others]:
        seq = s.add(tokens, SamplingParams(max_new_tokens=2), seed=7, eos=())
        sequences[seq.id] = seq
    model, steps = Model(s), []
    for _ in range(2):
        step = s.next()
        assert step is not None
        steps.append(lengths(step))
        s.commit(step, model.run(step, sequences))
    return steps


def test_what_a_single_token_fills_is_not_shared_in_the_same_step() -> None:
    """In a step of single tokens one kernel writes keys and reads them, so nobody may see what another writes."""
    assert single_token_fills(1) == [[(1, 0, 7)], [(1, 7, 1), (2, 4, 5)]]
    assert single_token_fills(2)[1] == [(1, 7, 1), (2, 4, 5), (3, 8, 1)], "of a longer piece it is"


def test_a_key_read_in_the_step_that_writes_it_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    settle = Scheduler._settle
    monkeypatch.setattr(Scheduler, "_settle", lambda self, ones=True: settle(self))
    with pytest.raises(AssertionError, match="other tokens stand here"):
        single_token_fills(1)


def test_a_long_beginning_is_computed_once_in_several_steps() -> None:
    s = scheduler(caching=True, max_num_batched_tokens=16)
    prompt = tuple(range(100, 140))
    first, *_ = [s.add(prompt, SamplingParams(max_new_tokens=2), seed=0, eos=()) for _ in range(3)]
    assert lengths(tick(s)) == [(1, 0, 16)]
    assert lengths(tick(s)) == [(1, 16, 16)]
    s.finish(first, "abort")
    assert lengths(tick(s)) == [(2, 32, 8), (3, 36, 4)], "what was finished is there"
    s.pages.check()


def test_what_a_broken_step_was_to_fill_is_not_found() -> None:
    s = scheduler(caching=True)
    prompt = tuple(range(100, 112))
    seq = s.add(prompt, SamplingParams(max_new_tokens=9), seed=0, eos=())
    tick(s), tick(s)
    step = s.next()
    while step is not None and step.chunks[0].end < 16:
        s.commit(step, {seq.id: 9})
        step = s.next()
    assert step is not None
    s.spoil(step)
    s.finish(seq, "abort")
    assert s.pages.num_cached == (3,), "the page of tokens 12 to 15 was to be filled by that step"
    s.pages.check()


def test_a_scored_prompt_waits_for_nobody() -> None:
    s = scheduler(caching=True, max_num_batched_tokens=64)
    prompt = tuple(range(100, 130))
    for scored in (None, 0):
        s.add(prompt, SamplingParams(max_new_tokens=2, prompt_logprobs=scored), seed=0, eos=())
    assert lengths(tick(s)) == [(1, 0, 30), (2, 0, 30)]


def run_out(s: Scheduler) -> list[list[tuple[int, int, int]]]:
    steps = []
    while (step := tick(s)) is not None:
        steps.append(lengths(step))
    return steps


def first_start(s: Scheduler, prompt: tuple[int, ...], new: int = 1, **more: object) -> int:
    """Where the computing of a prompt begins."""
    s.add(prompt, SamplingParams(max_new_tokens=new, **more), seed=0, eos=())
    step = s.next()
    assert step is not None
    s.commit(step, {c.sequence: 9 for c in step.chunks if c.sample})
    return step.chunks[-1].start


def test_the_same_beginning_is_computed_once() -> None:
    s = scheduler(caching=True, max_num_batched_tokens=64)
    prompt = tuple(range(100, 130))
    assert first_start(s, prompt) == 0
    assert first_start(s, prompt) == 28  # seven pages of four; the last token is computed for its logits
    assert first_start(s, prompt[:29]) == 28
    assert first_start(s, prompt[:28]) == 24
    assert first_start(s, (*prompt[:11], 5, 6, 7)) == 8
    assert first_start(s, (1, *prompt)) == 0
    assert s.counters.cached_tokens == 28 + 28 + 24 + 8


def test_an_answer_is_part_of_the_beginning() -> None:
    """A conversation goes on: prompt, answer and the next question."""
    s = scheduler(None, 9, caching=True, max_num_batched_tokens=64)
    seq = s.add(tuple(range(100, 110)), SamplingParams(max_new_tokens=30), seed=0, eos=())
    run_out(s)
    assert len(seq.tokens) == 40
    assert first_start(s, (*seq.tokens, 5, 6)) == 36  # the last token of the answer was never computed


def test_a_conversation_rolled_back_past_a_window() -> None:
    """Turns are taken back by more than the window: what a sliding layer sees at that point is found again."""
    s = scheduler(None, 9, caching=True, max_num_batched_tokens=64)
    seq = s.add(tuple(range(100, 110)), SamplingParams(max_new_tokens=40), seed=0, eos=())
    run_out(s)
    assert first_start(s, (*seq.tokens[:17], 5, 6, 7)) == 16
    s = scheduler(9, caching=True, max_num_batched_tokens=64)
    seq = s.add(tuple(range(100, 110)), SamplingParams(max_new_tokens=40), seed=0, eos=())
    run_out(s)
    s.pages.forget(seq.chain.names(seq.tokens, 8))  # what no token at 20 sees is gone: it does no harm
    assert first_start(s, (*seq.tokens[:21], 5)) == 20
    assert first_start(s, (*seq.tokens[:12], 5)) == 0


def test_the_longest_unused_makes_room_and_ends_go_before_beginnings() -> None:
    s = scheduler(caching=True, num_pages=8, max_model_len=33, max_num_batched_tokens=64)
    old, new = tuple(range(100, 113)), tuple(range(200, 213))  # four pages each
    assert first_start(s, old) == 0 and first_start(s, new) == 0
    assert s.pages.num_cached == (6,)
    assert first_start(s, tuple(range(300, 313))) == 0  # two free ones and two of the oldest
    assert first_start(s, new[:12]) == 8
    assert first_start(s, old[:12]) == 4


def test_a_salt_keeps_tenants_apart() -> None:
    s = scheduler(caching=True)
    prompt = tuple(range(100, 110))
    for salt, start in (("a", 0), ("b", 0), ("a", 8), ("", 0), ("b", 8)):
        s.add(prompt, SamplingParams(max_new_tokens=1, cache_salt=salt), seed=0, eos=())
        step = tick(s)
        assert step is not None and step.chunks[0].start == start, salt


def test_scored_prompts_are_computed_whole() -> None:
    s = scheduler(caching=True)
    prompt = tuple(range(100, 110))
    assert [first_start(s, prompt), first_start(s, prompt, prompt_logprobs=0), first_start(s, prompt)] == [0, 0, 8]


def test_pages_of_a_request_that_failed_are_not_found() -> None:
    s = scheduler(caching=True)
    prompt = tuple(range(100, 110))
    s.add(prompt, SamplingParams(max_new_tokens=5), seed=0, eos=())
    tick(s)
    step = s.next()
    assert step is not None
    ((seq, _),) = s.commit(step, {c.sequence: None for c in step.chunks})
    assert seq.finish_reason == "error" and s.pages.num_cached == (0,)
    assert first_start(s, prompt) == 0
    s.pages.check()


def test_who_was_thrown_out_finds_its_pages_again() -> None:
    s = scheduler(caching=True, num_pages=8, size=4, max_model_len=33)
    first, second = (
        add(s, 8, max_new_tokens=16),
        s.add(tuple(range(500, 512)), SamplingParams(max_new_tokens=8), seed=0, eos=()),
    )
    run_out(s)
    assert s.counters.preemptions and s.counters.cached_tokens
    assert (first.num_new, second.num_new) == (16, 8)


def test_it_can_be_switched_off() -> None:
    s = scheduler(caching=False)
    prompt = tuple(range(100, 110))
    assert [first_start(s, prompt), first_start(s, prompt)] == [0, 0]
    assert s.pages.num_cached == (0,)
