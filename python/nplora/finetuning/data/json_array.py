"""The elements of a JSON array that is too large to be parsed as a whole."""

import re
from collections.abc import Iterator

import numpy as np

from nplora.formats.errors import DataError, LimitError, brief

_IS_MARK, _STEP = np.zeros(256, np.uint8), np.zeros(256, np.int8)
_IS_MARK[list(b"[{]},")] = 1
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1
_SPACE = rb"[ \t\r\n]*"
_PAIR = rb'"[^"\\]*"' + _SPACE + rb":" + _SPACE + rb'(?:"[^"\\]*"|[^][{}",]*)' + _SPACE + rb"," + _SPACE
_HEAD = re.compile(
    rb"(?:\xef\xbb\xbf)?" + _SPACE + rb"(\[|\{" + _SPACE + rb"(?:" + _PAIR + rb')*"data"'
    + _SPACE + rb":" + _SPACE + rb"\[)"
)  # fmt: skip


def elements(parts: Iterator[bytes], name: str, most: int) -> Iterator[bytes]:
    """The elements of the array in a text: the text is `[…]`, or an object with the array as its "data".

    The elements are not parsed. What follows the array in such an object is not read.

    Args:
        parts: the text. The part with the beginning must hold all of the object before the array.
        name: the name of the text, for messages.
        most: the largest number of bytes of an element.
    Raises:
        DataError: the text is neither, or the array does not end. LimitError: an element is too long.
    """
    head = next(parts, b"")
    begin = _HEAD.match(head)
    if begin is None:
        shown = brief(head.lstrip()[:40].decode(errors="replace"))
        raise DataError(f'{name}: begins with {shown}, expected an array, or an object with "data": an array')
    held, depth, in_string, escape, number = b"", 1, False, b"", 0
    part: bytes | None = head[begin.end() :]
    while part is not None:
        text = escape + part
        hidden = text.replace(b"\\\\", b"  ").replace(b'\\"', b"  ")  # an escaped quote does not end a string
        escape = b"\\" * hidden.endswith(b"\\")  # the next part has the escaped letter
        if escape:
            text, hidden = text[:-1], hidden[:-1]
        piece = np.frombuffer(hidden, np.uint8)
        inside = np.cumsum(piece == ord('"'), dtype=np.uint8) + np.uint8(in_string) & 1
        in_string = bool(inside[-1]) if len(inside) else in_string
        places = np.flatnonzero(_IS_MARK[piece] > inside)
        depths = depth + np.cumsum(_STEP[piece[places]], dtype=np.int64)
        depth = int(depths[-1]) if len(depths) else depth
        ends = places[(depths == 0) | ((depths == 1) & (piece[places] == ord(",")))].tolist()
        last = int(places[np.argmin(depths > 0)]) if (depths <= 0).any() else None
        start = 0
        for end in ends:
            if last is not None and end > last:
                break
            element, held, start = held + text[start:end], b"", end + 1
            number += 1
            if element.strip() or end != last or number > 1:
                yield element
        if last is not None:
            return
        held += text[start:]
        if len(held) > most:
            raise LimitError(f"{name}, row {number + 1}: more than {most:,} bytes, the limit for a row")
        part = next(parts, None)
    raise DataError(f"{name}: the array does not end")
