"""Writes GGUF version 3, little-endian, in the layout of ggml's own writer."""

import operator
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nplora.formats import files
from nplora.formats.errors import brief
from nplora.formats.files import Chunk, StrPath
from nplora.formats.gguf.ggml_types import GGML_TYPES, VALUE_DTYPES, VALUE_TYPES, GgmlType
from nplora.formats.gguf.header import (
    ALIGNMENT_KEY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_ALIGNMENT,
    MAX_DIMENSIONS,
    MAX_HEADER,
    MAX_KEY,
    MAX_METADATA,
    MAX_TENSORS,
    START,
    VERSIONS,
)
from nplora.formats.gguf.metadata import LENGTH, Typed
from nplora.formats.gguf.tensor import HasTensor, Stream, Tensor

MAX_NAME = 63  # bytes of a tensor's name; ggml refuses longer names
_UINT32 = struct.Struct("<I")
_TYPE_OF = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
}

Array: TypeAlias = NDArray[Any]
Tensors: TypeAlias = "Mapping[str, ArrayLike | Tensor | Stream | HasTensor]"


def save(path: StrPath, tensors: Tensors, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a GGUF file. If the write fails, an existing file does not change.

    The bytes are written to a temporary file beside the target, which is then renamed to the target.

    Args:
        path: the file to write.
        tensors: a mapping of each tensor's name to one of these values:

            - an array of float16, float32, float64, bfloat16 (ml_dtypes) or int8 to int64. The array may have
              up to four axes, and any strides and byte order;
            - a `Tensor` of raw blocks, such as `Tensor("w", "Q4_0", (8, 64), blocks)`, or a `Stream` of such
              blocks;
            - a `FrozenWeight`, which is saved in the format in which it is stored ("nf4" cannot be saved).

            The key becomes the tensor's name in the file. A `Tensor`'s own name is ignored.
        metadata: a mapping of each key to a str, a bool, a list of str or of bool, a NumPy scalar or array,
            or a `Typed`. A Python int or float needs `Typed`, which names its type in the file. The key
            "general.alignment" sets the alignment of the tensors.
    Raises:
        TypeError: the format has no type for a tensor's elements or for a metadata value; or a metadata value
            needs `Typed`.
        ValueError: a name, number, shape or size is not allowed by the format.
        OSError: the file cannot be written; the message says how many bytes were needed.

    >>> import nplora
    >>> weight = nplora.FrozenWeight(np.zeros((2, 32), np.float32), dtype="q8_0")
    >>> nplora.formats.gguf.save("toy.gguf", {"w": weight, "b": np.zeros(2)}, {"general.name": "toy"})
    >>> file = nplora.formats.gguf.open("toy.gguf")
    >>> file["w"].type, file["b"].type
    ('Q8_0', 'F64')
    """
    files.replace([new_file(path, tensors, metadata)])


def dumps(tensors: Tensors, metadata: Mapping[str, Any] | None = None) -> bytes:
    """The bytes that `save` would write.

    >>> dumps({}, {"general.name": "toy"})[:4]
    b'GGUF'
    """
    return b"".join(new_file("<bytes>", tensors, metadata).chunks)


def new_file(path: StrPath, tensors: Tensors, metadata: Mapping[str, Any] | None = None) -> files.NewFile:
    """Return the file that `save` would write, without writing it.

    `files.replace` can write several such files together.

    A tensor that is not contiguous is copied when it is written, and the copy is freed before the next tensor
    is written. The function `Stream.chunks` is called when its tensor is written.

    >>> files.replace([new_file("a.gguf", {"w": np.zeros(2)}), new_file("b.gguf", {"w": np.ones(2)})])
    """
    values = {key: _typed(key, value) for key, value in (metadata or {}).items()}
    _require_few("tensors", len(tensors), MAX_TENSORS)
    _require_few("metadata entries", len(values), MAX_METADATA)
    alignment = _alignment(values.get(ALIGNMENT_KEY))
    header = bytearray(START.pack(MAGIC, VERSIONS[-1], len(tensors), len(values)))
    for key, value in values.items():
        header += _name("metadata entry", key, MAX_KEY) + _value(f"metadata {brief(key)}", value)
    stored: list[tuple[_Stored, int]] = []
    offset = 0
    for name, tensor in tensors.items():
        one = _stored(name, tensor)
        header += _name("tensor", name, MAX_NAME)
        header += struct.pack(
            f"<I{len(one.shape)}QiQ", len(one.shape), *reversed(one.shape), one.kind.number, offset
        )
        padding = -one.nbytes % alignment
        offset += one.nbytes + padding
        stored.append((one, padding))
    header += bytes(-len(header) % alignment)
    _require_few("bytes of header", len(header), MAX_HEADER)

    def chunks() -> Iterator[files.Chunk]:
        yield bytes(header)
        for one, padding in stored:
            yield from one.chunks()
            yield bytes(padding)

    return files.NewFile(path, len(header) + offset, chunks())


def _require_few(what: str, count: int, limit: int) -> None:
    if count > limit:
        raise ValueError(f"gguf.save: {count:,} {what}, expected at most {limit:,}")


def _name(kind: str, name: object, limit: int) -> bytes:
    if not isinstance(name, str):
        raise TypeError(f"gguf.save: {name!r} cannot be the name of a {kind}, expected text")
    raw = _text(f"the {kind} {brief(name)}", name)
    if not name or "\0" in name or len(raw) - LENGTH.size > limit:
        raise ValueError(
            f"gguf.save: {brief(name)} cannot be the name of a {kind}, expected 1 to {limit:,} bytes "
            "without NUL"
        )
    return raw


def _text(where: str, text: object) -> bytes:
    if not isinstance(text, str):
        raise TypeError(f"gguf.save: {where} is {brief(text)}, expected text")
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"gguf.save: {where} holds half a surrogate pair") from error
    return LENGTH.pack(len(raw)) + raw


# ---- metadata ----


def _typed(key: str, value: Any) -> Typed:
    """Convert a metadata value to a `Typed`.

    The value's Python or NumPy type decides the type in the file. If the value is a `Typed`, its type is
    checked, and the value is returned.
    """
    where = f"metadata {brief(key)}"
    if isinstance(value, Typed):
        if value.type != "STRING" and value.type not in VALUE_DTYPES:
            raise TypeError(f"gguf.save: {where}: {value.type!r} is not a type of GGUF metadata")
        return value
    if isinstance(value, np.ndarray | np.generic) and value.dtype.name.upper() in VALUE_DTYPES:
        return Typed(value, value.dtype.name.upper())
    items = value if _is_list(value) else [value]
    for python_type, kind in ((str, "STRING"), (bool, "BOOL")):
        if len(items) and all(isinstance(item, python_type) for item in items):
            return Typed(value, kind)
    raise TypeError(
        f"gguf.save: {where} is {brief(value)}, whose type in the file is ambiguous: "
        'give the type, as in Typed(value, "UINT32")'
    )


def _value(where: str, typed: Typed) -> bytes:
    """Encode a metadata value as the file stores it: its type, then its bytes."""
    many = _is_list(typed.value)
    items = typed.value if many else [typed.value]
    if typed.type == "STRING":
        raw = b"".join(_text(where, item) for item in items)
    else:
        raw = _numbers(where, typed.type, items).tobytes()
    number = _UINT32.pack(VALUE_TYPES.index(typed.type))
    if not many:
        return number + raw
    return _UINT32.pack(VALUE_TYPES.index("ARRAY")) + number + LENGTH.pack(len(items)) + raw


def _is_list(value: object) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _numbers(where: str, kind: str, values: Any) -> Array:
    """Convert numbers to the metadata type `kind`. Floats are rounded.

    Raise ValueError for numbers out of range.
    """
    dtype, array = VALUE_DTYPES[kind], np.asarray(values)
    allowed = {"b": "b", "f": "fiu"}.get(dtype.kind, "iu")
    if array.ndim != 1 or (array.size and array.dtype.kind not in allowed):
        raise TypeError(f"gguf.save: {where} is {brief(values)}, expected {kind}")
    if dtype.kind in "iu" and array.size:
        info = np.iinfo(dtype)
        if int(array.min()) < info.min or int(array.max()) > info.max:
            raise ValueError(f"gguf.save: {where} is {brief(values)}, beyond the range of {kind}")
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if dtype.kind == "f" and (np.isinf(converted) & np.isfinite(array)).any():
        raise ValueError(f"gguf.save: {where} is {brief(values)}, beyond the range of {kind}")
    return converted


def _alignment(typed: Typed | None) -> int:
    if typed is None:
        return DEFAULT_ALIGNMENT
    value = typed.value
    number = int(value) if typed.type == "UINT32" and isinstance(value, int | np.integer) else 0
    if 0 < number <= MAX_ALIGNMENT and number.bit_count() == 1:
        return number
    raise ValueError(
        f"gguf.save: {ALIGNMENT_KEY} is {value!r} ({typed.type}), expected a UINT32 "
        f"that is a power of two, at most {MAX_ALIGNMENT:,}"
    )


# ---- tensors ----


@dataclass(frozen=True)
class _Stored:
    """A tensor to write: its type in the file, its shape, and its bytes."""

    kind: GgmlType
    shape: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterable[Chunk]]


def _stored(name: str, tensor: ArrayLike | Tensor | Stream | HasTensor) -> _Stored:
    where = f"gguf.save: tensor {brief(name)}"
    if isinstance(tensor, HasTensor) and not isinstance(tensor, type):
        tensor = tensor.to_gguf(name)
    if isinstance(tensor, Stream):
        kind, shape = _blocks(where, tensor.type, tensor.shape)
        nbytes = kind.nbytes(shape)
        return _Stored(
            kind, _few_axes(where, shape), nbytes, lambda: files.exactly(nbytes, tensor.chunks(), where)
        )
    if isinstance(tensor, Tensor):
        kind, shape, array = _raw(where, tensor)
    else:
        array = np.asarray(tensor)
        if array.dtype.name not in _TYPE_OF:
            raise TypeError(f"{where} is {array.dtype}, expected one of {', '.join(_TYPE_OF)}")
        kind, shape = GGML_TYPES[_TYPE_OF[array.dtype.name]], array.shape
        array = array.view(np.uint16) if array.dtype.name == "bfloat16" else array
    dtype = kind.dtype or np.dtype(np.uint8)

    def chunks() -> Iterator[Chunk]:
        yield np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data

    return _Stored(kind, _few_axes(where, shape), array.nbytes, chunks)


def _few_axes(where: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{where} has {len(shape)} axes, expected at most {MAX_DIMENSIONS}")
    return shape


def _blocks(where: str, name: str, dimensions: tuple[int, ...]) -> tuple[GgmlType, tuple[int, ...]]:
    """Look up a type by name, and check that each row of the shape is a whole number of blocks."""
    if name not in GGML_TYPES:
        raise ValueError(f"{where} is {name!r}, expected one of {', '.join(GGML_TYPES)}")
    kind, shape = GGML_TYPES[name], tuple(map(operator.index, dimensions))
    row = shape[-1] if shape else 1
    if min(shape, default=0) < 0 or row % kind.block:
        raise ValueError(
            f"{where} has shape {shape}, but {kind.name} needs sizes of at least 0, and rows of a "
            f"multiple of {kind.block} elements"
        )
    return kind, shape


def _raw(where: str, tensor: Tensor) -> tuple[GgmlType, tuple[int, ...], Array]:
    """Return the type, shape and bytes of a `Tensor`. The number of bytes must match the shape."""
    kind, shape = _blocks(where, tensor.type, tensor.shape)
    nbytes = kind.nbytes(shape)
    held = getattr(tensor.data, "dtype", type(tensor.data).__name__)
    if held != np.uint8:
        raise TypeError(f"{where} has data of type {held}, expected an array of uint8")
    if tensor.nbytes != nbytes:
        raise ValueError(
            f"{where} has {tensor.nbytes:,} bytes, but {kind.name} of shape {shape} takes {nbytes:,}"
        )
    return kind, shape, np.ascontiguousarray(tensor.data).reshape(-1).view(kind.dtype or np.uint8)
