"""What a run leaves behind: a record of every step and of every epoch."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One update of the parameters.

    Attributes:
        step: the number of updates made, this one included.
        epoch: counts from 1.
        loss: the mean over the step's batches, weighted by `count`, before the update.
        count: what the mean runs over: examples, tokens or elements, as the loss has it.
        lr: the learning rate.
        grad_norm: the Euclidean norm of all gradients together, before clipping.
        seconds: the step took.
    """

    step: int
    epoch: int
    loss: float
    count: int
    lr: float
    grad_norm: float
    seconds: float


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One pass over the data, or the part of it after which the run ended.

    Attributes:
        epoch: counts from 1.
        step: the number of updates made by its end.
        loss: the mean of its steps' losses, weighted by their counts.
        val_loss, val_accuracy: of the validation data at its end; None without such data or class labels.
        seconds: its steps took.
    """

    epoch: int
    step: int
    loss: float
    val_loss: float | None
    val_accuracy: float | None
    seconds: float


@dataclass
class History:
    """The records of a run, those before it was resumed included.

    Attributes:
        steps, epochs: the records, in order.
        ended: why the run ended: "complete", "patience" (early stopping), "callback" or "interrupted".
        best_epoch: the epoch whose adapter was restored by early stopping, else None.
    """

    steps: list[StepRecord] = field(default_factory=list)
    epochs: list[EpochRecord] = field(default_factory=list)
    ended: str = "complete"
    best_epoch: int | None = None

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the run."""
        return self.ended == "interrupted"

    @property
    def loss(self) -> list[float]:
        """The loss of every step."""
        return [record.loss for record in self.steps]

    @property
    def val_loss(self) -> list[float | None]:
        """The validation loss of every epoch."""
        return [record.val_loss for record in self.epochs]

    @property
    def seconds(self) -> float:
        """The time that all steps took together."""
        return sum(record.seconds for record in self.steps)

    def epoch_record(self, epoch: int, validation: Mapping[str, float]) -> EpochRecord:
        """The record of an epoch (from 1) from those of its steps and the validation's metrics."""
        steps = [record for record in _last(self.steps, epoch) if record.count]
        return EpochRecord(
            epoch=epoch,
            step=self.steps[-1].step if self.steps else 0,
            loss=sum(r.loss * r.count for r in steps) / max(1, sum(r.count for r in steps)),
            val_loss=validation.get("loss"),
            val_accuracy=validation.get("accuracy"),
            seconds=sum(r.seconds for r in steps),
        )

    def __repr__(self) -> str:
        last = f", last loss {self.steps[-1].loss:.4g}" if self.steps else ""
        return f"History({len(self.steps)} steps, {len(self.epochs)} epochs, ended={self.ended!r}{last})"

    # ---- as a checkpoint keeps it ----

    def step_columns(self) -> dict[str, Array]:
        """Every field of the step records as an array."""
        kinds = {f.name: np.int64 if f.type is int else np.float64 for f in dataclasses.fields(StepRecord)}
        return {name: np.array([getattr(r, name) for r in self.steps], kind) for name, kind in kinds.items()}

    def epoch_rows(self) -> list[dict[str, Any]]:
        """Every epoch record as a dictionary for JSON, which has no NaN."""
        return [
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            for row in map(dataclasses.asdict, self.epochs)
        ]

    def restore(self, columns: Mapping[str, Array], epochs: list[dict[str, Any]]) -> None:
        """Take over what `step_columns` and `epoch_rows` gave.

        Raises:
            ValueError, TypeError: they are not of that form.
        """
        names = [f.name for f in dataclasses.fields(StepRecord)]
        if columns.keys() != set(names):
            raise ValueError(f"the history has the columns {sorted(columns)}, expected {sorted(names)}")
        rows = zip(*(columns[name].tolist() for name in names), strict=True)
        steps = [StepRecord(*row) for row in rows]
        self.steps[:], self.epochs[:] = steps, [EpochRecord(**row) for row in epochs]


def _last(steps: list[StepRecord], epoch: int) -> list[StepRecord]:
    """The records of an epoch, which is the last one that has any."""
    start = len(steps)
    while start and steps[start - 1].epoch == epoch:
        start -= 1
    return steps[start:]
