"""Tally: the means of several quantities over the batches of a step or of an evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


class Tally:
    """Adds up values by name."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, values: npt.NDArray[Any]) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + float(np.sum(values))
        self._counts[name] = self._counts.get(name, 0) + np.size(values)

    def take(self) -> dict[str, float]:
        """The means since the last call. A name without values is left out."""
        means = {name: total / self._counts[name] for name, total in self._sums.items() if self._counts[name]}
        self._sums.clear()
        self._counts.clear()
        return means
