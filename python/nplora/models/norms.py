"""RMSNorm and LayerNorm with frozen weights, in the compiled core.

The backward pass needs only the norm's input.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from nplora import _core
from nplora.nn import LayerNorm, RMSNorm
from nplora.weights import buffers

Array = npt.NDArray[Any]
Norm: TypeAlias = RMSNorm | LayerNorm


def norm_forward(norm: Norm, x: Array) -> Array:
    """Normalise each row of x (n, d)."""
    y = buffers.empty_like(x)
    if isinstance(norm, RMSNorm):
        _core.rms_norm(x, norm.weight, norm.eps, y)
    else:
        _core.layer_norm(x, norm.weight, norm.bias, norm.eps, y)
    return y


def add_norm_forward(norm: Norm, x: Array, total: Array) -> Array:
    """Add `x` to `total` in place, and return a normalised copy of the sum (n, d)."""
    if isinstance(norm, RMSNorm):
        np.add(total, x, out=total)
        return norm_forward(norm, total)
    y = buffers.empty_like(total)
    _core.add_layer_norm(x, total, norm.weight, norm.bias, norm.eps, y)
    return y


def norm_backward(norm: Norm, dy: Array, x: Array, dx: Array, accumulate: bool = False) -> None:
    """Write the gradient of `x` to `dx`, or add it to `dx` if `accumulate` is True.

    Without `accumulate`, `dx` may be the same array as `dy`.
    """
    kernel = _core.rms_norm_backward if isinstance(norm, RMSNorm) else _core.layer_norm_backward
    kernel(dy, x, norm.weight, norm.eps, dx, accumulate)


def piecewise_norm_forward(norm: RMSNorm, x: Array) -> Array:
    """Cut each row of `x` into segments that are as long as the norm's weight. Normalise each segment."""
    return norm_forward(norm, x.reshape(-1, len(norm.weight))).reshape(x.shape)


def piecewise_norm_backward(norm: RMSNorm, dy: Array, x: Array) -> Array:
    """Return the gradient of the input `x` of `piecewise_norm_forward`, given the output's gradient `dy`."""
    dx = buffers.empty_like(x)
    dim = len(norm.weight)
    norm_backward(norm, dy.reshape(-1, dim), x.reshape(-1, dim), dx.reshape(-1, dim))
    return dx
