"""sample_gradient: the sample of an `Int8Check`, for a network that is trained on arrays."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy.typing as npt

from nplora import _check, _core
from nplora.nn import losses
from nplora.nn.losses import LossFunction, NonFiniteLossError
from nplora.nn.module import Module, quiet

_LEAST_ROWS = _core.constants.small_batch + 1  # fewer rows are not multiplied in int8


def sample_gradient(
    model: Module, loss: str | LossFunction, x: npt.ArrayLike, y: npt.ArrayLike
) -> Callable[[], float]:
    """Return a function that adds the gradient of a sample to the gradients of a model, for an `Int8Check`.

    The function returns the loss of the sample. If the loss is not finite, it raises NonFiniteLossError.

    Args:
        model: a Module, whose `forward` takes `x`.
        loss: as in Trainer, but not a `FusedLoss`.
        x, y: the sample: some examples and their targets, as in `Trainer.fit`. A sample of a few hundred rows
            is enough.
    Raises:
        ValueError: the sample has fewer than 9 rows, which would not be multiplied in int8; or `loss` is not
            the name of a loss.

    >>> import nplora, numpy as np
    >>> rng = np.random.default_rng(0)
    >>> layer = nplora.LoRALinear(rng.standard_normal((8, 64)), rank=2, compute="int8")
    >>> x, y = rng.standard_normal((16, 64)), rng.standard_normal((16, 8))
    >>> add_gradient = nplora.finetuning.sample_gradient(layer, "mse", x, y)
    >>> loss = add_gradient()
    >>> loss > 0, bool(layer.dA.any())
    (True, True)
    """
    op, function = "sample_gradient", losses.get(loss)
    x, y = _check.as_array(op, "x", x), _check.as_array(op, "y", y)
    if len(x) < _LEAST_ROWS:
        raise ValueError(f"{op}: x has {len(x)} rows, expected at least {_LEAST_ROWS}")

    def add_gradient() -> float:
        with quiet():
            prediction, saved = model.forward(x)
            value, gradient = losses.call(function, prediction, y)
            if not math.isfinite(value):
                raise NonFiniteLossError(f"the loss is {value}")
            model.backward(gradient, saved)
        return value

    return add_gradient
