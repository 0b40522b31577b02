"""Loss functions (prediction, target) -> (loss, dprediction).

A loss function is any callable that takes (prediction, target) and returns (loss, dprediction). Here
dprediction is the gradient of the loss with respect to the prediction. The built-in losses are means over
elements or over labelled rows. A built-in loss also has a method `count(prediction, target)`, which returns
the number of elements or rows over which the mean is taken. With these counts, the trainer averages losses
exactly, even if batches differ in size.

    >>> import nplora
    >>> loss, gradient = nplora.losses.mse([1.0, 2.0], [1.0, 4.0])
    >>> loss, gradient
    (2.0, array([ 0., -2.]))
"""

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.nn.module import quiet

Array = npt.NDArray[Any]

LossFunction = Callable[[Array, Any], tuple[float, Array]]


class NonFiniteLossError(FloatingPointError):
    """A loss, a gradient or a trained value was NaN or infinite. The message names the step and the cause.

        >>> import nplora, numpy as np
        >>> trainer = nplora.Trainer(nplora.LoRALinear(np.eye(2), rank=1), loss="mse")
        >>> try:
        ...     trainer.fit([[1, np.nan]], [[1, 1]])
        ... except nplora.NonFiniteLossError as error:
        ...     print(error)
        step 1 (epoch 1): the loss of batch 1 is nan: the input x is not finite

    Attributes:
        good_step: the training step of a checkpoint from which training can continue, with a lower learning
            rate. None if there is no such checkpoint.
    """

    good_step: int | None = None


@runtime_checkable
class Loss(Protocol):
    """A loss function that also has the method `count`.

    >>> import nplora, numpy as np
    >>> class SumOfSquares:
    ...     def __call__(self, prediction, target):
    ...         difference = prediction - target
    ...         return float((difference**2).sum()), 2 * difference
    ...
    ...     def count(self, prediction, target):
    ...         return len(prediction)
    >>> trainer = nplora.Trainer(nplora.LoRALinear(np.eye(4), rank=1, rng=0), loss=SumOfSquares())
    >>> trainer.fit(np.eye(4), np.ones((4, 4)), steps=1).loss
    [12.0]
    """

    def __call__(self, prediction: Array, target: Any) -> tuple[float, Array]:
        """Return the loss, and its gradient with the shape and dtype of `prediction`."""

    def count(self, prediction: Array, target: Any) -> int:
        """Return the number of elements or labelled rows over which the loss is averaged.

        If the number is 0, the loss and the gradient are 0.
        """


