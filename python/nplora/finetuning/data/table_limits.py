"""Limits the memory that the content of Parquet and Arrow files may take.

A small file can hold a large table, because compression, dictionaries, run lengths and views can repeat the
same bytes many times. A file states the decompressed size of each row group or message; this size is checked
before the decompression. The size of each row is estimated before the row becomes Python objects.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.formats.errors import DataError, LimitError

MOST_EXPANDED = 64  # bytes of content for each byte of a compressed part
_FREE = 1 << 28  # bytes to which any part may expand
_FREE_ROWS = 1 << 22  # rows that any file may have
_VALUE = 32  # the fewest bytes that a value takes as a Python object
_DICTIONARY, _BATCH = 2, 3  # kinds of Arrow's messages

Array = npt.NDArray[Any]


def require_parquet(metadata: Any, name: str, file_size: int) -> None:
    """Check the sizes that are stated in the metadata of a Parquet file.

    Raises:
        LimitError: there are too many rows, or a row group is too large.
    """
    if metadata.num_rows > _FREE_ROWS + MOST_EXPANDED * file_size:
        raise LimitError(f"{name}: {metadata.num_rows:,} rows in a file of {file_size:,} bytes are too many")
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = [group.column(column) for column in range(group.num_columns)]
        # The levels of nested values are stored as run lengths, which take nearly no bytes in the file.
        nested = sum(max(0, chunk.num_values - group.num_rows) for chunk in chunks)
        size = sum(chunk.total_uncompressed_size for chunk in chunks) + 8 * nested
        _require(
            size, sum(chunk.total_compressed_size for chunk in chunks), f"{name}, row group {number + 1}"
        )


def reading(metadata: Any, rows: int) -> tuple[list[str], int]:
    """Choose how to read a Parquet file without filling the memory.

    In a file, a few bytes can repeat a long text in every row. So columns of texts are read as dictionaries,
    which hold each text once. pyarrow cannot do this for delta encoding, in which a short entry can repeat
    the whole previous text. So if a column has delta encoding, only a few rows are read at a time.

    Args:
        rows: the largest number of rows to read at a time.
    Returns:
        a tuple: the names of the columns to read as dictionaries, and the number of rows to read at a time.
    """
    texts, largest = dict[str, bool](), 1
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.physical_type == "BYTE_ARRAY":
                is_delta = any(encoding.startswith("DELTA") for encoding in chunk.encodings)
                texts[chunk.path_in_schema] = not is_delta and texts.get(chunk.path_in_schema, True)
                largest = max(largest, is_delta * chunk.total_uncompressed_size)
    return [path for path, is_plain in texts.items() if is_plain], min(rows, max(1, _FREE // 8 // largest))


def require_arrow(messages: Iterable[Any], name: str) -> None:
    """Check the sizes that are stated in the messages of an Arrow file.

    Raises:
        LimitError: a batch is too large. DataError: a message is malformed.
    """
    for number, message in enumerate(messages):
        try:
            rows, size = _stated(bytes(message.metadata), memoryview(message.body or b""))
        except (struct.error, IndexError, ValueError) as error:
            raise DataError(f"{name}: message {number + 1} is malformed") from error
        held = len(message.metadata) + (0 if message.body is None else message.body.size)
        if rows > _FREE_ROWS + MOST_EXPANDED * held:
            raise LimitError(
                f"{name}, message {number + 1}: {rows:,} rows in a message of {held:,} bytes are too many"
            )
        _require(size, held, f"{name}, message {number + 1}")


def _require(size: int, held: int, where: str) -> None:
    most = max(_FREE, MOST_EXPANDED * held)
    if size > most:
        raise LimitError(f"{where}: {held:,} bytes expand to {size:,} bytes, expected at most {most:,}")


def _stated(metadata: bytes, body: memoryview) -> tuple[int, int]:
    """Return the number of rows of a message, and the number of bytes that its buffers decompress to.

    The metadata are a flatbuffer with the schema Message.fbs:
    https://arrow.apache.org/docs/format/Columnar.html.
    """
    message = _Table(metadata, struct.unpack_from("<I", metadata)[0])
    kind = message.number(1, "<B")
    if kind not in (_DICTIONARY, _BATCH):
        return 0, 0
    batch = message.table(2) if kind == _BATCH else message.table(2).table(1)
    compressed = batch.place(3) is not None
    size = 0
    for offset, length in batch.pairs(2):
        stated = -1
        if compressed and length >= 8:
            stated = struct.unpack_from("<q", body, offset)[0]
        size += length if stated < 0 else stated
    return batch.number(0, "<q"), size


class _Table:
    """A table in the flatbuffer `raw`. The module `struct` raises an error for a position after the end."""

    def __init__(self, raw: bytes, begin: int) -> None:
        self._raw, self._begin = raw, begin

    def place(self, field: int) -> int | None:
        """The position of a field in `raw`; None if the field is not stored, because its value is the
        default."""
        names = self._begin - int(self._read("<i", self._begin))
        if 4 + 2 * field + 2 > self._read("<H", names):
            return None
        offset = self._read("<H", names + 4 + 2 * field)
        return self._begin + offset if offset else None

    def number(self, field: int, form: str) -> int:
        place = self.place(field)
        return 0 if place is None else self._read(form, place)

    def table(self, field: int) -> _Table:
        place = self.place(field)
        if place is None:
            raise ValueError("a table is missing")
        return _Table(self._raw, place + self._read("<I", place))

    def pairs(self, field: int) -> Iterator[tuple[int, int]]:
        """The items of the vector in a field. Each item is a pair of 64-bit integers."""
        place = self.place(field)
        if place is None:
            return iter(())
        begin = place + self._read("<I", place)
        count = self._read("<I", begin)
        if begin + 4 + 16 * count > len(self._raw):
            raise ValueError("a vector is longer than its message")
        return struct.iter_unpack("<qq", self._raw[begin + 4 : begin + 4 + 16 * count])

    def _read(self, form: str, place: int) -> int:
        if place < 0:
            raise ValueError("an offset points before the message")
        return int(struct.unpack_from(form, self._raw, place)[0])


# ---- rows ----


def row_sizes(batch: Any) -> Array:
    """Estimate the number of bytes that each row of a batch takes as Python objects.

    The batch must have been validated, because this function uses its offsets without checking them.
    """
    sizes = np.zeros(batch.num_rows, np.int64)
    for column in batch.columns:
        sizes += _sizes(column)
    return sizes


def _sizes(array: Any) -> Array:
    """The number of bytes of each value. Bytes that several values share count fully in each of them."""
    import pyarrow.types as types

    kind, count = array.type, len(array)
    if hasattr(array, "storage"):  # an extension type
        return _sizes(array.storage)
    sizes = np.full(count, _VALUE, np.int64)
    if types.is_dictionary(kind):
        return _taken(_sizes(array.dictionary), array.indices)
    if types.is_run_end_encoded(kind):
        ends = np.clip(array.run_ends.to_numpy() - array.offset, 0, count)
        return np.repeat(_sizes(array.values), np.diff(ends, prepend=0))
    if types.is_struct(kind):
        return sum((_sizes(array.field(index)) for index in range(kind.num_fields)), sizes)
    if types.is_union(kind):
        raise DataError(f"a column has type {kind}, expected texts, numbers, lists or structs")
    if types.is_nested(kind):
        return sizes + _list_sizes(array)
    return sizes + _lengths(array)


def _list_sizes(array: Any) -> Array:
    """The number of bytes of the values in each list."""
    import pyarrow.types as types

    parts = (array.keys, array.items) if types.is_map(array.type) else (array.values,)
    values = sum(map(_sizes, parts))
    before = np.concatenate([[0], np.cumsum(values)])
    if types.is_fixed_size_list(array.type):
        width = array.type.list_size
        begins = (np.arange(len(array)) + array.offset) * width
        ends = begins + width
    elif hasattr(array, "sizes"):  # a view
        begins = array.offsets.to_numpy()
        ends = begins + array.sizes.to_numpy()
    else:
        offsets = array.offsets.to_numpy()
        begins, ends = offsets[:-1], offsets[1:]
    return np.asarray(before[ends] - before[begins])


def _taken(sizes: Array, indices: Any) -> Array:
    """Return the sizes at the given indices of `sizes`. If an index is null, the size is `_VALUE`."""
    places = indices.fill_null(0).to_numpy(zero_copy_only=False)
    is_there = indices.is_valid().to_numpy(zero_copy_only=False)
    return np.where(is_there, sizes[places] if len(sizes) else _VALUE, _VALUE)


def _lengths(array: Any) -> Array:
    """The number of bytes of each text or byte string; 0 for values of other types."""
    import pyarrow.compute
    import pyarrow.types as types

    kind, count = array.type, len(array)
    if types.is_string_view(kind) or types.is_binary_view(kind):
        views = np.frombuffer(array.buffers()[1], np.int32).reshape(-1, 4)  # each begins with its length
        return views[array.offset : array.offset + count, 0].astype(np.int64)
    is_text = types.is_string(kind) or types.is_large_string(kind)
    if is_text or types.is_binary(kind) or types.is_large_binary(kind):
        return np.asarray(pyarrow.compute.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False))
    return np.full(count, getattr(kind, "byte_width", 0) if types.is_fixed_size_binary(kind) else 0, np.int64)
