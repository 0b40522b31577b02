"""Rotary position embeddings (Su et al. 2021): the table of angles, and methods for longer contexts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _core
from nplora.formats.errors import FormatError
from nplora.models.positions import CachePositions, PackedPositions

Array = npt.NDArray[Any]

_FIRST_ROWS = 256  # rows of a new table; the table doubles when positions need more rows


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling of rotation frequencies.

    Low frequencies are divided by `factor`, high frequencies stay the same. Between low and high frequencies,
    the divisor changes gradually.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def factors(self, frequencies: Array) -> Array:
        """The divisor of each frequency."""
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        ramp = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        smooth = np.clip(ramp, 0, 1)
        return np.asarray(1 / ((1 - smooth) / self.factor + smooth))


@dataclasses.dataclass(frozen=True, eq=False)
class LongRope:
    """LongRoPE (Ding et al. 2024): sequences longer than the original context get other frequency divisors.

    Attributes:
        original_length: the length of the longest sequence that uses the divisors `short`.
        short: for short sequences, an array with a frequency divisor for each rotated pair.
        long: for long sequences, an array with a frequency divisor for each rotated pair.
        attention_factor: a factor for the rotated values of q and k.
    """

    original_length: int
    short: Array
    long: Array
    attention_factor: float


@dataclasses.dataclass(frozen=True, eq=False)
class RopeConfig:
    """The speed at which each pair of values of a head rotates.

    Attributes:
        theta: the base of the angles. If `dim` values of a head are rotated, the speed of pair i is
            theta^(-2 i / dim) radians per token, divided by the divisors in the fields below.
        linear_factor: one divisor for all pairs ("linear" scaling).
        llama3: Llama 3.1's scaling, from config.json.
        factors: one divisor per pair, from GGUF's tensor rope_freqs.weight.
        long: LongRoPE's divisors.
    """

    theta: float
    linear_factor: float = 1.0
    llama3: Llama3Scaling | None = None
    factors: Array | None = None
    long: LongRope | None = None

    def frequencies(self, dim: int) -> Array:
        """The speed of each pair in radians per token, float64 (dim / 2,), without LongRoPE's divisors."""
        frequencies = self.theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        if self.llama3 is not None:
            frequencies = frequencies / self.llama3.factors(frequencies)
        if self.factors is not None:
            frequencies = frequencies / self.factors
        return np.asarray(frequencies / self.linear_factor)

    @property
    def longest_short(self) -> float:
        """The maximum length for which LongRoPE uses its short divisors; infinite without LongRoPE."""
        return math.inf if self.long is None else self.long.original_length


class Rope:
    """Rotates the heads of q and k. The angles are proportional to the positions of the tokens.

    Args:
        dim: the number of values that are rotated in each head, beginning with the first value.
        interleaved: as in `ModelConfig`.
    """

    def __init__(self, config: RopeConfig, head_dim: int, dim: int, interleaved: bool) -> None:
        self._head_dim, self._interleaved = head_dim, interleaved
        self._frequencies, self._long = config.frequencies(dim), config.long
        self._tables: tuple[Array, int] = np.empty((0, dim), np.float32), 0

    def rotate(self, x: Array, positions: PackedPositions | CachePositions, inverse: bool = False) -> None:
        """Rotate the heads of x (n, heads · head_dim) in place. If `inverse` is True, negate all angles."""
        rows, (table, first_long) = positions.in_sequence, self._table_for(positions.longest)
        if self._long is not None:
            is_long = positions.sequence_lengths() > self._long.original_length
            rows = rows + np.where(is_long, first_long, 0)
        _core.rope(x, rows, table, self._interleaved, inverse, self._head_dim)

    def _table_for(self, length: int) -> tuple[Array, int]:
        """Return a table of cosines and sines for at least `length` positions, and an index.

        A row has dim / 2 cosines, then dim / 2 sines. With LongRoPE, the rows for short sequences come first,
        and the rows for long sequences begin at the returned index. Without LongRoPE, the index is 0.
        """
        tables = self._tables  # read once, because another thread may replace `_tables`
        if len(tables[0]) - tables[1] < length:
            rows = max(_FIRST_ROWS, 1 << (length - 1).bit_length())
            if self._long is None:
                tables = self._angles(rows, self._frequencies), 0
            else:
                short = min(rows, self._long.original_length)
                parts = ((short, self._long.short), (rows, self._long.long))
                both = [self._angles(count, self._frequencies / factors) for count, factors in parts]
                tables = np.concatenate(both) * np.float32(self._long.attention_factor), short
            self._tables = tables
        return tables

    @staticmethod
    def _angles(rows: int, frequencies: Array) -> Array:
        angles = np.arange(rows, dtype=np.float64)[:, None] * frequencies
        return np.concatenate([np.cos(angles), np.sin(angles)], axis=1, dtype=np.float32)


def require_theta(source: str, theta: float) -> float:
    """Check the base of the rotation and return it."""
    if not 1 <= theta < 1e30:
        raise FormatError(f"{source}: the base of the rotation (rope_theta) is {theta}, expected 1 to 1e30")
    return theta
