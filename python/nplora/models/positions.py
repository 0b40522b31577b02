"""The positions of tokens in their sequences. Sequences are either packed or stored in a cache."""

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
        return np.asarray(np.diff(self.starts)[rows_of(self.starts)])


@dataclasses.dataclass(frozen=True, slots=True)
class CachePositions:
    """The positions of new tokens, which continue the sequences in a cache.

    Attributes:
        slots: int64 (m,), the slot of each row (token).
        in_sequence: int64 (m,), the position of each row in its own sequence.
        lengths: int64 (m,), the number of tokens that each row attends to: `in_sequence` + 1.
        pages: int64 (slots of the cache, pages of a slot), the pages of each slot, as in `KVCache.table`.
        cells: a NumPy index. For an array `keys` (pages, page_tokens, ...) of the cache, keys[cells] are the
            keys of the new tokens.
        longest: the length of the longest sequence, including the new tokens.
        limits: int64 (m,), the maximum length of each row's sequence. This length decides which factors
            LongRoPE uses for all tokens of the sequence.
    """

    slots: Array
    in_sequence: Array
    lengths: Array
    pages: Array
    cells: tuple[Any, Any]
    longest: int
    limits: Array

    def sequence_lengths(self) -> Array:
        """int64 (m,): for each row, the sequence length for which LongRoPE selects its factors."""
        return self.limits


def rows_of(starts: Array) -> Array:
    """intp (n,): for each row of packed sequences, the index of the sequence that the row belongs to."""
    counts = np.diff(starts).astype(np.intp)  # np.repeat refuses wider integers
    return np.repeat(np.arange(len(counts)), counts)


def scattered(y: Array, rows: Array, count: int) -> Array:
    """Return an array (count, d) with row i of y (m, d) at the index rows[i]. All other rows are 0."""
    whole = np.zeros((count, y.shape[1]), y.dtype)
    whole[rows] = y
    return whole


def packed_positions(starts: Array) -> PackedPositions:
    """The positions of sequences that begin at `starts`."""
    starts = np.asarray(starts, np.int64)  # NumPy's default integer has 32 bits on some systems
    in_sequence = np.arange(starts[-1], dtype=np.int64) - starts[rows_of(starts)]
    return PackedPositions(starts, in_sequence, int(np.diff(starts).max(initial=0)))


def cache_positions(
    slots: Array, in_sequence: Array, limits: Array, pages: Array, page_tokens: int
) -> CachePositions:
    """The positions of new tokens in a cache.

    Args:
        slots: int64 (m,), the slot of each token.
        in_sequence: int64 (m,), the position of each token in its sequence.
        limits: int64 (m,), the maximum length of each token's sequence.
        pages: the table of pages, `KVCache.table`. The result contains only the columns that are needed.
        page_tokens: the number of tokens in a page.
    """
    slots, in_sequence = np.asarray(slots, np.int64), np.asarray(in_sequence, np.int64)
    page, cell = np.divmod(in_sequence, page_tokens)
    cells: tuple[Any, Any] = (pages[slots, page], cell)
    if slots[0] == slots[-1] and page[0] == page[-1] and cell[-1] - cell[0] == len(cell) - 1:
        # NumPy indexes consecutive cells faster with a slice.
        cells = int(cells[0][0]), slice(int(cell[0]), int(cell[-1]) + 1)
    longest = int(in_sequence.max()) + 1
    needed = np.ascontiguousarray(pages[:, : -(-longest // page_tokens)])
    return CachePositions(slots, in_sequence, in_sequence + 1, needed, cells, longest, limits)
