"""Adds to attention scores a number that depends on the distance of query and key (Raffel et al. 2020)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_FIRST_LENGTH = 128  # the sequence length of the smallest table; larger tables have the next power of two
_MAX_DISTANCE = 128  # all keys that are at least this far away on one side share a bucket


class RelativeBias:
    """For each head and each bucket of distances, a learned number that is added to attention scores.

    Each distance close to 0 has its own bucket. Farther away, more and more distances share a bucket. Keys
    before and after the query have different buckets.

    Args:
        weight: float32 (buckets, heads). The number of buckets is a multiple of 4.
    """

    def __init__(self, weight: Array) -> None:
        self._weight = weight
        self._table = np.empty((weight.shape[1], 1), np.float32)

    def table(self, longest: int) -> Array:
        """Return the numbers for each head and each distance, for sequences of at most `longest` tokens.

        Returns:
            float32 (heads, 2 · reach + 1), where `reach` is at least `longest` - 1. Column reach + d has the
            numbers for a key that is d tokens after the query.
        """
        table = self._table  # read once, because another thread may replace `_table`
        if table.shape[1] < 2 * longest - 1:
            length = max(_FIRST_LENGTH, 1 << (longest - 1).bit_length())
            buckets = _buckets(np.arange(1 - length, length), len(self._weight))
            table = self._table = np.ascontiguousarray(self._weight[buckets].T)
        return table


def _buckets(distances: Array, count: int) -> Array:
    """The bucket of each distance (key position - query position), as in T5 and MPNet."""
    half, exact = count // 2, count // 4
    away = np.abs(distances)
    with np.errstate(divide="ignore"):
        # float32, as in transformers: at the edge of two buckets, rounding decides which one a distance gets
        steps = np.log((away / np.float32(exact)).astype(np.float32)) / np.float32(
            np.log(_MAX_DISTANCE / exact)
        )
        far = exact + np.where(away < exact, 0, steps * (half - exact)).astype(np.int64)
    return np.where(away < exact, away, np.minimum(far, half - 1)) + np.where(distances > 0, half, 0)
