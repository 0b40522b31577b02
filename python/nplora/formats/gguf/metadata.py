"""The metadata of a GGUF file. Scalars are Python values; arrays are read on first use."""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from nplora.formats.errors import FormatError, brief, counted, missing_name, nearest_names
from nplora.formats.gguf.ggml_types import VALUE_DTYPES, elements

Array: TypeAlias = NDArray[Any]
Scalar: TypeAlias = int | float | bool | str

LENGTH = struct.Struct("<Q")  # precedes every string and array


@dataclass(frozen=True)
class Typed:
    """A metadata value with its type in the file: `Typed(32, "UINT32")`, `Typed([1, 2], "INT32")`.

    Attributes:
        value: a scalar, or a list or array of scalars.
        type: "UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "UINT64", "INT64", "FLOAT32", "FLOAT64",
            "BOOL" or "STRING". For a list or array, `type` is the type of the elements.

    >>> from nplora.formats import gguf
    >>> file = gguf.loads(gguf.dumps({}, {"n": Typed(32, "UINT32"), "names": ["a", "b"]}))
    >>> file.metadata.types
    {'n': 'UINT32', 'names': 'STRING'}
    """

    value: Any
    type: str


@dataclass(frozen=True)
class ArrayEntry:
    """The position of an array in the file. The array's type and size have been checked.

    The bytes of a string may still be invalid UTF-8.

    Attributes:
        type: the type of the elements.
        begin: position of the first element, in bytes from the start of the file.
    """

    type: str
    count: int
    begin: int


