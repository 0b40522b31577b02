"""Parses and checks the whole header of a GGUF file. The result depends only on the file's bytes.

Sizes are Python integers, which cannot overflow. Every size is compared with the limits below and with the
file's size before memory is read or allocated.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nplora.formats.errors import (
    FormatError,
    LimitError,
    TruncatedError,
    UnsupportedError,
    brief,
    quoted,
    require_not_empty,
)
from nplora.formats.gguf.ggml_types import BY_NUMBER, VALUE_DTYPES, VALUE_LETTERS, VALUE_TYPES, GgmlType
from nplora.formats.gguf.metadata import LENGTH, ArrayEntry, Scalar

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER = 100_000_000  # bytes before the tensors; the largest vocabularies take 20 million
MAX_TENSORS = 1 << 16
MAX_METADATA = 1 << 16
MAX_KEY = (1 << 16) - 1  # bytes; the specification's limit
MAX_NAME = 1 << 10  # the specification allows 64 for tensors; some programs write longer names
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"

_MAX_BYTES = 2**63 - 1
START = struct.Struct("<4sIQQ")  # magic, version, number of tensors, number of metadata entries
_LEAST_METADATA = 14  # bytes of the smallest entry: a key of one letter and a value of one byte
_LEAST_TENSOR = 25  # bytes of the smallest entry: a name of one letter and no axes
_TYPE = struct.Struct("<I")
_SCALARS = {name: struct.Struct("<" + letter) for name, letter in VALUE_LETTERS.items() if name != "BOOL"}
_BOOL = struct.Struct("B")
# ne (the shape in reverse order), type and offset of a tensor, for each number of axes.
_TENSOR = [struct.Struct(f"<{count}QiQ") for count in range(MAX_DIMENSIONS + 1)]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as the header describes it. `parse` has checked that the file contains the whole tensor.

    Attributes:
        begin: position of the tensor's first byte, counted from the start of the file.
    """

    type: GgmlType
    shape: tuple[int, ...]
    begin: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.begin + self.nbytes


@dataclass(frozen=True)
class Header:
    """The content of a file except the tensors' bytes."""

    version: int
    alignment: int
    values: Mapping[str, Scalar | ArrayEntry]
    types: Mapping[str, str]
    entries: Mapping[str, TensorEntry]


