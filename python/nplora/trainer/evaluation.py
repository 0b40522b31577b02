"""Evaluation: the loss and accuracy of a model over batches, and the model's predictions."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.distributed.communicator import Alone, Ranks
from nplora.nn import losses
from nplora.nn.losses import Loss
from nplora.nn.module import Module
from nplora.trainer.batches import Batches
from nplora.trainer.fused import FusedLoss, add_measured, take_measured, take_metrics

Array = npt.NDArray[Any]


def evaluate(
    model: Module, loss: Loss | FusedLoss, batches: Batches, ranks: Ranks | None = None
) -> dict[str, float]:
    """Return the mean loss over all examples, tokens or elements, and further metrics, without dropout.

    For class labels, the result also has the accuracy. For a `MeasuredLoss`, the result also has the metrics
    of the loss. If there are several ranks, each rank evaluates one batch at a time. The sums of the batches
    are added in the order of the batches, so that the result does not depend on the number of ranks.
    """
    ranks = ranks or Alone()
    take_metrics(loss)  # drops the metrics of an unfinished evaluation
    sums, all_measured = _Sums(), []
    rest = iter(batches.epoch(0, 0))
    while group := list(itertools.islice(rest, ranks.size)):
        own = None
        if ranks.rank < len(group):
            own = _evaluated(model, loss, *group[ranks.rank])
        if ranks.size == 1:
            sums.add(own)
            continue
        for each, measured in ranks.gather((own, take_measured(loss)), "an evaluation"):
            sums.add(each)
            all_measured.append(measured)
    for measured in all_measured:
        add_measured(loss, measured)
    return {**sums.means(), **take_metrics(loss)}


@dataclass
class _Sums:
    """Sums over one or more batches: the total loss, and the numbers of items and of labels.

    Attributes:
        count: the number of items over which the loss is averaged.
        right: the number of labels that were predicted correctly.
        labelled: the number of labels that the loss does not ignore.
        has_classes: whether the labels are class indices.
    """

    loss: float = 0.0
    count: int = 0
    right: int = 0
    labelled: int = 0
    has_classes: bool = False

    def add(self, batch: "_Sums | None") -> None:
        if batch is None:
            return
        self.loss += batch.loss
        self.count += batch.count
        self.right += batch.right
        self.labelled += batch.labelled
        self.has_classes |= batch.has_classes

    def means(self) -> dict[str, float]:
        means = {"loss": self.loss / max(1, self.count)}
        if self.has_classes:
            means["accuracy"] = self.right / max(1, self.labelled)
        return means


def _evaluated(model: Module, loss: Loss | FusedLoss, x: Any, y: Any) -> _Sums:
    """Evaluate one batch: return its total loss, and its numbers of items and labels."""
    if isinstance(loss, FusedLoss):
        count = loss.count(x, y)
        with np.errstate(over="ignore", invalid="ignore"):
            return _Sums(loss.evaluate(model, x, y) * count, count)
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow shows in the loss
        prediction = model(x)
        value, _ = losses.call(loss, prediction, y)
    count = loss.count(prediction, y)
    sums = _Sums(value * count, count)
    labels = np.asarray(y)
    if labels.dtype.kind in "iu" and labels.shape == prediction.shape[:-1]:
        known = labels != getattr(loss, "ignore_index", -100)
        sums.has_classes = True
        sums.right = int(np.count_nonzero(prediction.argmax(axis=-1)[known] == labels[known]))
        sums.labelled = int(np.count_nonzero(known))
    return sums


def predict(model: Module, x: npt.ArrayLike, batch_size: int) -> Array:
    """Return model(x), computed for `batch_size` rows of x at a time."""
    rows = np.asarray(x)
    if rows.ndim == 0:
        raise ValueError("Trainer.predict: x is a single number, expected rows")
    check_rows("Trainer.predict", model, rows)
    starts = range(0, max(1, len(rows)), batch_size)
    return np.concatenate([model(rows[start : start + batch_size]) for start in starts])


def check_rows(op: str, model: Module, x: Array) -> None:
    """Refuse a single example if the model expects an array of examples.

    If x has one axis, each number in x (such as a token id) counts as one example. To find out whether the
    model accepts a single number as an example, this function calls the model with the first number.

    Raises:
        ValueError: x has one axis, and the model does not accept a single number as an example.
    """
    if x.ndim != 1 or not len(x):
        return
    reason = ""
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            y = model(x[:1])
    except (ValueError, TypeError, IndexError) as error:
        reason = str(error) or type(error).__name__
    else:
        if np.shape(y)[:1] not in ((), (1,)):
            reason = f"the output has shape {np.shape(y)}"
    if reason:
        raise ValueError(
            f"{op}: x has shape {x.shape}, so each number counts as one row, but the model does not "
            f"accept a single number as a row ({reason}); pass a single example as x[None]"
        )