class StringArray(Sequence[str]):
    """An array of strings in the file. A string is decoded on access; bad UTF-8 then raises FormatError.

    >>> from nplora.formats import gguf
    >>> names = gguf.loads(gguf.dumps({}, {"names": ["a", "b", "c"]})).metadata["names"]
    >>> len(names), names[0], names[1:]
    (3, 'a', ['b', 'c'])
    """

    def __init__(self, data: memoryview, entry: ArrayEntry, where: str) -> None:
        self._data, self._entry, self._where = data, entry, where
        self._begins: Array | None = None

    def __len__(self) -> int:
        return self._entry.count

    def __iter__(self) -> Iterator[str]:
        begin = self._entry.begin
        for index in range(len(self)):
            text, begin = self._text(index, begin)
            yield text

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if self._begins is None:
            self._begins = self._find()
        if isinstance(index, slice):
            return [self._text(i, int(self._begins[i]))[0] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return self._text(index, int(self._begins[index]))[0]

    def _find(self) -> Array:
        """Find the position of each string. Only access by index needs these positions."""
        begins, begin = np.empty(len(self), np.int64), self._entry.begin
        for index in range(len(self)):
            begins[index] = begin
            begin += LENGTH.size + LENGTH.unpack_from(self._data, begin)[0]
        return begins

    def _text(self, index: int, begin: int) -> tuple[str, int]:
        """Return the string that begins at position `begin`, and the position after the string."""
        end = begin + LENGTH.size + LENGTH.unpack_from(self._data, begin)[0]
        raw = self._data[begin + LENGTH.size : end]
        try:
            return str(raw, "utf-8"), end
        except UnicodeDecodeError as error:
            raise FormatError(
                f"{self._where}[{index}] is not UTF-8 at byte {error.start} of {brief(bytes(raw[:99]))}"
            ) from error

    def __repr__(self) -> str:
        return f"<{len(self)} strings of {self._where}>"


class Metadata(Mapping[str, Scalar | Array | StringArray]):
    """Maps each key to its value, in the order of the file.

    Scalars are Python int, float, bool and str. An array of numbers is a read-only NumPy view of the file. An
    array of strings is a `StringArray`. Arrays are not read until they are used. `types` maps each key to the
    value's type in the file. For an array, this is the type of the elements.

    The methods `integer`, `number`, `boolean`, `string`, `array` and `strings` each return a value of one
    type. These methods raise FormatError if the value has the wrong type, or if the key is missing and no
    default is given. If the argument `count` is given, the array must have this number of elements.

    >>> from nplora.formats import gguf
    >>> metadata = gguf.loads(gguf.dumps({}, {"general.name": "toy", "sizes": np.arange(3)})).metadata
    >>> metadata["general.name"], len(metadata["sizes"]), metadata.string("general.type", "model")
    ('toy', 3, 'model')
    """

    def __init__(
        self,
        data: memoryview,
        source: str,
        values: Mapping[str, Scalar | ArrayEntry],
        types: Mapping[str, str],
    ) -> None:
        self._data, self._source, self._values = data, source, values
        self.types = types

    def __getitem__(self, key: str) -> Scalar | Array | StringArray:
        if key not in self._values:
            raise missing_name(self._source, key, self._values, "metadata")
        value = self._values[key]
        return self._array(key, value) if isinstance(value, ArrayEntry) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def typed(self) -> dict[str, Typed]:
        """All values with their types in the file, in the form that `gguf.save` accepts.

        >>> from nplora.formats import gguf
        >>> metadata = gguf.loads(gguf.dumps({}, {"name": "toy", "size": gguf.Typed(7, "UINT32")})).metadata
        >>> metadata.typed()["size"]
        Typed(value=7, type='UINT32')
        """
        return {key: Typed(self[key], self.types[key]) for key in self}

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a scalar of any integer type.

        >>> from nplora.formats import gguf
        >>> metadata = gguf.loads(gguf.dumps({}, {"size": gguf.Typed(7, "UINT32")})).metadata
        >>> metadata.integer("size"), metadata.integer("heads", default=1)
        (7, 1)
        """
        value = self._values.get(key, default)
        if type(value) is not int:
            self._refuse(key, "an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a scalar of any integer or float type.

        >>> from nplora.formats import gguf
        >>> gguf.loads(gguf.dumps({}, {"eps": gguf.Typed(0.5, "FLOAT32")})).metadata.number("eps")
        0.5
        """
        value = self._values.get(key, default)
        if type(value) is not int and type(value) is not float:
            self._refuse(key, "a number")
        return value

    def boolean(self, key: str, default: bool | None = None) -> bool:
        """Return a scalar of type BOOL.

        >>> from nplora.formats import gguf
        >>> gguf.loads(gguf.dumps({}, {"tied": True})).metadata.boolean("tied")
        True
        """
        value = self._values.get(key, default)
        if type(value) is not bool:
            self._refuse(key, "a BOOL")
        return value

    def string(self, key: str, default: str | None = None) -> str:
        """Return a scalar of type STRING.

        >>> from nplora.formats import gguf
        >>> gguf.loads(gguf.dumps({}, {"name": "toy"})).metadata.string("name")
        'toy'
        """
        value = self._values.get(key, default)
        if type(value) is not str:
            self._refuse(key, "a STRING")
        return value

    def array(self, key: str, type: str, count: int | None = None) -> Array:
        """Return an array of numbers or of BOOL. `type` is the type of the elements, such as "FLOAT32".

        >>> from nplora.formats import gguf
        >>> metadata = gguf.loads(gguf.dumps({}, {"factors": np.array([1.0, 2.0], np.float32)})).metadata
        >>> metadata.array("factors", "FLOAT32")
        array([1., 2.], dtype=float32)
        """
        return self._array(key, self._array_entry(key, type, count))  # type: ignore[return-value]

    def strings(self, key: str, count: int | None = None) -> StringArray:
        """Return an array of strings.

        >>> from nplora.formats import gguf
        >>> metadata = gguf.loads(gguf.dumps({}, {"tokens": ["a", "b"]})).metadata
        >>> list(metadata.strings("tokens"))
        ['a', 'b']
        """
        return self._array(key, self._array_entry(key, "STRING", count))  # type: ignore[return-value]

    def _array_entry(self, key: str, element: str, count: int | None) -> ArrayEntry:
        value = self._values.get(key)
        if not isinstance(value, ArrayEntry) or value.type != element or count not in (None, value.count):
            self._refuse(
                key,
                f"an array of {element}" if count is None else f"{counted(count, 'value')} of type {element}",
            )
        return value

    def _array(self, key: str, entry: ArrayEntry) -> Array | StringArray:
        if entry.type == "STRING":
            return StringArray(self._data, entry, f"{self._source}: metadata {brief(key)}")
        dtype = VALUE_DTYPES[entry.type]
        raw = np.frombuffer(self._data[entry.begin : entry.begin + entry.count * dtype.itemsize], np.uint8)
        return elements(raw, dtype)

    def _refuse(self, key: str, expected: str) -> NoReturn:
        where = f"{self._source}: metadata {brief(key)}"
        if key not in self._values:
            near = ", ".join(map(repr, nearest_names(key, self._values))) or "none"
            raise FormatError(f"{where} is missing, expected {expected}; the nearest keys: {near}")
        value, element = self._values[key], self.types[key]
        found = (
            f"{counted(value.count, 'value')} of type {element}"
            if isinstance(value, ArrayEntry)
            else f"the {element} {brief(value)}"
        )
        raise FormatError(f"{where} is {found}, expected {expected}")

    def __repr__(self) -> str:
        return f"Metadata({self._source!r}, {len(self)} keys)"
