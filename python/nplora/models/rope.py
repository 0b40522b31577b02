"""Rotary position embeddings (Su et al. 2021): their table, and how contexts are stretched."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _core
from nplora.formats.errors import FormatError

Array = npt.NDArray[Any]

_FIRST_ROWS = 256  # of a table, which then doubles as positions need it


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretch: slow rotations are slowed by `factor`, fast ones kept, a ramp between them."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def factors(self, frequencies: Array) -> Array:
        """What each frequency is divided by."""
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        ramp = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        smooth = np.clip(ramp, 0, 1)
        return np.asarray(1 / ((1 - smooth) / self.factor + smooth))


@dataclasses.dataclass(frozen=True, eq=False)
class RopeConfig:
    """How fast each pair of a head rotates.

    Attributes:
        theta: pair i of a head rotates by theta^(-2 i / head_dim) a token, divided by what follows.
        linear_factor: the same for every pair ("linear" scaling).
        llama3: Llama 3.1's scaling, from config.json.
        factors: one for each pair, from GGUF's tensor rope_freqs.weight.
    """

    theta: float
    linear_factor: float = 1.0
    llama3: Llama3Scaling | None = None
    factors: Array | None = None

    def frequencies(self, head_dim: int) -> Array:
        """Radians a token for each pair, float64 (head_dim / 2,)."""
        frequencies = self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.llama3 is not None:
            frequencies = frequencies / self.llama3.factors(frequencies)
        if self.factors is not None:
            frequencies = frequencies / self.factors
        return np.asarray(frequencies / self.linear_factor)


class Rope:
    """The rotation of q and k by their positions."""

    def __init__(self, config: RopeConfig, head_dim: int, interleaved: bool) -> None:
        self._frequencies = config.frequencies(head_dim)
        self._head_dim, self._interleaved = head_dim, interleaved
        self._table = np.empty((0, head_dim), np.float32)

    def table(self, length: int) -> Array:
        """Row p is head_dim / 2 cosines, then as many sines, for position p; at least `length` rows."""
        if len(self._table) < length:
            rows = max(_FIRST_ROWS, 1 << (length - 1).bit_length())
            angles = np.arange(rows, dtype=np.float64)[:, None] * self._frequencies
            self._table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1, dtype=np.float32)
        return self._table

    def rotate(self, x: Array, positions: Array, table: Array, inverse: bool = False) -> None:
        """Turn the heads of x (n, heads · head_dim) in place; `inverse` turns back, which is the gradient."""
        _core.rope(x, positions, table, self._interleaved, inverse, self._head_dim)


def require_theta(source: str, theta: float) -> float:
    """A base of the rotation that makes sense."""
    if not 1 <= theta < 1e30:
        raise FormatError(f"{source}: the base of the rotation (rope_theta) is {theta}, expected 1 to 1e30")
    return theta
