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
from nplora.formats.strict_json import json_values

Array = npt.NDArray[Any]

# A checkpoint has up to this many records of each kind, so these records survive if the log is lost.
KEPT = 64


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One update of the parameters.

        >>> import nplora, numpy as np
        >>> trainer = nplora.Trainer(nplora.LoRALinear(np.eye(4), rank=1, rng=0), loss="mse")
        >>> record = trainer.fit(np.eye(4), np.ones((4, 4)), steps=3).steps[0]
        >>> record.step, record.loss, record.count      # the loss is a mean over 16 elements
        (1, 0.75, 16)

    Attributes:
        step: the number of this update, counted from 1.
        epoch: the number of the epoch, counted from 1.
        loss: the mean loss over the step's batches, computed before the update. Each batch is weighted by its
            number of examples, tokens or elements.
        count: the number of examples, tokens or elements over which the loss is averaged.
        lr: the learning rate.
        grad_norm: the Euclidean norm of all gradients, before clipping.
        seconds: the time that the step took.
        metrics: a dictionary of other quantities that the loss function measured; empty if there are none.
    """

    step: int
    epoch: int
    loss: float
    count: int
    lr: float
    grad_norm: float
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """This record as a dictionary, for a line of the log.

        >>> StepRecord(step=1, epoch=1, loss=0.5, count=4, lr=0.1, grad_norm=1.0, seconds=0.25).row()["loss"]
        0.5
        """
        return _row(self)


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """One evaluation of the validation data, after some steps or at the end of an epoch.

        >>> import nplora, numpy as np
        >>> x, labels = np.eye(3), np.array([0, 1, 2])
        >>> trainer = nplora.Trainer(nplora.LoRALinear(np.eye(3), rank=1, rng=0))
        >>> history = trainer.fit(x, labels, steps=5, validation=(x, labels), eval_every=2)
        >>> [record.step for record in history.evaluations]      # each step is an epoch here
        [1, 2, 3, 4, 5]

    Attributes:
        step: the number of updates before the evaluation.
        epoch: the number of the epoch, counted from 1.
        val_loss, val_accuracy: the loss and accuracy on the validation data. Without class labels,
            `val_accuracy` is None.
        seconds: the time that the evaluation took.
        val_metrics: a dictionary of other quantities that the loss function measured on the validation data.
    """

    step: int
    epoch: int
    val_loss: float
    val_accuracy: float | None
    seconds: float
    val_metrics: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """This record as a dictionary, for a line of the log."""
        return _row(self)


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One epoch (a pass over the data), or its first steps if the run ended within the epoch.

        >>> import nplora, numpy as np
        >>> x, labels = np.eye(3), np.array([0, 1, 2])
        >>> trainer = nplora.Trainer(nplora.LoRALinear(np.eye(3), rank=1, rng=0))
        >>> record = trainer.fit(x, labels, epochs=2, validation=(x, labels)).epochs[-1]
        >>> record.epoch, record.step, record.val_accuracy
        (2, 2, 1.0)

    Attributes:
        epoch: the number of the epoch, counted from 1.
        step: the number of updates by the end of the epoch.
        loss: the mean loss of the epoch's steps. Each step is weighted by its `count`.
        val_loss, val_accuracy: the loss and accuracy on the validation data at the end of the epoch; None
            without validation data. Without class labels, `val_accuracy` is None too.
        seconds: the time that the epoch's steps took.
        metrics: the means of the steps' metrics, weighted as in `mean_metrics`.
        val_metrics: other quantities that the loss function measured on the validation data.
    """

    epoch: int
    step: int
    loss: float
    val_loss: float | None
    val_accuracy: float | None
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    val_metrics: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """This record as a dictionary, for a line of the log."""
        return _row(self)


def _row(record: "Record") -> dict[str, Any]:
    """A record as a dictionary. Empty dictionaries of metrics are left out."""
    return {name: value for name, value in dataclasses.asdict(record).items() if value != {}}


R = TypeVar("R", EpochRecord, EvaluationRecord)
Record: TypeAlias = StepRecord | EvaluationRecord | EpochRecord

COUNT = "count/"  # the metric "count/NAME" is the number of values in the mean NAME
EVALUATION = "evaluation"  # the event of an evaluation in the log

_KINDS: dict[str, type[StepRecord] | type[EvaluationRecord] | type[EpochRecord]] = {
    "step": StepRecord, EVALUATION: EvaluationRecord, "epoch": EpochRecord,
}  # fmt: skip
_METRIC_FIELDS: dict[type, tuple[str, ...]] = {
    StepRecord: ("metrics",),
    EvaluationRecord: ("val_metrics",),
    EpochRecord: ("metrics", "val_metrics"),
}
_METRIC = "metrics."  # the prefix of the metrics' columns in a checkpoint


