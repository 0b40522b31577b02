"""Activations: elementwise functions without parameters.

float64 inputs stay float64; all other inputs become float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check, _core
from nplora.nn.module import Gradient, Module, Saved, inferring, quiet
from nplora.weights import buffers

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class ActivationSaved(Saved):
    """Stores what the backward pass needs: the input x, or the output y if f' is computed from y."""

    array: Array | None


class Activation(Module):
    """Base class of the activations: y = f(x) and dx = f'(x) ∘ dy elementwise, for x of any shape.

    Subclasses convert constants to the dtype of x, because NumPy 1 computes a float32 scalar times a Python
    float in float64.
    """

    _keeps_output = False  # whether f' is computed from y, which the next layer keeps in memory anyway

    def forward(self, x: npt.ArrayLike) -> tuple[Array, ActivationSaved]:
        """Return y with the shape of x, and the values that `backward` needs.

        >>> import nplora
        >>> y, saved = nplora.ReLU().forward([-1.0, 2.0])
        >>> y
        array([0., 2.])
        """
        op = f"{type(self).__name__}.forward"
        given = _check.as_array(op, "x", x)
        array = _check.floats(op, "x", given, np.float64 if given.dtype == np.float64 else np.float32)
        y = self._apply(array)
        kept = None if inferring() else y if self._keeps_output else array
        return y, ActivationSaved(kept, layer=self)

    def backward(self, dy: npt.ArrayLike, saved: ActivationSaved, need_dx: bool = True) -> Gradient:
        """Return dx with the shape of x, or None if need_dx is False.

            >>> import nplora
            >>> relu = nplora.ReLU()
            >>> y, saved = relu.forward([-1.0, 2.0])
            >>> relu.backward([1.0, 1.0], saved)
            array([0., 1.])

        Raises:
            ValueError: dy does not have the shape of y, or `saved` is from a pass of another layer.
            TypeError: `saved` is from another kind of layer.
            RuntimeError: the forward pass ran in inference mode.
        """
        op = f"{type(self).__name__}.backward"
        _check.saved(op, saved, ActivationSaved)
        if not need_dx:
            _check.own(op, saved, self)
            return None
        kept = saved.array
        if kept is None:
            raise RuntimeError(f"{op}: this forward pass ran in inference mode and saved nothing")
        gradient = _check.shaped(op, "dy", dy, kept.shape, kept.dtype)
        _check.own(op, saved, self)
        return self._differentiate(kept, gradient)

    def _apply(self, x: Array) -> Array:
        raise NotImplementedError

    def _differentiate(self, kept: Array, dy: Array) -> Array:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class ReLU(Activation):
    """y = max(x, 0).

    >>> import nplora
    >>> nplora.ReLU()([-1.0, 2.0])
    array([0., 2.])
    """

    _keeps_output = True

    def _apply(self, x: Array) -> Array:
        y = buffers.empty_like(x)
        np.maximum(x, x.dtype.type(0), out=y)
        return y

    def _differentiate(self, kept: Array, dy: Array) -> Array:
        dx = buffers.empty_like(dy)
        np.copyto(dx, dy)
        dx[kept <= 0] = 0  # NaN <= 0 is false, so the gradient of a NaN is passed on
        return dx


class Tanh(Activation):
    """y = tanh(x); dx = (1 - y²) dy.

    >>> import nplora
    >>> nplora.Tanh()([0.0, 100.0])
    array([0., 1.])
    """

    _keeps_output = True

    def _apply(self, x: Array) -> Array:
        y = buffers.empty_like(x)
        np.tanh(x, out=y)
        return y

    def _differentiate(self, kept: Array, dy: Array) -> Array:
        with quiet():
            return np.asarray((kept.dtype.type(1) - kept * kept) * dy)


class SiLU(Activation):
    """y = x σ(x) (Elfwing et al. 2018); dx = σ(x) (1 + x (1 - σ(x))) dy.

    >>> import nplora
    >>> nplora.SiLU()([0.0, 100.0])
    array([  0., 100.])
    """

    def _apply(self, x: Array) -> Array:
        with quiet():  # exp(-x) = inf gives the right sigmoid, 0
            return np.asarray(x / (x.dtype.type(1) + np.exp(-x)))

    def _differentiate(self, kept: Array, dy: Array) -> Array:
        with quiet():
            one = kept.dtype.type(1)
            gate = one / (one + np.exp(-kept))
            return np.asarray(gate * (one + kept * (one - gate)) * dy)


class GELU(Activation):
    """y = x Φ(x), with Φ the cumulative distribution of N(0, 1) (Hendrycks & Gimpel 2016).

        >>> import nplora
        >>> nplora.GELU(approximate="tanh")([0.0, 100.0])
        array([  0., 100.])

    Args:
        approximate: "none" computes Φ from the error function; "tanh" uses the approximation of GPT-2.
    """

    def __init__(self, approximate: str = "none") -> None:
        self.approximate = _check.choice("GELU", "approximate", approximate, ("none", "tanh"))

    def _apply(self, x: Array) -> Array:
        out = buffers.empty_like(x)
        _core.gelu(x, self.approximate == "tanh", out)
        return out

    def _differentiate(self, kept: Array, dy: Array) -> Array:
        out = buffers.empty_like(kept)
        _core.gelu_backward(kept, dy, self.approximate == "tanh", out)
        return out

    def __repr__(self) -> str:
        return f"GELU(approximate={self.approximate!r})"
