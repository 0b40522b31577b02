"""safetensors: named arrays in one file.

    8 bytes     n, the length of the header, little-endian
    n bytes     JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
                and optionally "__metadata__": {"key": "text", ...}
    the rest    the arrays, row-major and little-endian, without gaps; offsets count from here

Source: https://github.com/huggingface/safetensors, section Format. The reference implementation accepts every
file that this reader accepts. This reader is stricter: a tensor's entry must have exactly the fields dtype,
shape and data_offsets.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nplora.formats import files, strict_json
from nplora.formats.errors import (
    FormatError,
    LimitError,
    TruncatedError,
    UnsupportedError,
    brief,
    missing_name,
    quoted,
    require_not_empty,
)
from nplora.formats.files import StrPath

MAX_HEADER = 100_000_000
MAX_TENSORS = 1 << 17
MAX_METADATA = 1 << 14  # entries
_MAX_WIDE = 1 << 25  # the most bytes of a header that is not ASCII; as a str, it may take four times as many
MAX_DIMENSIONS = 32  # NumPy 1.26's own limit

# Maps the tag in the file to (nplora's name, NumPy's type). The types are in the order in which the reference
# implementation sorts the data: the widest type first, so that every array is aligned.
_DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "U64": ("uint64", np.dtype("<u8")),
    "I64": ("int64", np.dtype("<i8")),
    "F64": ("float64", np.dtype("<f8")),
    "F32": ("float32", np.dtype("<f4")),
    "U32": ("uint32", np.dtype("<u4")),
    "I32": ("int32", np.dtype("<i4")),
    "BF16": ("bfloat16", np.dtype("<u2")),
    "F16": ("float16", np.dtype("<f2")),
    "U16": ("uint16", np.dtype("<u2")),
    "I16": ("int16", np.dtype("<i2")),
    "I8": ("int8", np.dtype("i1")),
    "U8": ("uint8", np.dtype("u1")),
    "BOOL": ("bool", np.dtype("?")),
}
_TAGS = {name: tag for tag, (name, _) in _DTYPES.items()}
_ORDER = {tag: position for position, tag in enumerate(_DTYPES)}
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
# The largest number of JSON values in a header at each depth: the tensors, the tensors' fields, the entries
# of shapes and offsets, and all deeper values.
_MOST_VALUES = (MAX_TENSORS + 1, len(_FIELDS) * MAX_TENSORS + MAX_METADATA, 8 * MAX_TENSORS, 1000)

Array: TypeAlias = NDArray[Any]
Tensors: TypeAlias = "Mapping[str, ArrayLike | Tensor | Stream]"
Buffer: TypeAlias = memoryview | files.Reader


@dataclass(frozen=True, eq=False)
class Tensor:
    """An array and the name of its element type.

    Attributes:
        name: the tensor's name in the file.
        dtype: the element type: NumPy's name ("float32", "int8", ...) or "bfloat16".
        array: the elements; bfloat16 elements are stored as uint16 bit patterns. Arrays from a file are
            read-only and keep the file mapped.

    >>> bits = np.array([0x3F80], np.uint16)  # 1 as bfloat16
    >>> tensor = loads(dumps({"w": Tensor("w", "bfloat16", bits)}))["w"]
    >>> tensor
    Tensor('w', bfloat16, (1,))
    """

    name: str
    dtype: str
    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def numpy(self) -> Array:
        """The elements as an array, without a copy. bfloat16 elements appear as uint16 bit patterns.

        >>> loads(dumps({"w": np.arange(3)}))["w"].numpy()
        array([0, 1, 2])
        """
        return self.array

    def __repr__(self) -> str:
        return f"Tensor({self.name!r}, {self.dtype}, {self.shape})"


@dataclass(frozen=True, eq=False)
class Stream:
    """A tensor whose bytes are produced while the file is written, a few rows at a time.

    Attributes:
        dtype: the element type, named as in `Tensor`.
        chunks: a function that returns an iterable of byte strings, which are the tensor's bytes in order.
            The writer calls this function once.

    >>> rows = Stream("float32", (3, 2), lambda: (np.full(2, i, np.float32).tobytes() for i in range(3)))
    >>> loads(dumps({"w": rows}))["w"].numpy()[:, 0]
    array([0., 1., 2.], dtype=float32)
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[files.Chunk]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _DTYPES[_TAGS[self.dtype]][1].itemsize


@dataclass(frozen=True)
class Entry:
    """One tensor as the header describes it. The parser has checked that the file contains the whole tensor.

    Attributes:
        tag: the element type as the file names it.
        begin, end: the tensor's position, in bytes from the start of the file.

    >>> file = loads(dumps({"w": np.ones((2, 3), np.float32)}))
    >>> file.entries["w"]
    Entry(tag='F32', shape=(2, 3), begin=72, end=96)
    """

    tag: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dtype(self) -> str:
        """The element type, named as in `Tensor.dtype`."""
        return _DTYPES[self.tag][0]


