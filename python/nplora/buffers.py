"""Large arrays in memory that is used again: a training step runs in the memory of the one before."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _core

Array = npt.NDArray[Any]


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """np.empty in memory that earlier arrays have left, where they have left any.

    Fresh pages cost the system more time than some products take to fill them. Idle memory and memory in use
    never take more than memory in use has taken at most; `release` returns what is idle.
    """
    dtype = np.dtype(dtype)
    if math.prod(shape) * dtype.itemsize < _core.least_buffer_bytes:  # malloc's caches are as fast
        return np.empty(shape, dtype)
    return _core.empty(dtype, shape)


def empty_like(array: Array) -> Array:
    """`empty` of the shape and dtype of an array."""
    return empty(array.shape, array.dtype)


def release() -> None:
    """Return the memory that earlier arrays have left to the system."""
    _core.release_buffers()
