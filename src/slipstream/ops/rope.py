"""Rotary position embedding (Su et al. 2021) with the halves of a head as pairs, as transformers lays them out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from slipstream.config import RopeConfig


def inverse_frequencies(config: RopeConfig) -> tuple[Tensor, float]:
    """Radians a position for each pair, (dim / 2,) float32, and the factor on cos and sin.

    llama3 is the rule of the Llama 3.1 release; yarn is NTK-by-parts with its temperature (Peng et al. 2023).
    """
    half = torch.arange(0, config.dim, 2, dtype=torch.float32) / config.dim
    freq = 1.0 / (config.theta**half)
    if config.kind == "linear":
        return freq / config.factor, 1.0
    if config.kind == "llama3":
        wavelength = 2 * math.pi / freq
        low = config.original_max_position / config.low_freq_factor
        high = config.original_max_position / config.high_freq_factor
        span = config.high_freq_factor - config.low_freq_factor
        smooth = (config.original_max_position / wavelength - config.low_freq_factor) / span
        mixed = (1 - smooth) * freq / config.factor + smooth * freq
        scaled = torch.where(wavelength > low, freq / config.factor, mixed)
        return torch.where(wavelength < high, freq, scaled), 1.0
    if config.kind == "yarn":
        return _yarn(config, freq)
    return freq, 1.0


def _yarn(config: RopeConfig, freq: Tensor) -> tuple[Tensor, float]:
    def pair_turning(turns: float) -> float:  # which pair makes so many turns within the trained length
        length = config.original_max_position / (turns * 2 * math.pi)
        return config.dim * math.log(length) / (2 * math.log(config.theta))

    low, high = pair_turning(config.beta_fast), pair_turning(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(config.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    mixed = freq / config.factor * ramp + freq * (1 - ramp)

    def temperature(scale: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * scale * math.log(config.factor) + 1.0

    if config.attention_factor is not None:
        return mixed, config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return mixed, temperature(config.mscale) / temperature(config.mscale_all_dim)
    return mixed, temperature(1.0)


@dataclass(eq=False)
class Turns:
    """By how much the tokens of a step are turned. cos and sin are made for those who ask, once for all layers: a kernel may
    make its own.

    Attributes:
        positions: (tokens,) int64.
        frequencies, factor: what `inverse_frequencies` gave, on the device.
        row_by_row: cos and sin are taken of each row alone.
    """

    positions: Tensor
    frequencies: Tensor
    factor: float
    dtype: torch.dtype
    row_by_row: bool = False

    @cached_property
    def cos_sin(self) -> tuple[Tensor, Tensor]:
        parts = self.positions.split(1 if self.row_by_row else len(self.positions))
        cos, sin = zip(*(angles(p, self.frequencies, self.factor, self.dtype) for p in parts), strict=True)
        return torch.cat(cos), torch.cat(sin)


def angles(positions: Tensor, freq: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each (tokens, 1, dim); the first half of sin is negated."""
    turn = positions.float()[:, None] * freq
    cos, sin = turn.cos() * factor, turn.sin() * factor
    return torch.cat((cos, cos), -1)[:, None].to(dtype), torch.cat((-sin, sin), -1)[:, None].to(dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (tokens, heads, head_dim), (tokens, 1, dim)
    dim = cos.shape[-1]
    turned, rest = x[..., :dim], x[..., dim:]
    a, b = turned.chunk(2, -1)
    swapped = torch.cat((b, a), -1)
    return torch.cat((turned * cos + swapped * sin, rest), -1)