class _Elementwise:
    """The mean of f(prediction, target) over all elements. Both arrays have the same shape."""

    name = ""

    def __call__(self, prediction: npt.ArrayLike, target: npt.ArrayLike) -> tuple[float, Array]:
        """Return the loss, and its gradient with the shape and dtype of `prediction`.

        Raises:
            ValueError: `target` does not have the shape of `prediction`, or a target is out of range.
        """
        p = _prediction(self.name, prediction)
        t = _check.floats(self.name, "target", target, p.dtype)
        if t.shape != p.shape:
            raise ValueError(f"{self.name}: target has shape {t.shape}, prediction has {p.shape}")
        n = max(1, p.size)
        with quiet():
            values, slopes = self._terms(p, t)
            return float(values.sum(dtype=np.float64)) / n, np.asarray(slopes / n, dtype=p.dtype)

    def count(self, prediction: npt.ArrayLike, target: npt.ArrayLike) -> int:
        """Return the number of elements of `prediction`."""
        return int(np.size(np.asarray(prediction)))

    def _terms(self, p: Array, t: Array) -> tuple[Array, Array]:
        """Return f(p, t) and the derivative of f with respect to p, for each element."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class MeanSquaredError(_Elementwise):
    """The mean of (p - t)² over predictions p and targets t.

    >>> import nplora
    >>> nplora.losses.mse([1.0, 2.0], [1.0, 4.0])[0]
    2.0
    """

    name = "mse"

    def _terms(self, p: Array, t: Array) -> tuple[Array, Array]:
        error = p - t
        return error * error, 2 * error


@dataclasses.dataclass(frozen=True)
class Huber(_Elementwise):
    """The mean of h(p - t), with h(e) = e²/2 if |e| <= delta, else delta · (|e| - delta/2) (Huber 1964).

    >>> import nplora
    >>> nplora.losses.Huber(delta=1.0)([1.0, 2.0], [1.0, 4.0])[0]
    0.75
    """

    delta: float = 1.0
    name = "huber"

    def __post_init__(self) -> None:
        if _check.number(self.name, "delta", self.delta) <= 0:
            raise ValueError(f"huber: delta is {self.delta}, expected above 0")

    def _terms(self, p: Array, t: Array) -> tuple[Array, Array]:
        error, delta = p - t, p.dtype.type(self.delta)
        slope = np.clip(error, -delta, delta)  # keeps NaN
        return slope * (error - slope / 2), slope


@dataclasses.dataclass(frozen=True)
class BinaryCrossEntropy(_Elementwise):
    """The mean of log(1 + eᵖ) - t p, the cross entropy of a logit p and a target probability t in [0, 1].

    >>> import nplora
    >>> round(nplora.losses.bce([0.0, 100.0], [1.0, 1.0])[0], 4)
    0.3466
    """

    name = "bce"

    def _terms(self, p: Array, t: Array) -> tuple[Array, Array]:
        if np.any((t < 0) | (t > 1)):
            raise ValueError(f"bce: target runs from {t.min():g} to {t.max():g}, expected from 0 to 1")
        small = np.exp(-np.abs(p))
        sigmoid = np.where(p >= 0, 1, small) / (1 + small)
        return np.maximum(p, 0) - t * p + np.log1p(small), sigmoid - t


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """The mean of log Σ exp(logits) - logits[label] over all labelled rows.

        >>> import nplora
        >>> logits, labels = [[0.0, 0.0], [9.0, 0.0]], [1, -100]
        >>> round(nplora.losses.cross_entropy(logits, labels)[0], 4)   # the second row does not count
        0.6931

    Args:
        ignore_index: the label of rows that are left out of the mean.
        class_weights: one weight (0 or larger) for each class. The loss of a row is multiplied by the weight
            of the row's label. The sum is still divided by the number of labelled rows.
    Raises:
        ValueError: a class weight is negative or not finite.
    """

    ignore_index: int = -100
    class_weights: tuple[float, ...] | None = None
    name = "cross_entropy"

    def __post_init__(self) -> None:
        if self.class_weights is not None:
            checked = (_check.at_least(self.name, "a class weight", w, 0) for w in self.class_weights)
            object.__setattr__(self, "class_weights", tuple(checked))

    def __repr__(self) -> str:  # checkpoints store this text; older versions had no class weights
        weights = "" if self.class_weights is None else f", class_weights={self.class_weights}"
        return f"CrossEntropy(ignore_index={self.ignore_index}{weights})"

    def __call__(self, prediction: npt.ArrayLike, target: npt.ArrayLike) -> tuple[float, Array]:
        """Return the loss and its gradient, for logits (..., C) of C classes and integer labels (...).

        Raises:
            ValueError: the labels are not integers; they do not have the shape of the logits without the last
                axis; a label is neither in [0, C) nor ignore_index; or the number of class weights is not C.
        """
        logits, labels, labelled = self._read(prediction, target)
        rows, found = logits[labelled], labels[labelled]
        gradient = np.zeros_like(logits)
        if not len(found):
            return 0.0, gradient.reshape(np.shape(prediction))
        at = np.arange(len(found)), found
        with quiet():
            shifted = rows - rows.max(axis=-1, keepdims=True)
            exponentials = np.exp(shifted)
            sums = exponentials.sum(axis=-1, keepdims=True)
            losses = np.log(sums[:, 0]) - shifted[at]
            exponentials /= sums
        exponentials[at] -= 1
        if self.class_weights is not None:
            weights = self._weights(logits)[found]
            losses *= weights
            exponentials *= weights[:, None]
        exponentials /= len(found)
        gradient[labelled] = exponentials
        return float(losses.mean(dtype=np.float64)), gradient.reshape(np.shape(prediction))

    def count(self, prediction: npt.ArrayLike, target: npt.ArrayLike) -> int:
        """Return the number of labelled rows."""
        return int(np.count_nonzero(np.asarray(target) != self.ignore_index))

    def _weights(self, logits: Array) -> Array:
        weights = np.array(self.class_weights, logits.dtype)
        if len(weights) != logits.shape[-1]:
            raise ValueError(
                f"{self.name}: {len(weights)} class weights, expected one for each of the "
                f"{logits.shape[-1]} classes"
            )
        return weights

    def _read(self, prediction: npt.ArrayLike, target: npt.ArrayLike) -> tuple[Array, Array, Array]:
        """Return logits (n, C), labels (n,), and a mask (n,) that is true for labelled rows."""
        op = "cross_entropy"
        logits, labels = _prediction(op, prediction), np.asarray(target)
        if labels.dtype.kind not in "iu" and labels.size:
            raise ValueError(f"{op}: labels have dtype {labels.dtype}, expected integers")
        if logits.ndim == 0 or labels.shape != logits.shape[:-1]:
            raise ValueError(f"{op}: labels have shape {labels.shape}, logits (..., C) have {logits.shape}")
        flat = labels.reshape(-1).astype(np.int64)
        labelled = flat != self.ignore_index
        _check.in_range(op, "labels", flat[labelled], logits.shape[-1])
        return logits.reshape(len(flat), logits.shape[-1]), flat, labelled


@dataclasses.dataclass(frozen=True)
class CustomLoss:
    """Wrap a user's function as a `Loss`. The loss that the function returns must be a mean over rows.

    >>> import nplora, numpy as np
    >>> def absolute(prediction, target):
    ...     error = prediction - target
    ...     return abs(error).mean(), np.sign(error) / error.size
    >>> trainer = nplora.Trainer(nplora.LoRALinear(np.eye(2), rank=1), loss=absolute)
    >>> trainer.evaluate(np.eye(2), np.zeros((2, 2)))
    {'loss': 0.5}
    """

    function: LossFunction

    def __call__(self, prediction: Array, target: Any) -> tuple[float, Array]:
        """Call the user's function, and return its loss and gradient.

        Raises:
            TypeError: the function does not return a number and an array.
            ValueError: the gradient does not have the shape of `prediction`.
        """
        return _checked(self.function, self.function(prediction, target), prediction)

    def count(self, prediction: Array, target: Any) -> int:
        """Return the number of rows of `prediction`."""
        return len(prediction) if prediction.ndim else 1


def call(loss: Loss, prediction: Array, target: Any) -> tuple[float, Array]:
    """Call a loss function. The result of a user's function is checked.

    Raises:
        TypeError: the loss function does not return a number and an array.
        ValueError: the gradient does not have the shape of `prediction`.

    >>> import numpy as np
    >>> loss, gradient = call(MeanSquaredError(), np.array([[1.0, 3.0]]), np.array([[1.0, 1.0]]))
    >>> loss, gradient
    (2.0, array([[0., 2.]]))
    """
    result = loss(prediction, target)
    return result if type(loss).__module__ == __name__ else _checked(loss, result, prediction)


def _checked(loss: object, result: Any, prediction: Array) -> tuple[float, Array]:
    wanted = "expected (loss, dprediction), a number and an array"
    if not isinstance(result, tuple) or len(result) != 2:
        kind = (
            f"{type(result).__name__} of {len(result)}"
            if isinstance(result, tuple)
            else type(result).__name__
        )
        raise TypeError(f"loss: {_title(loss)} returned {kind}, {wanted}")
    value, gradient = result
    if not isinstance(value, numbers.Real) and not (isinstance(value, np.ndarray) and value.ndim == 0):
        kinds = f"({type(value).__name__}, {type(gradient).__name__})"
        raise TypeError(f"loss: {_title(loss)} returned {kinds}, {wanted}")
    return float(value), _check.shaped("loss", "dprediction", gradient, prediction.shape, prediction.dtype)


def _title(loss: object) -> str:
    """Return the name of a user's loss function, for messages."""
    name = getattr(loss, "__name__", None)
    if name is None:
        return type(loss).__name__
    return "the function" if "<" in name else f"the function {name}"


