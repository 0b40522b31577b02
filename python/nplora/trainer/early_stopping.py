"""EarlyStopping: ends a run whose validation loss no longer falls, and keeps the best factors."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.nn.module import Module
from nplora.trainer.fingerprint import factors, set_factors
from nplora.trainer.history import EvaluationRecord

Array = npt.NDArray[Any]


class EarlyStopping:
    """Keeps the factors with the lowest validation loss, and counts the evaluations after the best one.

    Args:
        patience: the run ends after this number of evaluations in a row without a new lowest validation loss.
            None: there is no early stopping.
        keeps_factors: whether to keep the best factors, which are the factors at the lowest validation loss.
    Attributes:
        best: the evaluation with the lowest validation loss, as a dictionary with the keys "loss", "epoch",
            "step" and "since". "since" is the number of evaluations after the best one. "loss" is None until
            an evaluation has a finite loss. `best` itself is None before the first evaluation.
        copies: copies of the best factors. The copies are made only when the model's factors are about to
            change. While the model itself has the best factors, the copies are out of date.
    """

    def __init__(self, model: Module, patience: int | None, keeps_factors: bool) -> None:
        self._model, self._patience, self._keeps_factors = model, patience, keeps_factors
        self.best: dict[str, Any] | None = None
        self.copies: dict[str, Array] = {}
        self._is_in_model = False  # whether the model's present factors are the best ones

    def judge(self, record: EvaluationRecord) -> None:
        """Compare the validation loss of an evaluation with the lowest loss so far.

        A loss that is NaN or infinite never counts as a new lowest loss.
        """
        best, loss = self.best or {"loss": None, "epoch": 0, "step": 0, "since": 0}, record.val_loss
        if math.isfinite(loss) and (best["loss"] is None or loss < best["loss"]):
            self.best = {"loss": loss, "epoch": record.epoch, "step": record.step, "since": 0}
            self._is_in_model = self._keeps_factors
        else:
            self.best = {**best, "since": best["since"] + 1}

    def continue_from(self, best: dict[str, Any] | None, best_factors: Mapping[str, Array]) -> None:
        """Restore the best evaluation and its factors from a checkpoint.

        If `keeps_factors` is set, but the checkpoint has no best factors, discard the best evaluation.
        """
        if best is not None and best["loss"] is not None and self._keeps_factors and not best_factors:
            best = None
        self.best, self._is_in_model = best, False
        if best is None:
            self.copies = {}
        elif self._keeps_factors:
            self._copy(best_factors)

    def before_other_factors(self) -> None:
        """Copy the model's factors if they are the best factors so far.

        Call this method before the model's factors change.
        """
        if self._is_in_model:
            self._copy(factors(self._model))

    def _copy(self, values: Mapping[str, Array]) -> None:
        for name, value in values.items():
            if name in self.copies:
                np.copyto(self.copies[name], value)
            else:
                self.copies[name] = value.copy()
        self._is_in_model = False

    @property
    def best_factors(self) -> dict[str, Array]:
        """The factors of the best evaluation; empty if the best factors are not kept."""
        return factors(self._model) if self._is_in_model else self.copies

    @property
    def is_over(self) -> bool:
        """Whether the lowest validation loss has not changed in the last `patience` evaluations."""
        return self._patience is not None and self.best is not None and self.best["since"] >= self._patience

    @property
    def kept(self) -> dict[str, Any] | None:
        """The best evaluation (`best`), or None if its factors are not known."""
        return self.best if self.best and self.best["loss"] is not None and self.best_factors else None

    def restore_best(self) -> dict[str, Any] | None:
        """Set the model's factors to the best factors and return `best`.

        If no best factors are known, change nothing and return None.
        """
        if self.kept is not None and not self._is_in_model:
            set_factors(self._model, self.copies)
        return self.kept
