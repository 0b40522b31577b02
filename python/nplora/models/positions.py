"""The positions of a pass's rows in their sequences: packed in a run, or in the slots of a cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class PackedPositions:
    """Packed sequences.

    Attributes:
        starts: int64 (sequences + 1,), where each begins; the last entry is the number of rows n.
        in_sequence: int64 (n,), the position of each row in its own sequence.
        longest: the length of the longest sequence.
    """

    starts: Array
    in_sequence: Array
    longest: int

    def sequence_lengths(self) -> Array:
        """The length of each row's sequence, (n,)."""
        counts = np.diff(self.starts)
        return np.repeat(counts, counts)


@dataclasses.dataclass(frozen=True, slots=True)
class CachePositions:
    """New tokens of the sequences in a cache.

    Attributes:
        slots, in_sequence: int64 (m,), the sequence of each row and its position there.
        lengths: in_sequence + 1, the tokens that each row sees.
        cells: the index of the rows' keys and values in an array (slots, capacity, ...).
        longest: the length of the longest sequence, with the new tokens.
        limits: int64 (m,), the length that each row's sequence may come to have. By it all of its tokens
            rotate, the first one too.
    """

    slots: Array
    in_sequence: Array
    lengths: Array
    cells: tuple[Any, Any]
    longest: int
    limits: Array

    def sequence_lengths(self) -> Array:
        """The length of each row's sequence, (m,)."""
        return self.limits


def packed_positions(starts: Array) -> PackedPositions:
    """The positions of sequences that begin at `starts`."""
    counts = np.diff(starts)
    in_sequence = np.arange(starts[-1]) - np.repeat(starts[:-1], counts)
    return PackedPositions(starts, in_sequence, int(counts.max(initial=0)))


def cache_positions(slots: Array, lengths: Array, limits: Array, count: int) -> CachePositions:
    """The positions of the next `count` tokens of the sequences in `slots`.

    Args:
        lengths, limits: how many tokens these sequences hold, and may come to hold.
    """
    in_sequence = (lengths[:, None] + np.arange(count)).reshape(-1)
    rows = np.repeat(slots, count)
    cells: tuple[Any, Any] = (rows, in_sequence)
    if len(slots) == 1:  # a run, which NumPy reaches faster
        cells = int(slots[0]), slice(int(in_sequence[0]), int(in_sequence[-1]) + 1)
    longest = int(in_sequence.max(initial=-1)) + 1
    return CachePositions(rows, in_sequence, in_sequence + 1, cells, longest, np.repeat(limits, count))
