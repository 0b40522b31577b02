"""EarlyStopping: ends a run whose validation loss no longer falls, and keeps its best factors."""

import math
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from nplora.nn.module import Module
from nplora.trainer.fingerprint import factors, set_factors

Array = npt.NDArray[Any]


class EarlyStopping:
    """Keeps the factors of the epoch with the lowest validation loss, and counts the epochs since.

    Args:
        patience: a run ends after this number of epochs in a row without a lower loss. None: nothing is kept
            or counted.
    Attributes:
        best: "loss" and "epoch" of the best epoch, and "since", the epochs after it. The loss is None until
            an epoch had a finite loss. `best` itself is None before the first epoch.
        best_factors: the factors of that epoch.
    """

    def __init__(self, model: Module, patience: int | None) -> None:
        self._model, self._patience = model, patience
        self.best: dict[str, Any] | None = None
        self.best_factors: Mapping[str, Array] = {}
        self._before: tuple[dict[str, Any] | None, Mapping[str, Array]] = None, {}

    def judge(self, epoch: int, loss: float | None) -> None:
        """Record the validation loss of an epoch (from 1). A loss that is not finite is not lower."""
        self._before = self.best, self.best_factors
        if self._patience is None or loss is None:
            return
        best = self.best or {"loss": None, "epoch": 0, "since": 0}
        if math.isfinite(loss) and (best["loss"] is None or loss < best["loss"]):
            self.best = {"loss": loss, "epoch": epoch, "since": 0}
            self.best_factors = _copies(factors(self._model))
        else:
            self.best = {**best, "since": best["since"] + 1}

    def forget_last(self) -> None:
        """Undo the last `judge`."""
        self.best, self.best_factors = self._before

    def continue_from(self, best: dict[str, Any] | None, best_factors: Mapping[str, Array]) -> None:
        """Continue with the best epoch of a checkpoint and its factors."""
        if self._patience is not None:
            self.best, self.best_factors = best, _copies(best_factors)

    @property
    def is_over(self) -> bool:
        """Whether the run has had enough epochs without a lower loss."""
        return self._patience is not None and self.best is not None and self.best["since"] >= self._patience

    def restore_best(self) -> int | None:
        """Give the model the factors of its best epoch; return that epoch, or None if there is none."""
        if self.best is None or self.best["loss"] is None:
            return None
        set_factors(self._model, self.best_factors)
        return int(self.best["epoch"])


def _copies(arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {name: array.copy() for name, array in arrays.items()}
