"""Memory for arrays: large arrays reuse freed memory, and the factors of a model share one buffer."""

import contextlib
import math
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check, _core

Array = npt.NDArray[Any]


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Return a new array without initial values, if possible in memory that earlier arrays have freed.

    Memory is reused because the operating system may take longer to provide new memory pages than a matrix
    product takes to write its result into them. Idle and used memory together are at most 4 MiB more than the
    largest amount that was in use at once. `release` returns idle memory to the system.
    """
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes > sys.maxsize:
        raise MemoryError(f"cannot allocate an array of {nbytes:,} bytes")
    if nbytes < _core.constants.least_buffer_bytes:
        return np.empty(shape, dtype)  # for small arrays, malloc's caches are as fast
    return _core.empty(dtype, shape)


def writable(array: Array) -> Array:
    """Return the array itself if it is writable, otherwise a writable copy.

    Since NumPy 2.5, an array that was read-only when it was pickled cannot be made writable after loading.
    """
    return array if array.flags.writeable else array.copy()


def empty_like(array: Array) -> Array:
    """Like `empty`, with the shape and dtype of another array."""
    return empty(array.shape, array.dtype)


def output(
    op: str, name: str, out: object, shape: tuple[int, ...], dtype: np.dtype[Any], *readers: tuple[str, Array]
) -> Array:
    """Check that `out` can hold a result of this shape and dtype. If `out` is None, make a new array."""
    if out is None:
        return empty(shape, dtype)
    array = _check.writable(op, name, out, *readers)
    if array.dtype != dtype:
        raise TypeError(f"{op}: {name} has dtype {array.dtype}, expected {dtype}")
    if array.shape != shape:
        raise ValueError(f"{op}: {name} has shape {array.shape}, expected {shape}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{op}: {name} is not C-contiguous")
    return array


def release() -> None:
    """Return the memory of freed arrays to the system."""
    _core.release_buffers()


_LINE = _core.constants.cache_line


class _Shelf:
    """A buffer of zeros. Each call of `take` returns the next bytes of the buffer as an array."""

    def __init__(self, nbytes: int) -> None:
        whole = np.zeros(nbytes + _LINE, np.uint8)
        self._left = whole[-whole.ctypes.data % _LINE :][:nbytes]

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array | None:
        size = math.prod(shape) * dtype.itemsize
        if size > len(self._left):
            return None
        array = self._left[:size].view(dtype).reshape(shape)
        self._left = self._left[_whole_lines(size) :]
        return array


_shelves: ContextVar[tuple[_Shelf, _Shelf] | None] = ContextVar("nplora_shelves", default=None)


@contextlib.contextmanager
def side_by_side(*sizes: int) -> Iterator[None]:
    """Inside the `with` body, `value_and_gradient` puts all values into one buffer.

    All gradients share another buffer of the same size. `sizes` has the size of each value in bytes. Hundreds
    of small arrays then fit into a few large memory pages, if the system offers large pages.
    """
    total = sum(map(_whole_lines, sizes))
    token = _shelves.set((_Shelf(total), _Shelf(total)))
    try:
        yield
    finally:
        _shelves.reset(token)


def value_and_gradient(
    shape: tuple[int, ...], dtype: np.dtype[Any], trained: bool = True
) -> tuple[Array, Array | None]:
    """Return arrays of zeros for a value and its gradient. If `trained` is False, the gradient is None."""
    values, gradients = _shelves.get() or (_Shelf(0), _Shelf(0))
    return _zeros(values, shape, dtype), _zeros(gradients, shape, dtype) if trained else None


def _zeros(shelf: _Shelf, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    found = shelf.take(shape, dtype)
    return np.zeros(shape, dtype) if found is None else found


def _whole_lines(nbytes: int) -> int:
    return -(-nbytes // _LINE) * _LINE