@dataclass
class History:
    """All records of a run, including the records from before the run was resumed.

        >>> import nplora, numpy as np
        >>> trainer = nplora.Trainer(nplora.LoRALinear(np.eye(4), rank=1, rng=0), loss="mse")
        >>> history = trainer.fit(np.eye(4), np.ones((4, 4)), epochs=3, batch_size=2)
        >>> history
        History(6 steps, 3 epochs, ended='complete', loss 0.75 -> 0.7323)
        >>> [record.epoch for record in history.epochs]
        [1, 2, 3]

    Attributes:
        steps, evaluations, epochs: the records of all steps, evaluations and epochs, in order.
        ended: why the run ended: "complete", "patience" (early stopping), "callback" or "interrupted".
        best_step, best_epoch, best_loss: the step, the epoch (counted from 1) and the validation loss of the
            best evaluation, if the model has the factors of this evaluation after the run. If the model has
            the factors of the last step instead, all three are None.
        kept_step: the step of the best evaluation so far, if Ctrl-C ended the run and the factors of this
            evaluation are kept for a resumed run. Otherwise None.
    """

    steps: list[StepRecord] = field(default_factory=list)
    epochs: list[EpochRecord] = field(default_factory=list)
    ended: str = "complete"
    best_epoch: int | None = None
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    best_step: int | None = None
    best_loss: float | None = None
    kept_step: int | None = None

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
        """The time in seconds that all steps took together."""
        return sum(record.seconds for record in self.steps)

    def epoch_record(self, epoch: int, evaluation: EvaluationRecord | None) -> EpochRecord:
        """Make the record of an epoch (counted from 1) from its step records and its last evaluation."""
        steps = [record for record in _last(self.steps, epoch) if record.count]
        return EpochRecord(
            epoch=epoch,
            step=self.steps[-1].step if self.steps else 0,
            loss=sum(r.loss * r.count for r in steps) / max(1, sum(r.count for r in steps)),
            val_loss=None if evaluation is None else evaluation.val_loss,
            val_accuracy=None if evaluation is None else evaluation.val_accuracy,
            seconds=sum(r.seconds for r in steps),
            metrics=mean_metrics(steps),
            val_metrics={} if evaluation is None else dict(evaluation.val_metrics),
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
        """The last `KEPT` step records, as one array for each field. Only the log has all records."""
        last = self.steps[-KEPT:]
        columns = {
            f.name: np.array([getattr(r, f.name) for r in last], np.int64 if f.type is int else np.float64)
            for f in _plain_fields(StepRecord)
        }
        names = dict.fromkeys(name for record in last for name in record.metrics)
        return columns | {
            f"{_METRIC}{name}": np.array([r.metrics.get(name, math.nan) for r in last]) for name in names
        }

    def epoch_rows(self) -> list[dict[str, Any]]:
        """The last `KEPT` epoch records as dictionaries for JSON. NaN and infinity become None."""
        return [json_values(record.row()) for record in self.epochs[-KEPT:]]

    def evaluation_rows(self) -> list[dict[str, Any]]:
        """The last `KEPT` evaluation records as dictionaries for JSON. NaN and infinity become None."""
        return [json_values(record.row()) for record in self.evaluations[-KEPT:]]

    def restore(
        self, columns: Mapping[str, Array], epochs: list[dict[str, Any]], evaluations: list[dict[str, Any]]
    ) -> None:
        """Restore the records that `step_columns`, `epoch_rows` and `evaluation_rows` returned.

        Raises:
            ValueError, TypeError: one of the arguments does not have the expected form.
        """
        names = [f.name for f in _plain_fields(StepRecord)]
        metrics = [name for name in columns if name.startswith(_METRIC)]
        if columns.keys() - set(metrics) != set(names):
            raise ValueError(f"the history has the columns {sorted(columns)}, expected {sorted(names)}")
        rows = zip(*(columns[name].tolist() for name in [*names, *metrics]), strict=True)
        steps = list[StepRecord]()
        for row in rows:
            values: dict[str, Any] = dict(zip(names, row, strict=False))
            steps.append(StepRecord(**values, metrics=_measured(metrics, row[len(names) :])))
        restored = [_restored(EpochRecord, row) for row in epochs]
        self.evaluations[:] = [_restored(EvaluationRecord, row) for row in evaluations]
        self.steps[:], self.epochs[:] = steps, _validated(restored, self.evaluations)

    def add_log(self, log: bytes, step: int, epoch: int) -> None:
        """Add the records of a log up to the given step and epoch; skip lines that are not records.

        Records that the history already has are not replaced, because they come from a checkpoint, and a
        checksum protects a checkpoint. An evaluation in the log is added only if it is older than all
        evaluations of the checkpoint. The log of an earlier version of nplora has no evaluation records, so
        the evaluation records are made from the log's epoch records.
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
        known = [*(evaluations[number] for number in sorted(evaluations)), *self.evaluations]
        self.evaluations[:] = [record for record in known if 0 < record.step <= step]
        self.epochs[:] = _validated(self.epochs, self.evaluations)


def last_logged(log: bytes, event: str) -> dict[str, Any]:
    """The last log line whose "event" is `event`, as a dict; an empty dict if there is none."""
    for line in reversed(log.splitlines()):
        try:
            row = json.loads(line)
            if row["event"] == event:
                return dict(row)
        except (ValueError, TypeError, LookupError, RecursionError):
            continue
    return {}


def last_of_each_event(log: bytes) -> dict[str, dict[str, Any]]:
    """A dict from the name of each event in a log to the last line with this event."""
    found: dict[str, dict[str, Any]] = {}
    for line in log.splitlines():
        try:
            row = json.loads(line)
            found[row["event"]] = dict(row)
        except (ValueError, TypeError, LookupError, RecursionError):
            continue
    return found


def _validated(epochs: Sequence[EpochRecord], evaluations: Sequence[EvaluationRecord]) -> list[EpochRecord]:
    """The epochs of a log or a checkpoint, with NaN for each validation loss that was not finite.

    In JSON, null stands for a loss that was not finite, and also for the missing loss of an epoch without
    validation data. An epoch has a validation loss only if there is an evaluation at the end of the epoch.
    """
    ends = {(record.epoch, record.step): record.val_loss for record in evaluations}
    return [
        epoch
        if epoch.val_loss is not None
        else dataclasses.replace(epoch, val_loss=ends.get((epoch.epoch, epoch.step)))
        for epoch in epochs
    ]


def _of_epoch(epoch: EpochRecord, loss: float) -> EvaluationRecord:
    return EvaluationRecord(epoch.step, epoch.epoch, loss, epoch.val_accuracy, 0.0, epoch.val_metrics)


def _logged(line: bytes) -> Record | None:
    """The record in a line of the log; None if the line is not a record."""
    try:
        row = json.loads(line)
        kind = _KINDS[row["event"]]
        values = {f.name: _field(f.type, row[f.name]) for f in _plain_fields(kind)}
        metrics: dict[str, Any] = {name: _metrics(row.get(name, {})) for name in _METRIC_FIELDS[kind]}
    except (ValueError, TypeError, LookupError, RecursionError, AttributeError):
        return None
    return kind(**values, **metrics)


def _restored(kind: type[R], row: dict[str, Any]) -> R:
    """Make a record from a row that `epoch_rows` or `evaluation_rows` has returned."""
    kind(**row)  # raises TypeError if the row has other fields
    what = "epoch" if kind is EpochRecord else "evaluation"
    values = dict[str, Any]()
    for f in _plain_fields(kind):
        try:
            values[f.name] = _field(f.type, row[f.name])
        except TypeError:
            raise TypeError(f"{f.name} of an {what} is {brief(row[f.name])}, expected a number") from None
    try:
        values |= {name: _metrics(row.get(name, {})) for name in _METRIC_FIELDS[kind]}
    except (TypeError, AttributeError):
        raise TypeError(f"the metrics of an {what} are not a dictionary of numbers") from None
    return kind(**values)


def _field(kind: Any, value: Any) -> Any:
    """Check and return a number in a record of the log.

    In the log, null stands for a number that is not finite. Null becomes NaN, or None if the field may be
    None.
    """
    if value is None and kind is not int:
        return math.nan if kind is float else None
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise TypeError
    return value if kind is int else float(value)


def _plain_fields(kind: type[Record]) -> list[dataclasses.Field[Any]]:
    """The fields of a record class that hold numbers: all fields except the metrics."""
    return [f for f in dataclasses.fields(kind) if f.name not in _METRIC_FIELDS[kind]]


def _metrics(row: dict[str, Any]) -> dict[str, float]:
    """Check and return metrics. Raise TypeError or AttributeError if `row` does not map names to numbers."""
    return {str(name): _field(float, value) for name, value in row.items()}


def _measured(columns: list[str], values: Sequence[float]) -> dict[str, float]:
    """The metrics of one step, by name. `columns` are names of columns in a checkpoint. NaN is left out."""
    return {
        name.removeprefix(_METRIC): value
        for name, value in zip(columns, values, strict=True)
        if not math.isnan(value)
    }


def mean_metrics(steps: Sequence[StepRecord]) -> dict[str, float]:
    """The means of the steps' metrics.

    A step's metric NAME is itself a mean of several values. The weight of the step is the number of these
    values: the step's metric "count/NAME", or the step's `count` if there is no such metric. Metrics named
    "count/NAME" are not averaged, but added up.
    """
    means = dict[str, float]()
    for name in dict.fromkeys(name for record in steps for name in record.metrics):
        having = [record for record in steps if name in record.metrics]
        if name.startswith(COUNT):
            means[name] = sum(record.metrics[name] for record in having)
            continue
        counts = [record.metrics.get(COUNT + name, record.count) for record in having]
        total = sum(record.metrics[name] * count for record, count in zip(having, counts, strict=True))
        means[name] = total / max(1, sum(counts))
    return with_margin(means)


def with_margin(means: dict[str, float]) -> dict[str, float]:
    """If `means` has the mean rewards of chosen and rejected answers, add their difference (the margin)."""
    if {"rewards/chosen", "rewards/rejected"} <= means.keys():
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return means


def _last(steps: list[StepRecord], epoch: int) -> list[StepRecord]:
    """The records of the steps in the epoch `epoch`, which must be the last epoch in `steps`."""
    start = len(steps)
    while start and steps[start - 1].epoch == epoch:
        start -= 1
    return steps[start:]
