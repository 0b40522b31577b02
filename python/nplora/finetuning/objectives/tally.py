"""Tally: the means of several quantities over the batches of a step or of an evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.trainer.history import COUNT, with_margin


class Tally:
    """Adds up values by name."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._counted: set[str] = set()

    def add(self, name: str, values: npt.NDArray[Any], counted: bool = False) -> None:
        """Add values.

        Args:
            counted: whether `take` also returns their number, because there are not as many as items in the
                loss.
        """
        self._sums[name] = self._sums.get(name, 0.0) + float(np.sum(values))
        self._counts[name] = self._counts.get(name, 0) + np.size(values)
        self._counted |= {name} if counted else set()

    def take(self) -> dict[str, float]:
        """The means since the last call. A name without values is left out."""
        means = {name: total / self._counts[name] for name, total in self._sums.items() if self._counts[name]}
        counts = {f"{COUNT}{name}": float(self._counts[name]) for name in means if name in self._counted}
        self._sums.clear()
        self._counts.clear()
        return with_margin(means) | counts
