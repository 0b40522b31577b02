"""Checksums of values that must be the same on all ranks."""

import dataclasses
import zlib
from typing import Any

import numpy as np

_PLAIN = (str, bytes, int, float, complex, type(None))


def checksum(value: Any, start: int = 0) -> int:
    """The CRC-32 of all arrays, texts and numbers in `value`.

    `value` may consist of nested lists, tuples, dictionaries and dataclasses. Objects of other types are
    ignored.

    >>> import numpy as np
    >>> from nplora.trainer.checksum import checksum
    >>> checksum([np.arange(3), "text"]) == checksum([np.arange(3), "text"])
    True
    >>> checksum(np.arange(3)) == checksum(np.arange(4))
    False
    """
    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        start = zlib.crc32(f"{array.dtype} {array.shape}".encode(), start)
        if array.dtype.hasobject:
            return checksum(array.tolist(), start)
        return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, start)
    if isinstance(value, _PLAIN):
        return zlib.crc32(repr(value).encode(), start)
    if isinstance(value, dict):
        value = list(value.items())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, tuple | list):
        start = zlib.crc32(str(len(value)).encode(), start)
        for each in value:
            start = checksum(each, start)
    return start
