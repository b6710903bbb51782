"""Pages and groups: tables cover exactly what later tokens see, no page is lost, and a window's pages stop growing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.cache.pages import PagePool, Pages
from slipstream.cache.spec import CacheGroup, group_layers
from slipstream.config import ModelConfig

SIZES = {"chunk": st.integers(1, 40), "page_size": st.integers(1, 20), "window": st.none() | st.integers(1, 50)}


def group(window: int | None, layers: int = 1) -> CacheGroup:
    return CacheGroup(window, tuple(range(layers)), num_kv_heads=2, head_dim=16)


@given(length=st.integers(1, 200), **SIZES)
@settings(max_examples=400, deadline=None)
def test_table_covers_exactly_the_live_window(length: int, chunk: int, page_size: int, window: int | None) -> None:
    """Against a plain count: the pages that hold any key which the chunk's tokens write or see."""
    g = group(window)
    bound = g.max_pages(length, chunk, page_size)
    pages = Pages([g], [bound], page_size)
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        assert pages.reserve(7, start, end)
        seen = {k for p in range(start, end) for k in range(0 if window is None else max(0, p - window + 1), p + 1)}
        (table,) = pages.tables(7)
        assert [table.first + i for i in range(len(table.pages))] == sorted({k // page_size for k in seen})
        assert pages.held(7) == (len(table.pages),) and len(table.pages) <= bound
        pages.check()
    pages.free(7)
    assert pages.pools[0].num_free == bound


@given(**{**SIZES, "window": st.integers(1, 50)})
@settings(max_examples=200, deadline=None)
def test_a_windows_pages_stop_growing_at_the_formula(chunk: int, page_size: int, window: int) -> None:
    """ceil((window - 1 + chunk - 1) / page_size) + 1, at every length beyond; and the bound is reached."""
    g = group(window)
    bound = -(-(window + chunk - 2) // page_size) + 1
    far = 4 * (window + chunk + page_size)
    assert g.max_pages(far, chunk, page_size) == g.max_pages(100 * far, chunk, page_size) == bound
    peak = 0
    for shift in range(page_size):  # the last chunk begins at every place in a page
        pages = Pages([g], [bound], page_size)
        steps = [chunk] * (-(-window // chunk) + 1) + [1] * shift + [chunk]
        start = 0
        for count in steps:
            assert pages.reserve(1, start, start + count)
            peak = max(peak, *pages.held(1))
            start += count
    assert peak == bound


def test_the_bound_is_tight() -> None:
    """window 5, chunk 4 in pages of 4: 8 keys, which touch three pages when the first is the last of its page."""
    g = group(5)
    assert g.max_pages(1000, 4, 4) == 3
    pages = Pages([g], [3], 4)
    assert pages.reserve(0, 0, 3) and pages.reserve(0, 3, 7) and pages.reserve(0, 7, 11)
    assert pages.held(0) == (3,)
    assert pages.tables(0)[0].first == 0
    assert pages.reserve(0, 11, 12) and pages.tables(0)[0].first == 1


def test_a_full_group_grows_with_the_length() -> None:
    assert [group(None).max_pages(n, 2048, 16) for n in (1, 16, 17, 4096)] == [1, 1, 2, 256]


def test_a_chunk_longer_than_the_request_does_not_raise_the_bound() -> None:
    assert group(8).max_pages(10, 2048, 4) == 3  # all that ten tokens can touch
    assert group(8).max_pages(1, 1, 4) == 1


def test_first_visible_counts_the_token_itself() -> None:
    assert [group(3).first_visible(p) for p in (0, 1, 2, 3, 10)] == [0, 0, 0, 1, 8]
    assert group(1).first_visible(5) == 5
    assert group(None).first_visible(10**12) == 0


def test_all_groups_or_none() -> None:
    pages = Pages([group(None), group(4)], [10, 1], 4)
    assert pages.reserve(1, 0, 4)
    assert not pages.reserve(2, 0, 4), "the second pool is empty"
    assert pages.held(2) == (0, 0)
    pages.check()
    pages.free(2)
    pages.free(2)  # one that holds nothing is fine
    assert not pages.reserve(1, 4, 8)
    assert pages.held(1) == (1, 1)


def test_reserve_twice_takes_nothing_more() -> None:
    pages = Pages([group(None)], [4], 4)
    assert pages.reserve(1, 0, 9) and pages.reserve(1, 0, 9)
    assert pages.held(1) == (3,)


def test_fits_counts_free_pages_of_every_group() -> None:
    pages = Pages([group(None), group(4)], [10, 3], 4)
    assert pages.fits(40, 4) and not pages.fits(41, 4)
    assert pages.fits(5, 100)
    assert pages.reserve(1, 0, 5)  # two pages of each
    assert pages.fits(4, 4) and not pages.fits(5, 4)


def test_a_lone_sequence_gets_neighbouring_pages() -> None:
    pages = Pages([group(None)], [64], 4)
    pages.reserve(1, 0, 40)
    pages.reserve(2, 0, 40)
    pages.free(1)
    pages.free(2)
    pages.reserve(3, 0, 100)
    assert pages.tables(3)[0].pages == tuple(range(25))


def test_a_page_given_back_twice_is_caught() -> None:
    pool = PagePool(4)
    taken = pool.take(2)
    pool.give(taken)
    with pytest.raises(AssertionError, match="twice"):
        pool.give(taken)


def test_a_lost_page_is_caught() -> None:
    pages = Pages([group(None)], [4], 4)
    pages.reserve(1, 0, 8)
    del pages._tables[1][0].pages[0]
    with pytest.raises(AssertionError, match=r"1 owned \+ 2 free != 4"):
        pages.check()


def test_a_page_with_two_owners_is_caught() -> None:
    pages = Pages([group(None)], [4], 4)
    pages.reserve(1, 0, 4)
    pages.reserve(2, 0, 4)
    pages._tables[2][0].pages[0] = pages._tables[1][0].pages[0]
    with pytest.raises(AssertionError):
        pages.check()


def test_a_free_page_counted_twice_is_caught() -> None:
    pool = PagePool(2)
    pool._free.append(0)
    with pytest.raises(AssertionError):
        pool.check()


RAW = {
    "model_type": "gpt_oss", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 24,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4,
    "num_experts_per_tok": 2, "sliding_window": 128,
}  # fmt: skip


def test_layers_are_grouped_by_window_full_first() -> None:
    groups = group_layers(ModelConfig.from_hf(RAW))
    assert [(g.window, g.layers) for g in groups] == [
        (None, tuple(range(1, 24, 2))),
        (128, tuple(range(0, 24, 2))),
    ]
    assert groups[0].name == "full_attention" and groups[1].name == "sliding_attention(128)"
    assert groups[0].bytes_per_token(2) == 2 * 2 * 16 * 2 * 12  # keys and values, heads, head_dim, bytes, layers


def test_a_stage_of_layers_only() -> None:
    groups = group_layers(ModelConfig.from_hf(RAW), range(6, 9))
    assert [(g.window, g.layers) for g in groups] == [(None, (7,)), (128, (6, 8))]
