"""NewRows: values that replace rows of a weight."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class NewRows:
    """Values that replace rows of a weight (d_out, d_in). `Merge` accepts a `NewRows` or a `LoraDelta` as an
    update.

    Attributes:
        ids: the indices of the replaced rows (k,), without duplicates, or None for all rows.
        values: the new rows (k, d_in).
        shape: the shape of the whole weight.
    """

    ids: Array | None
    values: Array
    shape: tuple[int, int]

    is_zero = False  # only a look at the weight could show that no value changes

    @cached_property
    def _sorted(self) -> tuple[Array, Array]:
        assert self.ids is not None
        order = np.argsort(self.ids)
        return self.ids[order], order

    def found(self, ids: Array) -> tuple[Array, Array]:
        """Given the indices `ids` (n,) of rows of the weight, find the replaced rows.

        Return two arrays: for each replaced row, its index in the argument `ids`, and its index in `values`.
        """
        if self.ids is None:
            return np.arange(len(ids)), ids
        known, order = self._sorted
        near = np.minimum(np.searchsorted(known, ids), len(known) - 1)
        places = np.flatnonzero(known[near] == ids)
        return places, order[near[places]]

    def within(self, first: int, stop: int) -> tuple[Array, Array]:
        """Find replaced rows in weight[first:stop]. Return their indices in the slice, and their values."""
        if self.ids is None:
            return np.arange(stop - first), self.values[first:stop]
        ids, order = self._sorted
        part = slice(*np.searchsorted(ids, (first, stop)))
        return ids[part] - first, self.values[order[part]]

    def rows(self, wanted: Array) -> "NewRows":
        """Return the NewRows that replace the same rows in W[wanted], where W is the weight.

        `wanted` must be sorted.
        """
        shape = (len(wanted), self.shape[1])
        if self.ids is None:
            return NewRows(None, self.values[wanted], shape)
        kept = np.isin(self.ids, wanted)
        return NewRows(np.searchsorted(wanted, self.ids[kept]), self.values[kept], shape)

    def apply(self, rows: Array, first: int) -> Array:
        """Replace rows in a copy of `rows`, which are consecutive rows of the weight.

        Args:
            first: the index in the weight of the first row in `rows`.
        """
        merged = rows.copy()
        places, values = self.within(first, first + len(rows))
        merged[places] = values
        return merged

    def delta(self, rows: Array, first: int) -> Array:
        """Return apply(rows, first) - rows, computed in float64. `rows` and `first` are as in `apply`."""
        delta = np.zeros(rows.shape)
        places, values = self.within(first, first + len(rows))
        delta[places] = values.astype(np.float64) - rows[places]
        return delta
