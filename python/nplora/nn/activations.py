"""Activations: elementwise functions without parameters. float64 stays float64, all else becomes float32."""

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
    """The one array that the backward pass needs: x or y, whichever the derivative is written in."""

    array: Array | None


class Activation(Module):
    """The base of the activations: y = f(x) elementwise, dx = f'(x) ∘ dy, for x of any shape.

    Constants take the dtype of x: NumPy 1 would make float64 of a single float32 number and a Python one.
    """

    _keeps_output = False  # whether f' is computed from y, which the next layer keeps anyway

    def forward(self, x: npt.ArrayLike) -> tuple[Array, ActivationSaved]:
        """y of the shape of x, and what `backward` needs."""
        op = f"{type(self).__name__}.forward"
        given = _check.as_array(op, "x", x)
        array = _check.floats(op, "x", given, np.float64 if given.dtype == np.float64 else np.float32)
        y = self._apply(array)
        kept = None if inferring() else y if self._keeps_output else array
        return y, ActivationSaved(kept, layer=self)

    def backward(self, dy: npt.ArrayLike, saved: ActivationSaved, need_dx: bool = True) -> Gradient:
        """dx of the shape of x, or None where need_dx is False.

        Raises:
            ValueError: dy has not the shape of y, or saved is of a pass of another layer.
            TypeError: saved is of another kind of layer. RuntimeError: the forward pass was inference.
        """
        op = f"{type(self).__name__}.backward"
        _check.saved(op, saved, ActivationSaved)
        if not need_dx:
            _check.own(op, saved, self)
            return None
        kept = saved.array
        if kept is None:
            raise RuntimeError(f"{op}: this forward pass was inference and kept nothing")
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
    """y = max(x, 0)."""

    _keeps_output = True

    def _apply(self, x: Array) -> Array:
        y = buffers.empty_like(x)
        np.maximum(x, x.dtype.type(0), out=y)
        return y

    def _differentiate(self, kept: Array, dy: Array) -> Array:
        dx = buffers.empty_like(dy)
        np.copyto(dx, dy)
        dx[kept <= 0] = 0  # a NaN lets its gradient through, to be seen
        return dx


class Tanh(Activation):
    """y = tanh(x); dx = (1 - y²) dy."""

    _keeps_output = True

    def _apply(self, x: Array) -> Array:
        y = buffers.empty_like(x)
        np.tanh(x, out=y)
        return y

    def _differentiate(self, kept: Array, dy: Array) -> Array:
        with quiet():
            return np.asarray((kept.dtype.type(1) - kept * kept) * dy)


class SiLU(Activation):
    """y = x σ(x) (Elfwing et al. 2018); dx = σ(x) (1 + x (1 - σ(x))) dy."""

    def _apply(self, x: Array) -> Array:
        with quiet():  # exp(-x) = inf gives the right sigmoid, 0
            return np.asarray(x / (x.dtype.type(1) + np.exp(-x)))

    def _differentiate(self, kept: Array, dy: Array) -> Array:
        with quiet():
            one = kept.dtype.type(1)
            gate = one / (one + np.exp(-kept))
            return np.asarray(gate * (one + kept * (one - gate)) * dy)


class GELU(Activation):
    """y = x Φ(x) (Hendrycks & Gimpel 2016).

    Args:
        approximate: "none": Φ by the error function; "tanh": by its approximation, as in GPT-2.
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
