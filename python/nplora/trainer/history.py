"""History: the records of all steps, evaluations and epochs of a run."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from nplora.formats.errors import brief, counted

Array = npt.NDArray[Any]

KEPT = 64  # records of each kind in a checkpoint: some history survives the loss of the log


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One update of the parameters.

        >>> import nplora, numpy as np
        >>> trainer = nplora.Trainer(nplora.LoRALinear(np.eye(4), rank=1, rng=0), loss="mse")
        >>> record = trainer.fit(np.eye(4), np.ones((4, 4)), steps=3).steps[0]
        >>> record.step, record.loss, record.count      # the loss is a mean over 16 elements
        (1, 0.75, 16)

    Attributes:
        step: updates made, including this one.
        epoch: the epoch, from 1.
        loss: the mean loss of the step's batches, weighted by `count`, before the update.
        count: the number of examples, tokens or elements over which the loss is averaged.
        lr: the learning rate.
        grad_norm: the Euclidean norm of all gradients together, before clipping.
        seconds: the time that the step took.
    """

    step: int
    epoch: int
    loss: float
    count: int
    lr: float
    grad_norm: float
    seconds: float


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """One evaluation of the validation data: after some steps, or at the end of an epoch.

        >>> import nplora, numpy as np
        >>> x, labels = np.eye(3), np.array([0, 1, 2])
        >>> trainer = nplora.Trainer(nplora.LoRALinear(np.eye(3), rank=1, rng=0))
        >>> history = trainer.fit(x, labels, steps=5, validation=(x, labels), eval_every=2)
        >>> [record.step for record in history.evaluations]      # each step is an epoch here
        [1, 2, 3, 4, 5]

    Attributes:
        step: updates made before it.
        epoch: the epoch, from 1.
        val_loss, val_accuracy: the metrics of the validation data; no accuracy without class labels.
        seconds: the time that it took.
    """

    step: int
    epoch: int
    val_loss: float
    val_accuracy: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One pass over the data, or the part of a pass after which the run ended.

        >>> import nplora, numpy as np
        >>> x, labels = np.eye(3), np.array([0, 1, 2])
        >>> trainer = nplora.Trainer(nplora.LoRALinear(np.eye(3), rank=1, rng=0))
        >>> record = trainer.fit(x, labels, epochs=2, validation=(x, labels)).epochs[-1]
        >>> record.epoch, record.step, record.val_accuracy
        (2, 2, 1.0)

    Attributes:
        epoch: the epoch, from 1.
        step: updates made by its end.
        loss: the mean loss of its steps, weighted by their counts.
        val_loss, val_accuracy: the metrics of the validation data at its end; None without such data, and no
            accuracy without class labels.
        seconds: the time that its steps took.
    """

    epoch: int
    step: int
    loss: float
    val_loss: float | None
    val_accuracy: float | None
    seconds: float


R = TypeVar("R", EpochRecord, EvaluationRecord)
Record: TypeAlias = StepRecord | EvaluationRecord | EpochRecord

EVALUATION = "evaluation"  # the event of an evaluation in the log

_KINDS: dict[str, type[StepRecord] | type[EvaluationRecord] | type[EpochRecord]] = {
    "step": StepRecord, EVALUATION: EvaluationRecord, "epoch": EpochRecord,
}  # fmt: skip


@dataclass
class History:
    """The records of a run, including the records from before it was resumed.

        >>> import nplora, numpy as np
        >>> trainer = nplora.Trainer(nplora.LoRALinear(np.eye(4), rank=1, rng=0), loss="mse")
        >>> history = trainer.fit(np.eye(4), np.ones((4, 4)), epochs=3, batch_size=2)
        >>> history
        History(6 steps, 3 epochs, ended='complete', loss 0.75 -> 0.7323)
        >>> [record.epoch for record in history.epochs]
        [1, 2, 3]

    Attributes:
        steps, evaluations, epochs: the records, in order.
        ended: why the run ended: "complete", "patience" (early stopping), "callback" or "interrupted".
        best_step, best_epoch, best_loss: the evaluation whose factors the model has after the run: its step,
            its epoch (from 1) and its validation loss. None if the model has the factors of the last step.
    """

    steps: list[StepRecord] = field(default_factory=list)
    epochs: list[EpochRecord] = field(default_factory=list)
    ended: str = "complete"
    best_epoch: int | None = None
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    best_step: int | None = None
    best_loss: float | None = None

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

    def epoch_record(self, epoch: int, evaluation: EvaluationRecord | None) -> EpochRecord:
        """The record of an epoch (from 1), made from the records of its steps and its last evaluation."""
        steps = [record for record in _last(self.steps, epoch) if record.count]
        return EpochRecord(
            epoch=epoch,
            step=self.steps[-1].step if self.steps else 0,
            loss=sum(r.loss * r.count for r in steps) / max(1, sum(r.count for r in steps)),
            val_loss=None if evaluation is None else evaluation.val_loss,
            val_accuracy=None if evaluation is None else evaluation.val_accuracy,
            seconds=sum(r.seconds for r in steps),
        )

    def __repr__(self) -> str:
        losses = f", loss {self.steps[0].loss:.4g} -> {self.steps[-1].loss:.4g}" if self.steps else ""
        validated = [record.val_loss for record in self.evaluations]
        if validated:
            losses += f", validation loss {validated[0]:.4g} -> {validated[-1]:.4g}"
        steps, epochs = counted(len(self.steps), "step"), counted(len(self.epochs), "epoch")
        return f"History({steps}, {epochs}, ended={self.ended!r}{losses})"

    # ---- in a checkpoint and in the log ----

    def step_columns(self) -> dict[str, Array]:
        """The last step records, one array for each field. The log has all records."""
        kinds = {f.name: np.int64 if f.type is int else np.float64 for f in dataclasses.fields(StepRecord)}
        last = self.steps[-KEPT:]
        return {name: np.array([getattr(r, name) for r in last], kind) for name, kind in kinds.items()}

    def epoch_rows(self) -> list[dict[str, Any]]:
        """The last epoch records as dictionaries for JSON, with null for NaN and infinities."""
        return _rows(self.epochs[-KEPT:])

    def evaluation_rows(self) -> list[dict[str, Any]]:
        """The last evaluation records, as `epoch_rows` writes those of epochs."""
        return _rows(self.evaluations[-KEPT:])

    def restore(
        self, columns: Mapping[str, Array], epochs: list[dict[str, Any]], evaluations: list[dict[str, Any]]
    ) -> None:
        """Replace the records by those that `step_columns`, `epoch_rows` and `evaluation_rows` returned.

        Raises:
            ValueError, TypeError: the arguments do not have that form.
        """
        names = [f.name for f in dataclasses.fields(StepRecord)]
        if columns.keys() != set(names):
            raise ValueError(f"the history has the columns {sorted(columns)}, expected {sorted(names)}")
        rows = zip(*(columns[name].tolist() for name in names), strict=True)
        steps = [StepRecord(*row) for row in rows]
        restored = [_restored(EpochRecord, row) for row in epochs]
        self.evaluations[:] = [_restored(EvaluationRecord, row) for row in evaluations]
        self.steps[:], self.epochs[:] = steps, restored

    def add_log(self, log: bytes, step: int, epoch: int) -> None:
        """Add the records of the log up to this step and this epoch; skip lines that are not records.

        If `restore` brought the same record, the restored record is kept, because a checksum protects it.
        Only evaluations before the restored ones are added. An older log has none; those at the ends of its
        epochs are added.
        """
        steps, epochs = dict[int, StepRecord](), dict[int, EpochRecord]()
        evaluations = dict[int, EvaluationRecord]()
        for line in log.splitlines():
            record = _logged(line)
            if isinstance(record, StepRecord):
                steps[record.step] = record
            elif isinstance(record, EvaluationRecord):
                evaluations[record.step] = record
            elif record is not None:
                epochs[record.epoch] = record
        steps |= {record.step: record for record in self.steps}
        epochs |= {record.epoch: record for record in self.epochs}
        first = min((record.step for record in self.evaluations), default=step + 1)
        evaluations = {n: record for n, record in evaluations.items() if n < first and self.evaluations}
        self.steps[:] = [steps[number] for number in sorted(steps) if 0 < number <= step]
        self.epochs[:] = [epochs[number] for number in sorted(epochs) if 0 < number <= epoch]
        validated = [(e, e.val_loss) for e in self.epochs if e.val_loss is not None and e.step < first]
        evaluations = {e.step: _of_epoch(e, loss) for e, loss in validated} | evaluations
        self.evaluations[:0] = [evaluations[number] for number in sorted(evaluations)]


def last_logged(log: bytes, event: str) -> dict[str, Any]:
    """The content of the last line of this event in a log; empty if there is none."""
    for line in reversed(log.splitlines()):
        try:
            row = json.loads(line)
            if row["event"] == event:
                return dict(row)
        except (ValueError, TypeError, LookupError, RecursionError):
            continue
    return {}


def _of_epoch(epoch: EpochRecord, loss: float) -> EvaluationRecord:
    return EvaluationRecord(epoch.step, epoch.epoch, loss, epoch.val_accuracy, 0.0)


def _rows(records: Sequence[EpochRecord] | Sequence[EvaluationRecord]) -> list[dict[str, Any]]:
    return [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        for row in map(dataclasses.asdict, records)
    ]


def _logged(line: bytes) -> Record | None:
    """The record in a line of the log; None if the line is not a record."""
    try:
        row = json.loads(line)
        kind = _KINDS[row["event"]]
        values = [_field(f.type, row[f.name]) for f in dataclasses.fields(kind)]
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    return kind(*values)


def _restored(kind: type[R], row: dict[str, Any]) -> R:
    """The record from which `epoch_rows` or `evaluation_rows` made this row."""
    kind(**row)  # refuses other fields
    values = []
    for f in dataclasses.fields(kind):
        try:
            values.append(_field(f.type, row[f.name]))
        except TypeError:
            what = "epoch" if kind is EpochRecord else "evaluation"
            raise TypeError(f"{f.name} of an {what} is {brief(row[f.name])}, expected a number") from None
    return kind(*values)


def _field(kind: Any, value: Any) -> Any:
    """A number of a record from the log, where null stands for a number that was not finite."""
    if value is None and kind is not int:
        return math.nan if kind is float else None
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise TypeError
    return value if kind is int else float(value)


def _last(steps: list[StepRecord], epoch: int) -> list[StepRecord]:
    """The records of an epoch; no later epoch has records."""
    start = len(steps)
    while start and steps[start - 1].epoch == epoch:
        start -= 1
    return steps[start:]
