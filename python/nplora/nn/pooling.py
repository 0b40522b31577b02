"""MaxPool2d: the largest value of each window of an image."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.nn.module import Gradient, Module, Saved, inferring
from nplora.nn.windows import Windows, pair

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class PoolSaved(Saved):
    """The shape of x, and the index of the largest value within each window."""

    shape: tuple[int, ...]
    largest: Array | None = None


class MaxPool2d(Module):
    """Computes the largest value of each window of images (n, channels, height, width), without padding.

        >>> import nplora, numpy as np
        >>> pool = nplora.MaxPool2d(2)
        >>> pool(np.arange(16.0).reshape(1, 1, 4, 4))[0, 0]
        array([[ 5.,  7.],
               [13., 15.]])

    Args:
        kernel_size: the size of a window: a number, or a pair (vertical, horizontal).
        stride: the step from a window to the next; None: equal to `kernel_size`.
    Raises:
        ValueError: a size or a step is below 1. TypeError: an argument is neither a number nor a pair.
    """

    def __init__(
        self, kernel_size: int | tuple[int, int], stride: int | tuple[int, int] | None = None
    ) -> None:
        self.kernel_size = pair("MaxPool2d", "kernel_size", kernel_size, 1)
        self.stride = self.kernel_size if stride is None else pair("MaxPool2d", "stride", stride, 1)

    def configuration(self) -> str:
        return repr(self)

    def forward(self, x: npt.ArrayLike) -> tuple[Array, PoolSaved]:
        """Return y, and the values that `backward` needs.

            >>> import nplora, numpy as np
            >>> y, saved = nplora.MaxPool2d(2).forward(np.zeros((5, 3, 8, 9)))
            >>> y.shape
            (5, 3, 4, 4)

        Raises:
            ValueError: x is not (n, channels, height, width), or an image is smaller than a window.
        """
        op = "MaxPool2d.forward"
        given = _check.as_array(op, "x", x)
        array = _check.floats(op, "x", given, np.float64 if given.dtype == np.float64 else np.float32)
        channels = array.shape[1] if array.ndim == 4 else 1
        images = self._windows(channels).check(op, array, array.dtype)
        values = self._values(images)
        if inferring():
            return values.max(axis=-1), PoolSaved(images.shape, layer=self)
        largest = values.argmax(axis=-1)
        y = np.take_along_axis(values, largest[..., None], axis=-1)[..., 0]
        return y, PoolSaved(images.shape, largest, layer=self)

    def backward(self, dy: npt.ArrayLike, saved: PoolSaved, need_dx: bool = True) -> Gradient:
        """Return dx, or None if need_dx is False.

        Each element of dy belongs to a window. The element is added to dx where x has the window's largest
        value.

            >>> import nplora, numpy as np
            >>> pool = nplora.MaxPool2d(2)
            >>> y, saved = pool.forward(np.array([[[[1.0, 5.0], [3.0, 2.0]]]]))
            >>> pool.backward(np.ones_like(y), saved)[0, 0]
            array([[0., 1.],
                   [0., 0.]])

        Raises:
            ValueError: dy does not have the shape of y, or `saved` is from a pass of another layer.
            TypeError: `saved` is from another kind of layer.
            RuntimeError: the forward pass ran in inference mode.
        """
        op = "MaxPool2d.backward"
        _check.saved(op, saved, PoolSaved)
        _check.own(op, saved, self)
        if not need_dx:
            return None
        if saved.largest is None:
            raise RuntimeError(f"{op}: this forward pass ran in inference mode and saved nothing")
        given = _check.as_array(op, "dy", dy)
        dtype = np.float64 if given.dtype == np.float64 else np.float32
        gradient = _check.shaped(op, "dy", given, saved.largest.shape, dtype)
        _, channels, height, width = saved.shape
        size = self.kernel_size[0] * self.kernel_size[1]
        spread = np.where(saved.largest[..., None] == np.arange(size), gradient[..., None], 0)
        rows = spread.transpose(0, 2, 3, 1, 4).reshape(-1, channels * size)
        return self._windows(channels).images(rows.astype(dtype), height, width)

    def _windows(self, channels: int) -> Windows:
        return Windows(channels, self.kernel_size, self.stride, (0, 0), (1, 1))

    def _values(self, images: Array) -> Array:
        """Return the values of all windows, as an array (n, channels, vertical, horizontal, size).

        Each channel of an image has `vertical` · `horizontal` windows, and each window has `size` values.
        """
        n, channels, height, width = images.shape
        windows = self._windows(channels)
        rows = windows.rows(images).reshape(n, *windows.counts(height, width), channels, -1)
        return rows.transpose(0, 3, 1, 2, 4)

    def __repr__(self) -> str:
        def short(pair: tuple[int, int]) -> str:
            return str(pair[0] if pair[0] == pair[1] else pair)

        step = "" if self.stride == self.kernel_size else f", stride={short(self.stride)}"
        return f"MaxPool2d({short(self.kernel_size)}{step})"
