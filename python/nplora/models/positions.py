"""The position of each row (token) in its sequence, for packed sequences and for sequences in a cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class PackedPositions:
    """The positions of packed sequences.

    Attributes:
        starts: int64 (sequences + 1,), the start of each sequence; the last entry is the number of rows n.
        in_sequence: int64 (n,), the position of each row in its own sequence.
        longest: the length of the longest sequence.
    """

    starts: Array
    in_sequence: Array
    longest: int

    def sequence_lengths(self) -> Array:
        """int64 (n,): the length of each row's sequence."""
        counts = np.diff(self.starts)
        return np.repeat(counts, counts)


@dataclasses.dataclass(frozen=True, slots=True)
class CachePositions:
    """The positions of new tokens, which continue the sequences in a cache.

    Attributes:
        slots, in_sequence: int64 (m,), the slot of each row, and its position in the slot's sequence.
        lengths: `in_sequence` + 1, the number of tokens that each row attends to.
        cells: the index of the rows in a cache array (slots, capacity, ...) of keys or values.
        longest: the length of the longest sequence, including the new tokens.
        limits: int64 (m,), the length that each row's sequence may reach. LongRoPE rotates all tokens of the
            sequence, even the first, by the factors for this length.
    """

    slots: Array
    in_sequence: Array
    lengths: Array
    cells: tuple[Any, Any]
    longest: int
    limits: Array

    def sequence_lengths(self) -> Array:
        """int64 (m,): the length of each row's sequence, which decides between LongRoPE's factors."""
        return self.limits


def packed_positions(starts: Array) -> PackedPositions:
    """The positions of sequences that begin at `starts`."""
    counts = np.diff(starts)
    in_sequence = np.arange(starts[-1]) - np.repeat(starts[:-1], counts)
    return PackedPositions(starts, in_sequence, int(counts.max(initial=0)))


def cache_positions(slots: Array, lengths: Array, limits: Array, count: int) -> CachePositions:
    """The positions of the next `count` tokens of the sequences in `slots`.

    Args:
        lengths, limits: the number of tokens of each of these sequences, and the maximum number.
    """
    in_sequence = (lengths[:, None] + np.arange(count)).reshape(-1)
    rows = np.repeat(slots, count)
    cells: tuple[Any, Any] = (rows, in_sequence)
    if len(slots) == 1:  # consecutive cells, which NumPy indexes faster with a slice
        cells = int(slots[0]), slice(int(in_sequence[0]), int(in_sequence[-1]) + 1)
    longest = int(in_sequence.max(initial=-1)) + 1
    return CachePositions(rows, in_sequence, in_sequence + 1, cells, longest, np.repeat(limits, count))
