"""Windows: the geometry of a convolution. Converts images to a matrix of their windows, and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.weights import buffers

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Windows:
    """The windows of images (n, channels, height, width), to which a convolution applies its kernel.

    A window has `channels` · `size[0]` · `size[1]` values. The windows of images are the rows of a matrix. A
    convolution is the product of this matrix and the kernel's matrix.

    Attributes:
        channels: the number of channels of an image.
        size, stride, padding, dilation: pairs (vertical, horizontal) with torch's meaning. The padding is
            zeros on all four sides.
    """

    channels: int
    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, op: str, channels: int, size: Any, stride: Any, padding: Any, dilation: Any) -> Windows:
        """Check a user's arguments. Each argument after `channels` is a number or a pair of numbers.

        Raises:
            ValueError: a number is too small. TypeError: an argument is neither a number nor a pair.
        """
        return cls(
            channels,
            pair(op, "kernel_size", size, 1),
            pair(op, "stride", stride, 1),
            pair(op, "padding", padding, 0),
            pair(op, "dilation", dilation, 1),
        )

    @property
    def width(self) -> int:
        """The number of values in a window."""
        return self.channels * self.size[0] * self.size[1]

    def counts(self, height: int, width: int) -> tuple[int, int]:
        """Return how many windows an image has vertically, and how many it has horizontally.

        If a window is higher or wider than the padded image, the number in that direction is at most 0.
        """
        vertical, horizontal = (
            (length + 2 * padding - dilation * (size - 1) - 1) // stride + 1
            for length, padding, dilation, size, stride in zip(
                (height, width), self.padding, self.dilation, self.size, self.stride, strict=True
            )
        )
        return vertical, horizontal

    def check(self, op: str, x: npt.ArrayLike, dtype: npt.DTypeLike) -> Array:
        """Return x as an array of images.

        Raises:
            ValueError: x is not (n, channels, height, width), or an image is smaller than a window.
        """
        images = _check.floats(op, "x", x, dtype)
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(
                f"{op}: x has shape {images.shape}, expected images (n, {self.channels}, height, width)"
            )
        if min(self.counts(*images.shape[2:])) < 1:
            raise ValueError(
                f"{op}: x has shape {images.shape}: its images are smaller than a window of the "
                f"kernel, which has size {self.size}, dilation {self.dilation} and padding {self.padding}"
            )
        return images

    def rows(self, images: Array) -> Array:
        """Return a matrix whose rows are the windows of the images. A row has `self.width` values."""
        vertical, horizontal = self.counts(*images.shape[2:])
        padded = self._padded(images)
        n, channels, down, right = padded.strides
        views = np.lib.stride_tricks.as_strided(
            padded,
            (len(images), vertical, horizontal, self.channels, *self.size),
            (
                n,
                down * self.stride[0],
                right * self.stride[1],
                channels,
                down * self.dilation[0],
                right * self.dilation[1],
            ),
            writeable=False,
        )
        out = buffers.empty((len(images) * vertical * horizontal, self.width), images.dtype)
        out.reshape(views.shape)[...] = views
        return out

    def images(self, rows: Array, height: int, width: int) -> Array:
        """Return images in which each pixel is the sum of the values that all windows have for this pixel.

        The argument `rows` has one row for each window. As a linear map, this method is the transpose of the
        method `rows`.
        """
        vertical, horizontal = self.counts(height, width)
        n = len(rows) // (vertical * horizontal)
        values = rows.reshape(n, vertical, horizontal, self.channels, *self.size)
        (top, left), (down, right) = self.padding, self.stride
        out = np.zeros((n, self.channels, height + 2 * top, width + 2 * left), rows.dtype)
        for i in range(self.size[0]):
            for j in range(self.size[1]):
                y, x = i * self.dilation[0], j * self.dilation[1]
                part = out[:, :, y : y + down * vertical : down, x : x + right * horizontal : right]
                part += values[..., i, j].transpose(0, 3, 1, 2)
        return out[:, :, top : top + height, left : left + width]

    def _padded(self, images: Array) -> Array:
        (top, left), (n, channels, height, width) = self.padding, images.shape
        if not top and not left:
            return images
        padded = np.zeros((n, channels, height + 2 * top, width + 2 * left), images.dtype)
        padded[:, :, top : top + height, left : left + width] = images
        return padded

    def describe(self) -> list[str]:
        """Return the settings that differ from the defaults, for a `repr`."""
        usual = (("stride", self.stride, 1), ("padding", self.padding, 0), ("dilation", self.dilation, 1))
        return [
            f"{name}={value[0] if value[0] == value[1] else value}"
            for name, value, default in usual
            if value != (default, default)
        ]


def pair(op: str, name: str, value: Any, least: int) -> tuple[int, int]:
    """Return `value` as a pair. A number becomes the pair (number, number).

    Raises:
        ValueError: a number is below `least`. TypeError: the value is neither a number nor a pair.
    """
    if isinstance(value, tuple | list) and len(value) != 2:
        raise TypeError(f"{op}: {name} is {value!r}, expected an integer or a pair of integers")
    vertical, horizontal = value if isinstance(value, tuple | list) else (value, value)
    return (
        _check.integer(op, name, vertical, least=least),
        _check.integer(op, name, horizontal, least=least),
    )
