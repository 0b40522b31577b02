"""The elements of a JSON array that is too large to be parsed as a whole."""

import itertools
import json
import re
from collections.abc import Iterator

import numpy as np

from nplora.formats.errors import DataError, LimitError, brief

_IS_MARK, _STEP = np.zeros(256, np.uint8), np.zeros(256, np.int8)
_IS_MARK[list(b"[{]},")] = 1
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1
_SPACE = re.compile(r"[ \t\r\n]*")
_HEAD = 1 << 20  # bytes in which the array must begin
_NEXT = json.JSONDecoder()


def elements(parts: Iterator[bytes], name: str, most: int) -> Iterator[bytes]:
    """The elements of the array in a text: the text is `[…]`, or an object with the array as its "data".

    The elements are not parsed. What follows the array in such an object is not read.

    Args:
        parts: the text. The array must begin within the first megabyte.
        name: the name of the text, for messages.
        most: the largest number of bytes of an element.
    Raises:
        DataError: the text is neither an array nor such an object, the array does not end, or text follows
            it.
        LimitError: an element is too long.
    """
    joined = bytearray()
    while len(joined) < _HEAD and (more := next(parts, None)) is not None:
        joined += more
    head = bytes(joined)
    begin, is_object = _begin(head, name)
    held, depth, in_string, escape, number = b"", 1, False, b"", 0
    part: bytes | None = head[begin:]
    while part is not None:
        text = escape + part
        hidden = text.replace(b"\\\\", b"  ").replace(b'\\"', b"  ")  # an escaped quote does not end a string
        escape = b"\\" * hidden.endswith(b"\\")  # the letter that the backslash escapes is in the next part
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
            rest = itertools.chain([text[last + 1 :]], parts)
            if not is_object and (after := next((part for part in rest if part.strip()), None)):
                raise DataError(
                    f"{name}: {brief(after.strip()[:40].decode(errors='replace'))} follows the array"
                )
            return
        held += text[start:]
        if len(held) > most:
            raise LimitError(f"{name}, row {number + 1}: more than {most:,} bytes, the limit for a row")
        part = next(parts, None)
    raise DataError(f"{name}: the array does not end")


def _begin(head: bytes, name: str) -> tuple[int, bool]:
    """Where the first element begins, and whether the array is in an object."""
    text = head.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    before = len(head) - len(text.encode("utf-8", "surrogateescape"))
    place = _skip(text, 0)
    is_object = text[place : place + 1] == "{"
    if is_object:
        place = _skip(text, place + 1)
        try:
            while True:
                key, place = _NEXT.raw_decode(text, place)
                place = _skip(text, place)
                if text[place : place + 1] != ":":
                    break
                place = _skip(text, place + 1)
                if key == "data":
                    break
                _, place = _NEXT.raw_decode(text, place)
                place = _skip(text, place)
                if text[place : place + 1] != ",":
                    break
                place = _skip(text, place + 1)
        except (ValueError, RecursionError):
            place = len(text)
    if text[place : place + 1] != "[":
        shown = brief(text.lstrip()[:40].encode("utf-8", "surrogateescape").decode(errors="replace"))
        raise DataError(f'{name}: begins with {shown}, expected an array, or an object with "data": an array')
    return before + len(text[: place + 1].encode("utf-8", "surrogateescape")), is_object


def _skip(text: str, place: int) -> int:
    """The place after white space."""
    found = _SPACE.match(text, place)
    return found.end() if found else place