mse = MeanSquaredError()
huber = Huber()
bce = BinaryCrossEntropy()
cross_entropy = CrossEntropy()

_BY_NAME: dict[str, Loss] = {"mse": mse, "cross_entropy": cross_entropy, "bce": bce, "huber": huber}


def get(loss: str | Loss | LossFunction) -> Loss:
    """Return a loss function, given its name or a callable.

    A callable with a `count` method is returned as it is; any other callable is wrapped in a CustomLoss.

        >>> import nplora
        >>> nplora.losses.get("huber")
        Huber(delta=1.0)

    Raises:
        ValueError: there is no loss function of that name.
        TypeError: `loss` is neither a name nor a callable.
    """
    if isinstance(loss, str):
        return _BY_NAME[_check.choice("losses.get", "loss", loss, _BY_NAME)]
    if not callable(loss):
        raise TypeError(f"losses.get: loss is a {type(loss).__name__}, expected a name or a callable")
    return loss if isinstance(loss, Loss) else CustomLoss(loss)


def _prediction(op: str, prediction: npt.ArrayLike) -> Array:
    """Return a prediction as an array. float64 stays float64; every other dtype becomes float32."""
    array = np.asarray(prediction)
    return _check.floats(op, "prediction", array, np.float64 if array.dtype == np.float64 else np.float32)