class SafetensorsFile(Mapping[str, Tensor]):
    """An open file: a mapping from each tensor's name to its `Tensor`, in the header's order.

    `metadata` maps text to text. `entries` maps each name to the shape and element type of the tensor,
    without reading the tensor. `mapped` holds the `Stamp` of a mapped file, and is empty for any other file.
    The stamp can show later whether the file was changed.

    >>> file = loads(dumps({"w": np.eye(2)}, {"made by": "hand"}))
    >>> file, list(file), file.metadata
    (SafetensorsFile('<bytes>', 1 tensors), ['w'], {'made by': 'hand'})
    """

    def __init__(self, data: Buffer, source: str, mapped: tuple[files.Stamp, ...] = ()) -> None:
        self.source, self.mapped = source, mapped
        self._data = data
        self.entries, self.metadata = _parse(data, source)

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries.get(name)
        if entry is None:
            raise missing_name(self.source, name, self.entries)
        return Tensor(name, entry.dtype, self._array(name, entry))

    def load(self) -> None:
        """Copy the file into memory, so that nothing is read from disk afterwards.

        >>> save("toy.safetensors", {"w": np.arange(3)})
        >>> file = open("toy.safetensors")
        >>> file.load()
        >>> os.remove("toy.safetensors")
        >>> file["w"].numpy()
        array([0, 1, 2])
        """
        self._data = self._data[:]

    def _array(self, name: str, entry: Entry) -> Array:
        dtype = _DTYPES[entry.tag][1]
        if entry.begin == entry.end:
            array = np.empty(entry.shape, dtype)
        else:
            array = np.frombuffer(self._data[entry.begin : entry.end], dtype).reshape(entry.shape)
        if entry.tag == "BOOL" and array.view(np.uint8).max(initial=0) > 1:
            raise FormatError(
                f"{self.source}: tensor {brief(name)}: a BOOL is stored as a byte that is neither 0 nor 1"
            )
        if not array.flags.aligned:
            array = array.copy()
        array.flags.writeable = False
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __repr__(self) -> str:
        return f"SafetensorsFile({self.source!r}, {len(self)} tensors)"


def open(path: StrPath, mmap: bool = True, follow_links: bool = True) -> SafetensorsFile:
    """Open a safetensors file and check its header. Tensors are read on access.

    Args:
        path: the file.
        mmap: map the file into memory, so that each page is read from disk when it is first used. If another
            program truncates a mapped file and this process then reads a page that was cut off, the process
            ends with a message and exit status 135. `mmap=False` copies the whole file into memory instead,
            after the header has been checked.
        follow_links: whether `path` may be a symbolic link. Pass False for paths that come from another file.
    Returns:
        a mapping from name to `Tensor`, with the file's `.metadata`. The arrays are read-only views that keep
        the file mapped. If a tensor is not aligned in the file, its array is a copy.
    Raises:
        FormatError: the file breaks the format. The subclass of FormatError, such as TruncatedError, shows
            the kind of problem.
        OSError: the file cannot be read.

    >>> import nplora
    >>> nplora.formats.safetensors.save("toy.safetensors", {"w": np.ones((2, 3), np.float32)})
    >>> file = nplora.formats.safetensors.open("toy.safetensors")
    >>> list(file), file["w"].dtype, file["w"].shape
    (['w'], 'float32', (2, 3))
    >>> float(file["w"].numpy().sum())
    6.0
    """
    if mmap:
        with files.reading(path, follow_links) as reader:
            return SafetensorsFile(memoryview(reader.map()), files.name(path), (reader.stamp,))
    with reading(path, follow_links) as content:
        content.load()
    return content


@contextlib.contextmanager
def reading(path: StrPath, follow_links: bool = True) -> Iterator[SafetensorsFile]:
    """Like `open`, but as a context manager. In the `with` block, each access to a tensor reads it from disk.

    Use this function for untrusted files: `entries` shows the sizes, and memory is allocated only when a
    tensor is accessed.

    >>> save("toy.safetensors", {"w": np.arange(3)})
    >>> with reading("toy.safetensors") as file:
    ...     sizes = {name: entry.shape for name, entry in file.entries.items()}
    ...     values = file["w"].numpy()
    >>> sizes, values
    ({'w': (3,)}, array([0, 1, 2]))
    """
    with files.reading(path, follow_links) as reader:
        yield SafetensorsFile(reader, files.name(path))


