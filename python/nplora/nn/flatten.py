"""Flatten: joins all axes after the first, for example between convolutions and linear layers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.nn.module import Gradient, Module, Saved

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class FlattenSaved(Saved):
    """The value that `Flatten.backward` needs: the shape of x."""

    shape: tuple[int, ...]


class Flatten(Module):
    """Reshape x (n, ...) to (n, d), where d is the number of values in a row.

    >>> import nplora, numpy as np
    >>> nplora.Flatten()(np.zeros((5, 8, 4, 4))).shape
    (5, 128)
    """

    def forward(self, x: npt.ArrayLike) -> tuple[Array, FlattenSaved]:
        """Return x with two axes, and the shape of x.

            >>> import nplora, numpy as np
            >>> y, saved = nplora.Flatten().forward(np.zeros((5, 2, 3)))
            >>> y.shape
            (5, 6)

        Raises:
            ValueError: x is a single number.
        """
        array = _check.as_array("Flatten.forward", "x", x)
        if not array.ndim:
            raise ValueError("Flatten.forward: x is a single number, expected (n, ...)")
        return array.reshape(len(array), math.prod(array.shape[1:])), FlattenSaved(array.shape, layer=self)

    def backward(self, dy: npt.ArrayLike, saved: FlattenSaved, need_dx: bool = True) -> Gradient:
        """Return dy with the shape of x, or None if need_dx is False.

            >>> import nplora, numpy as np
            >>> layer = nplora.Flatten()
            >>> y, saved = layer.forward(np.zeros((5, 2, 3)))
            >>> layer.backward(y, saved).shape
            (5, 2, 3)

        Raises:
            ValueError: dy does not have the shape of y, or `saved` is from a pass of another layer.
            TypeError: `saved` is from another kind of layer.
        """
        op = "Flatten.backward"
        _check.saved(op, saved, FlattenSaved)
        _check.own(op, saved, self)
        gradient, shape = np.asarray(dy), (saved.shape[0], math.prod(saved.shape[1:]))
        if gradient.shape != shape:
            raise ValueError(f"{op}: dy has shape {gradient.shape}, expected {shape}")
        return gradient.reshape(saved.shape) if need_dx else None

    def __repr__(self) -> str:
        return "Flatten()"
