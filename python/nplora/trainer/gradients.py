"""Gradients: runs each batch of a step forward and backward, and adds up the gradients in the model."""

import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from nplora.nn import losses
from nplora.nn.losses import Loss
from nplora.nn.module import quiet
from nplora.trainer.fused import FusedLoss
from nplora.trainer.nonfinite import first_nonfinite
from nplora.trainer.training_setup import TrainingSetup

Array = npt.NDArray[Any]


@dataclass
class StepTotals:
    """The sum of the losses in one step, and the numbers of batches and items.

    The sum of the gradients is stored in the model, not in this object. If ranks make local steps, the model
    holds only the gradients of this rank's batches.
    """

    step: int = 0  # the number of the step, from 1
    batches: int = 0
    count: int = 0  # the number of items over which the loss is averaged
    first_count: int = 0  # the first batch's count that is not 0; gradients are weighted relative to it
    own_count: int = 0  # the count of only those batches whose gradients the model holds
    loss: float = 0.0  # the sum of loss · count
    started: float = field(default_factory=time.perf_counter)


@dataclass
class Forward:
    """The results of the forward pass of one batch.

    Attributes:
        count: the number of items over which the loss is averaged; 0 if the loss is not finite.
        gradient: the gradient of the loss with respect to the prediction.
        saved: the values that the backward pass of the model needs.
    """

    loss: float
    count: int
    gradient: Array
    saved: Any


@dataclass(frozen=True)
class NonfiniteLoss:
    """A loss that is NaN or infinite.

    Attributes:
        batch: the number of the batch in the step, from 1.
        what: the second half of an error message. It contains the value of the loss, and the place where NaN
            or infinity appears first.
    """

    batch: int
    what: str


class Gradients:
    """Computes the gradients of a model, batch by batch."""

    def __init__(self, setup: TrainingSetup) -> None:
        self._setup, self._model = setup, setup.model
        self._parameters = self._model.parameters()
        self._adapters = list(self._model.adapter_layers().values())
        self._checked = False  # whether `_check_buffers` has passed

    def begin(self) -> None:
        """Begin a step."""

    def add(self, x: Any, y: Any, totals: StepTotals) -> NonfiniteLoss | None:
        """Run one batch forward and backward. Add the gradients, weighted by the batch's number of items.

        Returns:
            None, or the reason why the loss is not finite.
        """
        streams = [layer.dropout_stream for layer in self._adapters]
        loss = self._setup.loss
        totals.batches += 1
        if isinstance(loss, FusedLoss):
            value = self._add_fused(loss, x, y, totals)
        else:
            value = self._add(loss, x, y, totals)
        if math.isfinite(value):
            return None
        for layer, stream in zip(self._adapters, streams, strict=True):
            layer.dropout_stream = stream  # so that the search below uses the same dropout masks
        return NonfiniteLoss(totals.batches, self._blame(value, x, y))

    def finish(self, totals: StepTotals) -> NonfiniteLoss | None:
        """Complete the gradients of a step. (Here, nothing is left to do: `add` completes the gradients.)"""
        return None

    def _blame(self, value: float, x: Any, y: Any) -> str:
        """Run the batch again, to find where NaN or infinity appears first."""
        loss = self._setup.loss
        if isinstance(loss, FusedLoss):
            return f"is {value}: {loss.blame(self._model, x)}"
        return f"is {value}: {first_nonfinite(self._model, x, y)}"

    def _add(self, loss: Loss, x: Any, y: Any, totals: StepTotals) -> float:
        """Run one batch; return its loss. If the loss is not finite, the gradients stay unchanged."""
        forward = self._loss_of(loss, x, y)
        if forward.count == 0:  # the loss is not finite, or no row has a label
            return forward.loss
        totals.first_count = totals.first_count or forward.count
        totals.count += forward.count
        totals.own_count += forward.count
        totals.loss += forward.loss * forward.count
        self._backward(forward, totals.first_count)
        return forward.loss

    def _loss_of(self, loss: Loss, x: Any, y: Any) -> Forward:
        """Run one batch forward."""
        with quiet():
            prediction, saved = self._forward(x)
            value, gradient = losses.call(loss, prediction, y)
        count = loss.count(prediction, y) if math.isfinite(value) else 0
        return Forward(value, count, gradient, saved)

    def _backward(self, forward: Forward, first_count: int) -> None:
        """Add the gradients of a batch, multiplied by `forward.count / first_count`."""
        gradient = forward.gradient
        if forward.count != first_count:
            gradient = gradient * gradient.dtype.type(forward.count / first_count)
        with quiet():
            self._setup.backward(gradient, forward.saved)
        self._check_buffers()

    def _add_fused(self, loss: FusedLoss, x: Any, y: Any, totals: StepTotals) -> float:
        """Run one batch with a fused loss; return the sum of its losses."""
        count = loss.count(x, y)
        if count == 0:
            return 0.0
        totals.first_count = totals.first_count or count
        value = self._fused(loss, x, y, totals.first_count)
        if math.isfinite(value):
            totals.count += count
            totals.own_count += count
            totals.loss += value
            self._check_buffers()
        return value

    def _fused(self, loss: FusedLoss, x: Any, y: Any, first_count: int) -> float:
        with quiet():
            return loss.forward_backward(self._model, x, y, 1 / first_count)

    def _forward(self, x: Any) -> tuple[Array, Any]:
        result: Any = self._model.forward(x)
        pair: tuple[Any, ...] = tuple(result) if isinstance(result, tuple | list) else (result,)
        if len(pair) != 2 or not hasattr(pair[0], "shape"):
            got = ", ".join(type(part).__name__ for part in pair)
            raise TypeError(
                f"{type(self._model).__name__}.forward returned ({got}), expected (y, saved): "
                "the output array, and the values that backward needs"
            )
        return pair[0], pair[1]

    def _check_buffers(self) -> None:
        """Refuse a model that has replaced a trained array: the optimiser would not update the new array."""
        if self._checked:
            return
        now = {p.name: p for p in self._model.parameters()}
        for name, value, grad in self._parameters:
            for what, held, found in (
                ("gradient", grad, now[name].grad if name in now else None),
                ("value", value, now[name].value if name in now else None),
            ):
                if found is None or not _same_buffer(held, found):
                    raise RuntimeError(
                        f"{type(self._model).__name__}: forward or backward has replaced the {what} "
                        f"array of parameter {name!r}: write into the existing array (self.dw += ..., "
                        "self.w[...] = ...), do not assign a new array (self.dw = ...)"
                    )
        self._checked = True


def _same_buffer(a: Array, b: Array) -> bool:
    """Whether two arrays are the same object, or views of the same elements."""
    return a is b or (a.shape == b.shape and _address(a) == _address(b))


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
