"""Evaluation: the loss and the accuracy of a model over batches, and its predictions."""

from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.losses import Loss
from nplora.module import Module
from nplora.trainer.batches import Batches

Array = npt.NDArray[Any]


def evaluate(model: Module, loss: Loss, batches: Batches) -> dict[str, float]:
    """The mean loss, weighted by the loss's count, and for class labels the accuracy; without dropout."""
    total, count, right, labelled = 0.0, 0, 0, 0
    classes = False
    for x, y in batches.epoch(0, 0):
        with np.errstate(over="ignore", invalid="ignore"):  # a loss that is not finite is told by its value
            prediction = model(x)
            value, _ = loss(prediction, y)
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


def predict(model: Module, x: npt.ArrayLike, batch_size: int) -> Array:
    """model(x), `batch_size` rows at a time."""
    rows = np.asarray(x)
    if rows.ndim == 0:
        raise ValueError("Trainer.predict: x is a single number, expected rows")
    starts = range(0, max(1, len(rows)), batch_size)
    return np.concatenate([model(rows[start : start + batch_size]) for start in starts])
