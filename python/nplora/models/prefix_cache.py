"""Stores the outputs of the frozen blocks below the lowest adapter, for use in later epochs."""

from __future__ import annotations

import errno
import itertools
import tempfile
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from nplora import _core
from nplora.formats import files
from nplora.formats.files import StrPath
from nplora.platform.files import read_at, reserve, write_at
from nplora.weights import buffers

Array = npt.NDArray[Any]

# Products with at most this many rows add their terms in a different order from products with more rows, and
# the last bits of the results may differ. So batches of at most this size are neither stored nor looked up.
SMALL_BATCH = _core.constants.small_batch


class _Store(Protocol):
    """Storage for float32 rows of shape (capacity, width)."""

    def read(self, start: int, out: Array) -> None: ...
    def write(self, start: int, rows: Array) -> None: ...
    def close(self) -> None: ...


class PrefixCache:
    """For each sequence, stores the residual stream before the first adapted block.

    The stream depends only on a sequence's own tokens, because all blocks before the first adapted block are
    frozen, and attention stays within a sequence. So the cache looks up a sequence by its tokens, no matter
    which other sequences are packed with it. A stored stream has the same bits as a newly computed stream.

    Args:
        blocks: the number of blocks below the first adapted block. If another block of the model becomes the
            first adapted block, the model ignores the cache.
        capacity: the maximum number of tokens in all sequences together. Sequences for which there is no more
            room are not stored.
        width: the number of values per token, `hidden_size`.
        directory: where to create an unnamed file for the rows, or None to store them in memory. The file
            disappears when the process ends, even in a crash.
    Raises:
        OSError: the directory is not writable, or the disk is too small. The message says how much space is
            needed.

    >>> cache = PrefixCache(blocks=1, capacity=100, width=4)
    >>> ids, starts = np.arange(60), np.array([0, 20, 60])  # two sequences, of 20 and 40 tokens
    >>> cache.keep(ids, starts, np.ones((60, 4), np.float32))
    >>> cache.find(ids, starts).shape, cache.nbytes
    ((60, 4), 960)
    >>> cache.find(ids + 1, starts) is None
    True
    >>> cache.close()
    """

    def __init__(self, blocks: int, capacity: int, width: int, directory: StrPath | None = None) -> None:
        self.blocks, self._capacity, self._width = blocks, capacity, width
        self._starts: dict[bytes, int] = {}  # a sequence's tokens -> the index of its first row
        self._used = 0
        self._store: _Store = (
            _Memory(capacity, width) if directory is None else _Disk(capacity, width, directory)
        )

    @property
    def nbytes(self) -> int:
        """The size of the stored rows in bytes."""
        return 4 * self._used * self._width

    def find(self, ids: Array, starts: Array) -> Array | None:
        """Return the rows (n, width) of packed sequences as a new array, or None if a sequence is not stored.

        >>> cache = PrefixCache(blocks=1, capacity=100, width=4)
        >>> cache.find(np.arange(60), np.array([0, 60])) is None  # nothing is stored yet
        True
        """
        if len(ids) <= SMALL_BATCH:
            return None
        places = [self._starts.get(ids[begin:end].tobytes()) for begin, end in _spans(starts)]
        if None in places:
            return None
        rows = buffers.empty((len(ids), self._width), np.float32)
        for place, (begin, end) in zip(places, _spans(starts), strict=True):
            assert place is not None
            self._store.read(place, rows[begin:end])
        return rows

    def keep(self, ids: Array, starts: Array, rows: Array) -> None:
        """Store the rows (n, width) of packed sequences, except sequences for which there is no more room.

        >>> cache = PrefixCache(blocks=1, capacity=100, width=4)
        >>> cache.keep(np.arange(60), np.array([0, 60]), np.ones((60, 4), np.float32))
        >>> cache.nbytes
        960
        """
        if len(ids) <= SMALL_BATCH:
            return
        for begin, end in _spans(starts):
            key = ids[begin:end].tobytes()
            if key not in self._starts and self._used + end - begin <= self._capacity:
                self._store.write(self._used, rows[begin:end])
                self._starts[key] = self._used
                self._used += end - begin

    def close(self) -> None:
        """Free the rows and their file.

        >>> cache = PrefixCache(blocks=1, capacity=100, width=4)
        >>> cache.keep(np.arange(60), np.array([0, 60]), np.ones((60, 4), np.float32))
        >>> cache.close()
        >>> cache.nbytes
        0
        """
        self._starts.clear()
        self._capacity = self._used = 0
        self._store.close()


def _spans(starts: Array) -> list[tuple[int, int]]:
    return list(itertools.pairwise(starts.tolist()))


def _bytes(rows: Array) -> memoryview:
    return rows.reshape(-1).view(np.uint8).data


class _Memory:
    def __init__(self, capacity: int, width: int) -> None:
        self._rows = np.empty((capacity, width), np.float32)  # pages that are never written take no memory

    def read(self, start: int, out: Array) -> None:
        out[...] = self._rows[start : start + len(out)]

    def write(self, start: int, rows: Array) -> None:
        self._rows[start : start + len(rows)] = rows

    def close(self) -> None:
        self._rows = self._rows[:0].copy()


class _Disk:
    """Stores rows in a file. Space for all rows is reserved at the start, to report a full disk early."""

    def __init__(self, capacity: int, width: int, directory: StrPath) -> None:
        self._row_bytes, self._directory = 4 * width, directory
        nbytes = capacity * self._row_bytes
        with files.disk_errors(directory, f"the frozen blocks' outputs take {nbytes:,} bytes"):
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115
            try:
                reserve(self._file.fileno(), max(1, nbytes))
            except BaseException:
                self._file.close()
                raise

    def read(self, start: int, out: Array) -> None:
        rest, offset = _bytes(out), start * self._row_bytes
        with files.disk_errors(self._directory, "the frozen blocks' outputs cannot be read back"):
            while rest:
                count = read_at(self._file.fileno(), rest, offset)
                if not count:
                    raise OSError(errno.EIO, "the file has become shorter")
                rest, offset = rest[count:], offset + count

    def write(self, start: int, rows: Array) -> None:
        rest, offset = (
            _bytes(np.ascontiguousarray(rows)),
            start * self._row_bytes,
        )
        with files.disk_errors(self._directory, "the frozen blocks' outputs cannot be stored"):
            while rest:
                count = write_at(self._file.fileno(), rest, offset)
                rest, offset = rest[count:], offset + count

    def close(self) -> None:
        self._file.close()
