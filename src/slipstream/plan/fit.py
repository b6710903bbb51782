"""What a model that does not fit lacks, and which options would make it fit: each is tried with the plan's own numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from slipstream.cache.budget import largest, size_text
from slipstream.config import EngineConfig
from slipstream.errors import CapacityError, ConfigError, KernelError
from slipstream.ops.formats import MADE

USABLE = 2048  # tokens of the request that is to fit where no length was asked for
MOST_SHARE = 97  # hundredths of the free memory: a card's runtime takes some that is in no plan
STEPS = {"max_num_batched_tokens": 256, "max_num_seqs": 8}  # smaller steps are not advised
ANY = 1 << 60  # bytes


@dataclass(frozen=True)
class Fit:
    """How to ask whether something fits.

    Attributes:
        asked: what does not; sizes of steps are never None.
        longest: positions that the model was made for.
        free_bytes: on the device.
        gpu: whether it is one.
        weights: bytes of all weights.
        divide: raises CapacityError where options, bytes of weights and free bytes do not go together.
        repacked: bytes of all weights with another `quantization`; raises where that cannot run.
    """

    asked: EngineConfig
    longest: int
    free_bytes: int
    gpu: bool
    weights: int
    divide: Callable[[EngineConfig, int, int], object]
    repacked: Callable[[str], int]

    def advise(self, error: CapacityError) -> CapacityError:
        """The same error, with how many bytes are missing and which options would do."""
        said = [str(error)]
        lack = self._lack()
        if lack is not None:
            planned = self.asked.max_model_len is None and self.asked.kv_cache_memory_bytes is None
            of_what = f", for one request of {self._usable:,} tokens" if planned else ""
            said.append(f"{size_text(lack)} more of free memory would do{of_what}")
        ways = list(self._ways())
        said.append(f"{'so would' if lack else 'what would do:'} {', or '.join(ways)}" if ways else self._last_resort())
        return CapacityError("; ".join(said))

    @property
    def _usable(self) -> int:
        return self.asked.max_model_len or min(USABLE, self.longest)

    def _fits(self, weights: int | None = None, free: int | None = None, **changes: Any) -> bool:
        """Whether it does as asked, and at the length that makes it worth while."""
        weights = self.weights if weights is None else weights
        asked = replace(self.asked, **changes)
        try:
            for length in {asked.max_model_len, asked.max_model_len or self._usable}:
                self.divide(replace(asked, max_model_len=length), weights, self.free_bytes if free is None else free)
        except CapacityError:
            return False
        return True

    def _lack(self, weights: int | None = None, **changes: Any) -> int | None:
        """Bytes by which what is free falls short; None where no memory would help."""
        if not self._fits(weights, ANY, **changes):
            return None
        if self._fits(weights, **changes):
            return 0
        return 1 + largest(
            ANY - self.free_bytes, lambda more: not self._fits(weights, self.free_bytes + more, **changes)
        )

    def _ways(self) -> Iterator[str]:
        """Options that do, each by itself."""
        asked = self.asked
        for format, size in self._formats():
            if self._fits(size):
                yield self._format_text(format, size)
        for name, least in STEPS.items():
            yield from self._first(name, _halves(getattr(asked, name), least))
        if (given := asked.kv_cache_memory_bytes) is not None:
            powers = [1 << n for n in range(10, 50)]
            nearest = [*(n for n in powers if n > given), *(n for n in reversed(powers) if n < given)]
            yield from self._first("kv_cache_memory_bytes", nearest)
        else:
            more = range(int(asked.gpu_memory_utilization * 100) + 1, (MOST_SHARE if self.gpu else 50) + 1)
            yield from self._first("gpu_memory_utilization", (n / 100 for n in more))
            if not self.gpu:  # of which a share is never more than half
                yield from self._first("kv_cache_memory_bytes", (1 << n for n in range(20, 50)))
        if asked.max_model_len is not None:
            longest = largest(asked.max_model_len, lambda length: self._fits(max_model_len=length))
            if longest > 1:
                yield f"max_model_len={longest}"

    def _first(self, name: str, values: Iterable[Any]) -> Iterator[str]:
        value = next((v for v in values if self._fits(None, None, **{name: v})), None)
        if value is not None:
            yield f"{name}={value}" + (f" ({size_text(value)})" if name.endswith("_bytes") else "")

    def _last_resort(self) -> str:
        """All that makes it smaller, together."""
        small = {name: min(getattr(self.asked, name), least) for name, least in STEPS.items()}
        words = [f"{name}={value}" for name, value in small.items()]
        format, size = min(self._formats(), key=lambda f: f[1], default=(None, self.weights))
        if format is not None:
            words.insert(0, self._format_text(format, size))
        lack, together = self._lack(size, **small), " and ".join(words)
        if lack == 0:
            return f"so would {together}, together"
        missing = "" if lack is None else f" with {together} there are {size_text(lack)} missing still:"
        return f"no option makes it fit:{missing} take a smaller model, or a device with more memory"

    def _formats(self) -> Iterator[tuple[str, int]]:
        """Other formats that can run here and take less, with the bytes of all weights."""
        for format in ("auto", *MADE):
            try:
                size = self.weights if format == self.asked.quantization else self.repacked(format)
            except (ConfigError, KernelError):
                continue
            if size < self.weights:
                yield format, size

    def _format_text(self, format: str, size: int) -> str:
        return f"quantization='{format}' (weights of {size_text(size)}, not {size_text(self.weights)})"


def _halves(value: int, least: int) -> Iterator[int]:
    while value // 2 >= least:
        value //= 2
        yield value
