"""Dividing the memory that is left among the cache's groups: pages, and the longest request that they hold. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from slipstream.cache.spec import CacheGroup
from slipstream.config import EngineConfig
from slipstream.errors import CapacityError, ConfigError

CPU_KV_BYTES = 4 << 30


def size_text(count: int | float) -> str:
    """Bytes for a message, in the unit that shows a few digits."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{int(count)} bytes"


def choose_page_size(asked: EngineConfig, groups: Sequence[CacheGroup], why: dict[str, str]) -> int:
    """Tokens a page: small enough that the pages which a window touches hold at most an eighth more than the window."""
    if asked.page_size is not None:
        why["page_size"] = "asked for"
        return asked.page_size
    sliding = {g.window: g for g in groups if g.window is not None}

    def touched(window: int) -> int:
        """Tokens in the pages that a window can touch, wherever it begins in a long row."""
        return sliding[window].max_pages(window + 2 * size, 1, size) * size

    size = 16
    while size > 4 and any(8 * (touched(w) - w) > w for w in sliding):
        size //= 2
    why["page_size"] = "no layer has a window"
    if sliding:
        why["page_size"] = f"a window of {min(sliding)} tokens touches pages of {touched(min(sliding))} at most"
    return size


def divide_pages(
    asked: EngineConfig,
    groups: Sequence[CacheGroup],
    *,
    page_size: int,
    sequences: int,
    chunk: int,
    longest: int,
    dtype_bytes: int,
    free_bytes: int,
    gpu: bool,
    other_bytes: int,
    bytes_per_token: int,
    why: dict[str, str],
) -> tuple[int, tuple[int, ...]]:
    """max_model_len, and the pages of each group. The reasons go into `why`.

    Args:
        sequences: that run together.
        chunk: tokens of one step.
        longest: positions that the model was made for.
        other_bytes: what weights and workspace take.
        bytes_per_token: workspace that grows with the longest request.

    Raises:
        CapacityError: not even one request fits; the message has the numbers.
        ConfigError: a max_model_len beyond the model's positions.
    """
    size = page_size
    page_bytes = [g.bytes_per_token(dtype_bytes) * size for g in groups]

    def need(length: int) -> list[int]:
        """Pages of one sequence."""
        return [g.max_pages(length, chunk, size) for g in groups]

    def cost(pages: Sequence[int]) -> int:
        return sum(n * b for n, b in zip(pages, page_bytes, strict=True))

    if asked.max_model_len is not None and asked.max_model_len > longest:
        raise ConfigError(
            f"max_model_len: {asked.max_model_len} is more than the {longest} positions that the model was made for; ask for "
            "at most that"
        )
    why["max_model_len"] = "asked for" if asked.max_model_len else "max_position_embeddings of the checkpoint"
    longest = asked.max_model_len or longest
    if asked.kv_cache_memory_bytes is not None:
        bytes_per_token = 0  # what was asked for is for keys and values alone

    def one(length: int) -> int:
        """Bytes for a single request of this length."""
        return cost(need(length)) + bytes_per_token * length

    budget = _budget(asked, one(longest), free_bytes, gpu, other_bytes, why)
    if one(longest) > budget:
        if asked.max_model_len is not None:
            raise CapacityError(
                f"one request of max_model_len={longest} tokens needs {size_text(one(longest))} for keys and values, "
                f"but {size_text(budget)} are left for them"
            )
        fits = largest(longest, lambda length: one(length) <= budget)
        if fits < 2:
            raise CapacityError(f"{size_text(budget)} for keys and values hold no two tokens")
        why["max_model_len"] = (
            f"{fits} tokens are what {size_text(budget)} of keys and values hold, not the model's {longest}"
        )
        longest = fits

    budget -= bytes_per_token * longest
    least = need(longest)
    # A step computes at most `chunk` tokens over all sequences, so beside its window only one chunk is held in all.
    most = [
        sequences * (n if g.window is None else g.max_pages(longest, 1, size)) + (0 if g.window is None else n)
        for g, n in zip(groups, least, strict=True)
    ]

    def part(of_million: int) -> list[int]:
        return [max(a, m * of_million // 1_000_000) for a, m in zip(least, most, strict=True)]

    pages = part(largest(1_000_000, lambda k: cost(part(k)) <= budget))
    if cost(pages) + other_bytes > free_bytes:
        raise CapacityError(
            f"{size_text(cost(pages))} of keys and values do not fit beside the {size_text(other_bytes)} of weights and "
            f"workspace: {size_text(free_bytes)} are free"
        )
    if pages == most and asked.kv_cache_memory_bytes is not None:
        why["kv_cache"] = f"{size_text(cost(pages))} are all that max_num_seqs requests can use of what was asked for"
    return longest, tuple(pages)


def _budget(asked: EngineConfig, one: int, free_bytes: int, gpu: bool, other_bytes: int, why: dict[str, str]) -> int:
    """Bytes for keys and values; `one` is what a single longest request takes."""
    if asked.kv_cache_memory_bytes is not None:
        why["kv_cache"] = "asked for"
        return asked.kv_cache_memory_bytes
    # On a CPU other programs live beside us: half of what is free. A GPU is usually ours.
    share = asked.gpu_memory_utilization if gpu else min(asked.gpu_memory_utilization, 0.5)
    budget = int(free_bytes * share) - other_bytes
    if budget <= 0:
        raise CapacityError(
            f"the model does not fit: weights and workspace take {size_text(other_bytes)}, {size_text(-budget)} more than the "
            f"{size_text(free_bytes * share)} that may be used ({share:.0%} of {size_text(free_bytes)} free)"
        )
    if not gpu and budget > max(CPU_KV_BYTES, one):
        why["kv_cache"] = (
            f"{size_text(CPU_KV_BYTES)} on a CPU, or what one request needs; kv_cache_memory_bytes sets it"
        )
        return max(CPU_KV_BYTES, one)
    why["kv_cache"] = f"{share:.0%} of what is free, less weights and workspace"
    return budget


def largest(high: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 0 to `high` that fits; whatever is below one that fits does too."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
