"""EarlyStopping: ends a run whose validation loss no longer falls, and keeps the best epoch's factors."""

import math
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from nplora.nn.module import Module
from nplora.trainer.fingerprint import factors, set_factors

Array = npt.NDArray[Any]


class EarlyStopping:
    """Keeps the factors of the epoch with the lowest validation loss, and counts the epochs after it.

    Args:
        patience: the run ends after this number of epochs in a row without a lower validation loss. None:
            there is no early stopping.
    Attributes:
        best: the lowest validation "loss", its "epoch", and "since", the number of epochs after that epoch.
            "loss" is None until an epoch has a finite loss. `best` itself is None before the first epoch.
        best_factors: the factors of the best epoch.
    """

    def __init__(self, model: Module, patience: int | None) -> None:
        self._model, self._patience = model, patience
        self.best: dict[str, Any] | None = None
        self.best_factors: Mapping[str, Array] = {}
        self._before: tuple[dict[str, Any] | None, Mapping[str, Array]] = None, {}

    def judge(self, epoch: int, loss: float | None) -> None:
        """Compare the validation loss of an epoch (counted from 1) with the lowest loss so far.

        A loss that is NaN or infinite never counts as lower.
        """
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
        """Undo the last call of `judge`."""
        self.best, self.best_factors = self._before

    def continue_from(self, best: dict[str, Any] | None, best_factors: Mapping[str, Array]) -> None:
        """Take over the best epoch and its factors from a checkpoint."""
        if self._patience is not None:
            self.best, self.best_factors = best, _copies(best_factors)

    @property
    def is_over(self) -> bool:
        """Whether the last `patience` epochs had no lower validation loss."""
        return self._patience is not None and self.best is not None and self.best["since"] >= self._patience

    def restore_best(self) -> int | None:
        """Set the model's factors to those of the best epoch; return its number, or None if there is none."""
        if self.best is None or self.best["loss"] is None:
            return None
        set_factors(self._model, self.best_factors)
        return int(self.best["epoch"])


def _copies(arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {name: array.copy() for name, array in arrays.items()}