def loads(data: bytes | bytearray | memoryview) -> SafetensorsFile:
    """Read a safetensors file from bytes in memory. The bytes must not change while the arrays are in use.

    >>> loads(dumps({"w": np.arange(3)}))["w"].numpy()
    array([0, 1, 2])
    """
    return SafetensorsFile(memoryview(data).cast("B").toreadonly(), "<bytes>")


def save(path: StrPath, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file. If the write fails, an existing file stays as it was.

    The bytes are written to a temporary file beside the target, which is then renamed to the target.

    Args:
        path: the file to write.
        tensors: a mapping of each tensor's name to an array, a `Tensor` or a `Stream`. Arrays may have
            any strides and byte order, and may be of type ml_dtypes.bfloat16. A `Tensor` can store uint16 bit
            patterns as bfloat16. The key becomes the name in the file; a `Tensor`'s own name is ignored.
        metadata: a mapping of text to text.
    Raises:
        TypeError: the format has no type for a tensor's elements; or a name or metadata entry is not text.
        OSError: the file cannot be written; the message says how many bytes were needed.

    >>> import nplora
    >>> tensors = {"w": np.eye(2, dtype=np.float16), "ids": np.arange(3)}
    >>> nplora.formats.safetensors.save("toy.safetensors", tensors, {"made by": "hand"})
    >>> file = nplora.formats.safetensors.open("toy.safetensors")
    >>> file["w"].dtype, file["ids"].dtype, file.metadata
    ('float16', 'int64', {'made by': 'hand'})
    """
    files.replace([new_file(path, tensors, metadata)])


def dumps(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes that `save` would write.

    >>> dumps({}).endswith(b"{}      ")
    True
    """
    return b"".join(new_file("<bytes>", tensors, metadata).chunks)


def new_file(path: StrPath, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> files.NewFile:
    """Return the file that `save` would write, without writing it.

    `files.replace` can write several such files together.

    A tensor that is not contiguous is copied when it is written, and the copy is freed before the next tensor
    is written. The function `Stream.chunks` is called when its tensor is written.
    """
    tagged = [(name, *_tagged(name, value)) for name, value in tensors.items()]
    tagged.sort(key=lambda item: (_ORDER[item[1]], item[0]))
    header: dict[str, Any] = {_METADATA: _checked_metadata(metadata)} if metadata is not None else {}
    end = 0
    for name, tag, array in tagged:
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": tag, "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(
            f"safetensors.save: the header has {len(text):,} bytes, expected at most {MAX_HEADER:,}"
        )

    def chunks() -> Iterator[files.Chunk]:
        yield len(text).to_bytes(8, "little") + text
        for name, tag, array in tagged:
            if isinstance(array, Stream):
                yield from files.exactly(array.nbytes, array.chunks(), f"safetensors.save: tensor {name!r}")
                continue
            contiguous = np.ascontiguousarray(array, _DTYPES[tag][1])
            yield contiguous.reshape(-1).view(np.uint8).data

    return files.NewFile(path, 8 + len(text) + end, chunks())


def _tagged(name: str, value: ArrayLike | Tensor | Stream) -> tuple[str, Array | Stream]:
    """Return a tensor's element type as a tag such as "F32", and an array or `Stream` of its elements."""
    if not isinstance(name, str) or name == _METADATA:
        raise TypeError(
            f"safetensors.save: {name!r} cannot be the name of a tensor, expected text other than "
            f"{_METADATA!r}"
        )
    if isinstance(value, Stream):
        return _TAGS[value.dtype], value
    array = value.array if isinstance(value, Tensor) else np.asarray(value)
    dtype = value.dtype if isinstance(value, Tensor) else array.dtype.name
    if dtype not in _TAGS:
        raise TypeError(f"safetensors.save: tensor {name!r} is {dtype}, expected one of {', '.join(_TAGS)}")
    if dtype == "bfloat16" and array.dtype.name == "bfloat16":
        array = array.view(np.uint16)
    wanted = _DTYPES[_TAGS[dtype]][1]
    if array.dtype.newbyteorder("<") != wanted:
        raise TypeError(
            f"safetensors.save: tensor {name!r} is declared {dtype}, but holds {array.dtype.name}"
        )
    return _TAGS[dtype], array


def _checked_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f"safetensors.save: metadata maps {key!r} to {value!r}, expected text to text")
    return dict(metadata)


def _parse(data: Buffer, source: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """Parse the header, and check everything that can be checked without reading the arrays."""
    header, start = _header(data, source)
    metadata = _parse_metadata(header.pop(_METADATA, {}), source)
    entries = {name: _entry(name, fields, start, source) for name, fields in header.items()}
    _check_layout(entries, start, len(data), source)
    return entries, metadata


def _header(data: Buffer, source: str) -> tuple[dict[str, Any], int]:
    """The header's JSON object, and the offset at which the data begin."""
    require_not_empty(len(data), source)
    if len(data) < 8:
        raise TruncatedError(
            f"{source}: the file has {len(data)} bytes, but the header's length alone takes 8"
        )
    if bytes(data[:4]) == b"GGUF":  # as a length, this would be more than a gigabyte, beyond the limit
        raise FormatError(f"{source}: is a GGUF file, expected safetensors")
    size = int.from_bytes(data[:8], "little")
    if size > min(MAX_HEADER, len(data) - 8):
        found = f"{source}: the first 8 bytes ({brief(bytes(data[:8]))}) announce a header of {size:,} bytes"
        if size > MAX_HEADER:
            raise LimitError(f"{found}, expected at most {MAX_HEADER:,}")
        raise TruncatedError(f"{found}, but only {len(data) - 8:,} bytes follow")
    raw, where = data[8 : 8 + size], f"{source}: header"
    if bytes(raw[:1]) != b"{":
        raise FormatError(f"{source}: the header begins with {quoted(bytes(raw[:8]))}, expected '{{'")
    if size > _MAX_WIDE and not _is_ascii(raw):
        raise LimitError(
            f"{where} has {size:,} bytes, but a header with non-ASCII characters may have at most "
            f"{_MAX_WIDE:,}"
        )
    return strict_json.loads(raw, where, _MOST_VALUES), 8 + size


def _is_ascii(raw: Buffer) -> bool:
    return all(bytes(raw[begin : begin + _MAX_WIDE]).isascii() for begin in range(0, len(raw), _MAX_WIDE))


def _parse_metadata(metadata: object, source: str) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise FormatError(f"{source}: {_METADATA} is {brief(metadata)}, expected an object")
    if len(metadata) > MAX_METADATA:
        found = f"{_METADATA} has {len(metadata):,} entries"
        raise LimitError(f"{source}: {found}, expected at most {MAX_METADATA:,}")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise FormatError(f"{source}: {_METADATA}: {brief(key)} is {brief(value)}, expected text")
    return metadata


def _entry(name: str, fields: object, start: int, source: str) -> Entry:
    where = f"{source}: tensor {brief(name)}"
    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        found = sorted(fields) if isinstance(fields, dict) else fields
        raise FormatError(
            f"{where}: the entry in the header is {brief(found)}, expected dtype, shape and data_offsets"
        )
    tag = fields["dtype"]
    if not isinstance(tag, str):
        raise FormatError(f"{where}: dtype is {brief(tag)}, expected text")
    if tag not in _DTYPES:
        raise UnsupportedError(f"{where}: dtype {brief(tag)}, expected one of {', '.join(_DTYPES)}")
    shape = _integers(fields["shape"], f"{where}: shape")
    if len(shape) > MAX_DIMENSIONS:
        raise LimitError(
            f"{where}: the shape has {len(shape):,} dimensions, expected at most {MAX_DIMENSIONS}"
        )
    offsets = _integers(fields["data_offsets"], f"{where}: data_offsets")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(
            f"{where}: data_offsets are {brief(offsets)}, expected [begin, end] with begin <= end"
        )
    itemsize = _DTYPES[tag][1].itemsize
    if math.prod(filter(None, shape)) * itemsize > 2**63 - 1:
        raise LimitError(f"{where}: {tag} of shape {brief(shape)} is larger than 2^63 bytes")
    nbytes = math.prod(shape) * itemsize
    begin, end = offsets
    if end - begin != nbytes:
        raise FormatError(
            f"{where}: {tag} of shape {brief(shape)} takes {nbytes:,} bytes, but data_offsets give "
            f"{end - begin:,}"
        )
    return Entry(tag, tuple(shape), start + begin, start + end)


def _integers(value: object, where: str) -> list[int]:
    if not isinstance(value, list):
        raise FormatError(f"{where} is {brief(value)}, expected a list")
    for item in value:
        if type(item) is not int or not 0 <= item < 2**64:
            raise FormatError(f"{where} holds {brief(item)}, expected an integer from 0 to 2^64 - 1")
    return value


def _check_layout(entries: dict[str, Entry], start: int, size: int, source: str) -> None:
    """Check that the tensors cover the whole data, without holes or overlaps."""
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            kind = "overlaps the tensor before it" if entry.begin < end else "leaves a hole before it"
            where = f"begins at byte {entry.begin:,}, expected {end:,}"
            raise FormatError(f"{source}: tensor {brief(name)} {kind}: {where}")
        end = entry.end
    if end > size:
        raise TruncatedError(f"{source}: the tensors end at byte {end:,}, but the file has {size:,} bytes")
    if end < size:
        raise FormatError(f"{source}: the file has {size:,} bytes, but the last tensor ends at byte {end:,}")
