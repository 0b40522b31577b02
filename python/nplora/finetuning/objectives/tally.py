"""Tally: the means of several quantities over the batches of a step or of an evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.trainer.history import COUNT, with_margin

# A name, the sum of values, their number, and whether `take` also returns that number.
Addition = tuple[str, float, int, bool]


class Tally:
    """Adds up the values of several named quantities."""

    def __init__(self) -> None:
        self._additions: list[Addition] = []

    def add(self, name: str, values: npt.NDArray[Any], counted: bool = False) -> None:
        """Add values.

        Args:
            counted: whether `take` also returns the number of values. This is necessary if the loss of a
                step may be a mean over more or fewer items than there are values.
        """
        self._additions.append((name, float(np.sum(values)), np.size(values), counted))

    def add_all(self, additions: list[Addition]) -> None:
        """Add the result of a call of `take_additions`, which may come from another process."""
        self._additions += additions

    def take_additions(self) -> list[Addition]:
        """Return all additions since the last call, in their order. If all ranks add up the additions of all
        ranks in the same order, the sums have the same bits on all ranks."""
        taken, self._additions = self._additions, []
        return taken

    def take(self) -> dict[str, float]:
        """Return a dict: the mean of each quantity whose values were added since the last call."""
        sums, counts, counted = dict[str, float](), dict[str, int](), set[str]()
        for name, value, count, is_counted in self.take_additions():
            sums[name] = sums.get(name, 0.0) + value
            counts[name] = counts.get(name, 0) + count
            counted |= {name} if is_counted else set()
        means = {name: total / counts[name] for name, total in sums.items() if counts[name]}
        return with_margin(means) | {
            f"{COUNT}{name}": float(counts[name]) for name in means if name in counted
        }