def parse(data: memoryview, source: str) -> Header:
    """Parse the header, and check everything that can be checked without reading tensors or string arrays."""
    version, n_tensors, n_metadata = parse_start(data[: START.size], len(data), source)
    cursor = _Cursor(data, source, START.size)
    values, types = _parse_metadata(cursor, n_metadata)
    alignment = _alignment(values, types, source)
    found = [_parse_tensor(cursor, number) for number in range(n_tensors)]
    start = -(-cursor.at // alignment) * alignment
    entries: dict[str, TensorEntry] = {}
    for name, kind, shape, offset in found:
        if name in entries:
            raise FormatError(f"{source}: the tensor {brief(name)} appears twice")
        entries[name] = _place(f"{source}: tensor {brief(name)}", kind, shape, offset, start, alignment)
    _check_layout(entries, len(data), source)
    return Header(version, alignment, values, types, entries)


def parse_start(start: memoryview, size: int, source: str) -> tuple[int, int, int]:
    """Read the version, the number of tensors and the number of metadata entries."""
    require_not_empty(size, source)
    if not MAGIC.startswith(bytes(start[:4])):
        like = " (is it a safetensors file?)" if bytes(start[8:10]) == b'{"' else ""
        if bytes(start[:1]) in (b"{", b"["):
            like = " (is it a data file, not a model or an adapter?)"
        raise FormatError(f"{source}: begins with {quoted(bytes(start[:4]))}, expected {quoted(MAGIC)}{like}")
    if len(start) < START.size:
        raise TruncatedError(f"{source}: the file has {size} bytes, but a header has at least {START.size}")
    _, version, n_tensors, n_metadata = START.unpack(start)
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        found = "big-endian" if swapped else f"version {version}"
        raise UnsupportedError(f"{source}: {found}, expected little-endian version 2 or 3")
    rest = size - START.size
    for count, limit, least, what in (
        (n_tensors, MAX_TENSORS, _LEAST_TENSOR, "tensors"),
        (n_metadata, MAX_METADATA, _LEAST_METADATA, "metadata entries"),
    ):
        if count > limit:
            raise LimitError(f"{source}: the header announces {count:,} {what}, expected at most {limit:,}")
        if count > rest // least:
            raise LimitError(
                f"{source}: the header announces {count:,} {what}, but the {rest:,} bytes that follow hold "
                f"at most {rest // least:,}"
            )
    return version, n_tensors, n_metadata


class _Cursor:
    """A position in a header.

    The position moves only forwards. It never passes the file's end or byte `MAX_HEADER`.
    """

    def __init__(self, data: memoryview, source: str, at: int) -> None:
        self.data, self.source, self.at = data, source, at

    def skip(self, count: int, what: str) -> int:
        """Skip `count` bytes and return the position of the first skipped byte."""
        begin, end = self.at, self.at + count
        if end > MAX_HEADER:
            raise LimitError(
                f"{self.source}: {what} at byte {begin:,} takes {count:,} bytes, "
                f"but a header may have at most {MAX_HEADER:,} bytes"
            )
        if end > len(self.data):
            raise TruncatedError(
                f"{self.source}: {what} at byte {begin:,} takes {count:,} bytes, "
                f"but the file has {len(self.data):,}"
            )
        self.at = end
        return begin

    def unpack(self, layout: struct.Struct, what: str) -> tuple[int, ...]:
        return layout.unpack_from(self.data, self.skip(layout.size, what))

    def string(self, what: str, limit: int = MAX_HEADER) -> str:
        (length,) = self.unpack(LENGTH, what)
        if length > limit:
            raise LimitError(f"{self.source}: {what} has {length:,} bytes, expected at most {limit:,}")
        begin = self.skip(length, what)
        try:
            return str(self.data[begin : self.at], "utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(
                f"{self.source}: {what} is not UTF-8 at byte {begin + error.start:,}"
            ) from error

    def name(self, what: str, limit: int) -> str:
        """Read a name: a string that is not empty and has no NUL character."""
        begin, name = self.at, self.string(what, limit)
        if not name or "\0" in name:
            raise FormatError(
                f"{self.source}: {what} at byte {begin:,} is {brief(name)}, "
                "expected a non-empty name without NUL"
            )
        return name

    def skip_strings(self, count: int, what: str) -> None:
        self.skip(count * LENGTH.size, what)  # first checks the smallest possible size
        self.at -= count * LENGTH.size
        at, last, length = self.at, min(len(self.data), MAX_HEADER) - LENGTH.size, LENGTH.unpack_from
        for _ in range(count):
            if at > last:
                at += LENGTH.size
                break
            at += LENGTH.size + length(self.data, at)[0]
        self.skip(at - self.at, what)


def _parse_metadata(cursor: _Cursor, count: int) -> tuple[dict[str, Scalar | ArrayEntry], dict[str, str]]:
    values: dict[str, Scalar | ArrayEntry] = {}
    types: dict[str, str] = {}
    for number in range(count):
        key = cursor.name(f"the key of metadata {number}", MAX_KEY)
        what = f"metadata {brief(key)}"
        if key in values:
            raise FormatError(f"{cursor.source}: {what} appears twice")
        kind = _value_type(cursor, what)
        if kind == "ARRAY":
            kind = _value_type(cursor, f"the element type of {what}")
            values[key] = _parse_array(cursor, kind, what)
        else:
            values[key] = _parse_scalar(cursor, kind, what)
        types[key] = kind
    return values, types


def _value_type(cursor: _Cursor, what: str) -> str:
    (number,) = cursor.unpack(_TYPE, what)
    if number >= len(VALUE_TYPES):
        raise FormatError(
            f"{cursor.source}: {what}: the type number at byte {cursor.at - 4:,} is {number}, "
            f"expected 0 to {len(VALUE_TYPES) - 1}"
        )
    return VALUE_TYPES[number]


def _parse_scalar(cursor: _Cursor, kind: str, what: str) -> Scalar:
    if kind == "STRING":
        return cursor.string(what)
    if kind != "BOOL":
        return cursor.unpack(_SCALARS[kind], what)[0]
    (value,) = cursor.unpack(_BOOL, what)
    if value > 1:
        raise FormatError(
            f"{cursor.source}: {what}: the BOOL at byte {cursor.at - 1:,} is {value}, expected 0 or 1"
        )
    return bool(value)


def _parse_array(cursor: _Cursor, kind: str, what: str) -> ArrayEntry:
    if kind == "ARRAY":
        raise UnsupportedError(
            f"{cursor.source}: {what} is an array of arrays, which nplora does not support"
        )
    (count,) = cursor.unpack(LENGTH, what)
    begin = cursor.at
    if kind == "STRING":
        cursor.skip_strings(count, what)
        return ArrayEntry(kind, count, begin)
    cursor.skip(count * VALUE_DTYPES[kind].itemsize, what)
    if kind == "BOOL" and count and np.frombuffer(cursor.data, np.uint8, count, begin).max() > 1:
        raise FormatError(f"{cursor.source}: {what} holds a BOOL other than 0 and 1")
    return ArrayEntry(kind, count, begin)


def _alignment(values: Mapping[str, Scalar | ArrayEntry], types: Mapping[str, str], source: str) -> int:
    value = values.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    if not isinstance(value, int) or types.get(ALIGNMENT_KEY, "UINT32") != "UINT32":
        raise FormatError(f"{source}: {ALIGNMENT_KEY} is {types[ALIGNMENT_KEY]}, expected one UINT32")
    if value.bit_count() != 1:
        raise FormatError(f"{source}: {ALIGNMENT_KEY} is {value}, expected a power of two")
    if value > MAX_ALIGNMENT:
        raise LimitError(f"{source}: {ALIGNMENT_KEY} is {value:,}, expected at most {MAX_ALIGNMENT:,}")
    return value


def _parse_tensor(cursor: _Cursor, number: int) -> tuple[str, GgmlType, tuple[int, ...], int]:
    """Read the header's entry for one tensor: its name, type, shape and offset."""
    name = cursor.name(f"the name of tensor {number}", MAX_NAME)
    what = f"tensor {brief(name)}"
    (dimensions,) = cursor.unpack(_TYPE, what)
    if dimensions > MAX_DIMENSIONS:
        raise FormatError(
            f"{cursor.source}: {what} has {dimensions:,} dimensions, expected at most {MAX_DIMENSIONS}"
        )
    *ne, kind, offset = cursor.unpack(_TENSOR[dimensions], what)
    if kind not in BY_NUMBER:
        raise UnsupportedError(f"{cursor.source}: {what} has type {kind}, which nplora does not know")
    return name, BY_NUMBER[kind], tuple(reversed(ne)), offset


def _place(
    where: str, kind: GgmlType, shape: tuple[int, ...], offset: int, start: int, alignment: int
) -> TensorEntry:
    for size in shape:
        if size > _MAX_BYTES:
            raise FormatError(f"{where}: the shape holds the negative size {size - 2**64}")
    if math.prod(filter(None, shape)) * kind.block_nbytes > _MAX_BYTES * kind.block:
        raise LimitError(f"{where}: {kind.name} of shape {shape} is larger than 2^63 bytes")
    row = shape[-1] if shape else 1
    if row % kind.block:
        raise FormatError(
            f"{where} has rows of {row:,} elements, but {kind.name} needs a multiple of {kind.block}"
        )
    nbytes = kind.nbytes(shape)
    if offset % alignment:
        raise FormatError(f"{where}: begins at offset {offset:,}, expected a multiple of {alignment:,}")
    if start + offset + nbytes > _MAX_BYTES:
        raise LimitError(f"{where}: {nbytes:,} bytes from offset {offset:,} end after byte 2^63")
    return TensorEntry(kind, shape, start + offset, nbytes)


def _check_layout(entries: Mapping[str, TensorEntry], size: int, source: str) -> None:
    """Check that no two tensors overlap and that the file holds all of them."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        where = f"{source}: tensor {brief(name)}"
        if entry.begin < end:
            raise FormatError(f"{where} begins at byte {entry.begin:,}, but another tensor ends at {end:,}")
        if entry.end > size:
            raise TruncatedError(f"{where} ends at byte {entry.end:,}, but the file has {size:,} bytes")
        end = entry.end
