"""Tally: the means of several quantities over the batches of a step or of an evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Addition = tuple[str, float, int]  # a name, the sum of values, and their number


class Tally:
    """Adds up values by name."""

    def __init__(self) -> None:
        self._additions: list[Addition] = []

    def add(self, name: str, values: npt.NDArray[Any]) -> None:
        self._additions.append((name, float(np.sum(values)), np.size(values)))

    def add_all(self, additions: list[Addition]) -> None:
        """Add what `take_additions` has returned, here or in another process."""
        self._additions += additions

    def take_additions(self) -> list[Addition]:
        """All additions since the last call, in order, so that their sum has the same bits everywhere."""
        taken, self._additions = self._additions, []
        return taken

    def take(self) -> dict[str, float]:
        """The means since the last call. A name without values is left out."""
        sums, counts = dict[str, float](), dict[str, int]()
        for name, value, count in self.take_additions():
            sums[name] = sums.get(name, 0.0) + value
            counts[name] = counts.get(name, 0) + count
        return {name: total / counts[name] for name, total in sums.items() if counts[name]}
