"""Evaluation: the loss and accuracy of a model over batches, and the model's predictions."""

from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.nn import losses
from nplora.nn.losses import Loss
from nplora.nn.module import Module
from nplora.trainer.batches import Batches
from nplora.trainer.fused import FusedLoss, take_metrics

Array = npt.NDArray[Any]


def evaluate(model: Module, loss: Loss | FusedLoss, batches: Batches) -> dict[str, float]:
    """The mean loss over all examples, tokens or elements, without dropout, and other metrics.

    For class labels, the result also has the accuracy; for a `MeasuredLoss`, its own metrics.
    """
    if isinstance(loss, FusedLoss):
        return _evaluate_fused(model, loss, batches)
    total, count, right, labelled = 0.0, 0, 0, 0
    classes = False
    for x, y in batches.epoch(0, 0):
        with np.errstate(over="ignore", invalid="ignore"):  # an overflow shows in the loss
            prediction = model(x)
            value, _ = losses.call(loss, prediction, y)
        weight = loss.count(prediction, y)
        total, count = total + value * weight, count + weight
        labels = np.asarray(y)
        if labels.dtype.kind in "iu" and labels.shape == prediction.shape[:-1]:
            classes = True
            known = labels != getattr(loss, "ignore_index", -100)
            right += int(np.count_nonzero(prediction.argmax(axis=-1)[known] == labels[known]))
            labelled += int(np.count_nonzero(known))
    metrics = {"loss": total / max(1, count)}
    if classes:
        metrics["accuracy"] = right / max(1, labelled)
    return metrics


def _evaluate_fused(model: Module, loss: FusedLoss, batches: Batches) -> dict[str, float]:
    total, count = 0.0, 0
    take_metrics(loss)  # drops the metrics of an unfinished evaluation
    for x, y in batches.epoch(0, 0):
        weight = loss.count(x, y)
        with np.errstate(over="ignore", invalid="ignore"):
            total += loss.evaluate(model, x, y) * weight
        count += weight
    return {"loss": total / max(1, count), **take_metrics(loss)}


def predict(model: Module, x: npt.ArrayLike, batch_size: int) -> Array:
    """Compute model(x), `batch_size` rows at a time."""
    rows = np.asarray(x)
    if rows.ndim == 0:
        raise ValueError("Trainer.predict: x is a single number, expected rows")
    check_rows("Trainer.predict", model, rows)
    starts = range(0, max(1, len(rows)), batch_size)
    return np.concatenate([model(rows[start : start + batch_size]) for start in starts])


def check_rows(op: str, model: Module, x: Array) -> None:
    """Refuse a single example if the model expects an array of examples.

    If x has one axis, each number in x counts as one example, such as a token id. The model is called with
    the first number, to see whether it accepts such examples.

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
            f"{op}: x has shape {x.shape}, which is {len(x)} rows of one number, but the model does not "
            f"accept such a row ({reason}); pass a single example as x[None]"
        )
