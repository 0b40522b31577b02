"""RMSNorm with a frozen weight, in the compiled core. The backward pass needs only the norm's input."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from nplora import _core
from nplora.nn import RMSNorm
from nplora.weights import buffers

Array = npt.NDArray[Any]


def norm_forward(norm: RMSNorm, x: Array) -> Array:
    """Compute y = weight ∘ x / sqrt(mean x² + eps) for each row of x (n, d)."""
    y = buffers.empty_like(x)
    _core.rms_norm(x, norm.weight, norm.eps, y)
    return y


def norm_backward(norm: RMSNorm, dy: Array, x: Array, dx: Array, accumulate: bool = False) -> None:
    """Write the gradient of `x` to `dx`, or add it to `dx` if `accumulate` is True."""
    _core.rms_norm_backward(dy, x, norm.weight, norm.eps, dx, accumulate)


def piecewise_norm_forward(norm: RMSNorm, x: Array) -> Array:
    """Cut the rows of `x` into segments as long as the norm's weight, and normalise each segment."""
    return norm_forward(norm, x.reshape(-1, len(norm.weight))).reshape(x.shape)


def piecewise_norm_backward(norm: RMSNorm, dy: Array, x: Array) -> Array:
    """The gradient of the input `x` of `piecewise_norm_forward`."""
    dx = buffers.empty_like(x)
    dim = len(norm.weight)
    norm_backward(norm, dy.reshape(-1, dim), x.reshape(-1, dim), dx.reshape(-1, dim))
    return dx
