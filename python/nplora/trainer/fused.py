"""FusedLoss: forward pass, loss and backward pass in one call, for models with outputs too large to keep."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from nplora.nn.module import Module


@runtime_checkable
class FusedLoss(Protocol):
    """A loss for `Trainer` that runs the forward pass, the loss and the backward pass in one call.

    A `FusedLoss` may also have a method `take_metrics()`, which returns other quantities (metrics) by name.
    Each metric is a mean over all batches since the last call of `take_metrics`. The records of steps and
    epochs then contain these metrics. If a metric NAME is averaged over more or fewer values than the loss, a
    second metric "count/NAME" gives the number of these values. On several ranks, each rank measures only its
    own batches, so a loss with metrics also needs the methods of `MergedLoss`, with which the ranks merge
    their measurements.

    >>> import nplora, numpy as np
    >>> class Distance:
    ...     "The mean distance of the outputs from 1."
    ...     def count(self, x, y):
    ...         return len(x)
    ...     def forward_backward(self, model, x, y, factor):
    ...         out, saved = model.forward(x)
    ...         model.backward(np.sign(out - 1) * np.float32(factor), saved)
    ...         return float(abs(out - 1).sum())
    ...     def evaluate(self, model, x, y):
    ...         return float(abs(model(x) - 1).sum()) / len(x)
    ...     def blame(self, model, x):
    ...         return "the output is not finite"
    ...     def settings(self):
    ...         return {}
    >>> trainer = nplora.Trainer(nplora.LoRALinear(np.eye(4), rank=1, rng=0), loss=Distance())
    >>> history = trainer.fit(np.eye(4), np.zeros(4), steps=20)
    >>> history.loss[-1] < history.loss[0]
    True
    """

    def count(self, x: Any, y: Any) -> int:
        """The number of items over which the loss is averaged, such as trained tokens.

        A batch with the count 0 is skipped.
        """

    def forward_backward(self, model: Module, x: Any, y: Any, factor: float) -> float:
        """Return the sum of a batch's losses.

        Add the gradient of this sum, times `factor`, to the model's gradients.
        """

    def evaluate(self, model: Module, x: Any, y: Any) -> float:
        """The mean loss of a batch, without dropout."""

    def blame(self, model: Module, x: Any) -> str:
        """Return a sentence that says where NaN or infinity appears first.

        The trainer calls this method if a loss is not finite.
        """

    def settings(self) -> dict[str, Any]:
        """The loss's settings that must be the same in a resumed run, as values for JSON."""


@runtime_checkable
class MeasuredLoss(FusedLoss, Protocol):
    """A `FusedLoss` that also measures other quantities, such as an accuracy."""

    def take_metrics(self) -> dict[str, float]:
        """Return a dict from the name of each metric to its mean over all batches since the last call."""


@runtime_checkable
class MergedLoss(MeasuredLoss, Protocol):
    """A `MeasuredLoss` whose measurements on different ranks can be merged."""

    def take_measured(self) -> Any:
        """Return and delete the measurements so far, so that `take_metrics` does not count them."""

    def add_measured(self, measured: Any) -> None:
        """Add measurements that `take_measured` has returned, possibly on another rank."""


@runtime_checkable
class PartedLoss(FusedLoss, Protocol):
    """A `FusedLoss` that cuts a batch into parts, and runs a forward and a backward pass for each part.

    Attributes:
        after_part: a function that `forward_backward` calls after the backward pass of each part.
    """

    after_part: Callable[[], None]

    def parts(self, x: Any, y: Any) -> int:
        """The number of parts of a batch. For each part, `forward_backward` calls `after_part` once."""

    def computed_elsewhere(self, x: Any, y: Any) -> None:
        """Called for a batch that another rank runs, so that the loss can count the batch's tokens."""


def take_measured(loss: Any) -> Any:
    """Return `loss.take_measured()`; None if ranks cannot merge the measurements of this loss."""
    return loss.take_measured() if isinstance(loss, MergedLoss) else None


def add_measured(loss: Any, measured: Any) -> None:
    """Add measurements that `take_measured` has returned to the measurements of the loss."""
    if isinstance(loss, MergedLoss):
        loss.add_measured(measured)


def take_metrics(loss: Any) -> dict[str, float]:
    """Return `loss.take_metrics()`; an empty dictionary if the loss has no metrics."""
    return loss.take_metrics() if isinstance(loss, MeasuredLoss) else {}
