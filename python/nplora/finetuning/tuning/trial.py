"""Trial: one short run of a search, and its result."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nplora.finetuning.tuning.space import Settings


@dataclass(frozen=True)
class Trial:
    """One run of a search.

    Attributes:
        number: the number of the trial, counted from 1.
        rung: the rung that the trial belongs to, from 1.
        settings: the options that the trial tries.
        steps: the number of steps.
        epochs: the number of epochs; None if the run ends within an epoch.
        loss: the validation loss after the trial; infinite if this loss, or a loss during the training, was
            not finite.
        seconds: the time of the training.
        evaluation: the time of the evaluation.

    >>> trial = nplora.finetuning.Trial(1, 1, {"lr": 2e-3}, steps=40, epochs=None, loss=3.7, seconds=12.0)
    >>> trial.settings["lr"], trial.loss
    (0.002, 3.7)
    """

    number: int
    rung: int
    settings: Settings
    steps: int
    epochs: int | None
    loss: float
    seconds: float
    evaluation: float = 0.0

    @property
    def key(self) -> tuple[Any, ...]:
        """A tuple of the settings and the number of steps. Trials with the same key have the same result."""
        return key_of(self.settings, self.steps)

    def to_json(self) -> dict[str, Any]:
        loss = self.loss if math.isfinite(self.loss) else None
        return {
            "event": "trial", "number": self.number, "rung": self.rung, "steps": self.steps,
            "epochs": self.epochs, "loss": loss, "seconds": self.seconds, "evaluation": self.evaluation,
            "settings": {name: _plain(value) for name, value in self.settings.items()},
        }  # fmt: skip


def key_of(settings: Settings, steps: int) -> tuple[Any, ...]:
    """The `Trial.key` of a trial with these settings and this number of steps."""
    return steps, *sorted((name, str(_plain(value))) for name, value in settings.items())


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def settings_of(values: dict[str, Any]) -> Settings:
    """Convert settings from JSON values, in which tuples are lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
