"""The elements of a JSON array that is too large to be parsed as a whole."""

import itertools
import json
import re
from collections.abc import Iterator

import numpy as np

from nplora.formats.errors import DataError, LimitError, brief
from nplora.formats.strict_json import Marks

_SPACE = re.compile(r"[ \t\r\n]*")
_HEAD = 1 << 20  # the array must begin within this number of bytes
_NEXT = json.JSONDecoder()


def elements(parts: Iterator[bytes], name: str, most: int) -> Iterator[bytes]:
    """Yield the elements of an array in a JSON text. The text is an array, or an object whose "data" is an
    array.

    The elements are not parsed. If the text is an object, its members after "data" are not parsed either.

    Args:
        parts: consecutive parts of the text. The array must begin within the first megabyte of the text.
        name: the name of the text, for messages.
        most: the largest number of bytes that an element may have.
    Raises:
        DataError: the text is neither an array nor an object with an array; the array or the object does not
            end; or more text follows the array or the object.
        LimitError: an element is too long.
    """
    joined = bytearray()
    while len(joined) < _HEAD and (more := next(parts, None)) is not None:
        joined += more
    head = bytes(joined)
    begin, is_object = _begin(head, name)
    held, marks, number = b"", Marks(depth=1), 0
    part: bytes | None = head[begin:]
    while part is not None:
        text, places, depths = marks.find(part)
        is_comma = np.frombuffer(text, np.uint8)[places] == ord(",")
        ends = places[(depths == 0) | ((depths == 1) & is_comma)].tolist()
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
            rest: Iterator[bytes] = itertools.chain([text[last + 1 :]], parts)
            if is_object:
                rest = _after_object(rest, name)
            _require_blank(rest, name, "the object" if is_object else "the array")
            return
        held += text[start:]
        if len(held) > most:
            raise LimitError(f"{name}, row {number + 1}: the row has more than {most:,} bytes")
        part = next(parts, None)
    raise DataError(f"{name}: the array does not end")


def _after_object(rest: Iterator[bytes], name: str) -> Iterator[bytes]:
    """Read the rest of an object after its array has ended."""
    marks, is_begun = Marks(depth=1), False
    for part in rest:
        text, places, depths = marks.find(part)
        if not is_begun and (found := text.lstrip()):
            if found[:1] not in (b",", b"}"):
                raise _follows(found, name, "the array")
            is_begun = True
        ends = places[depths == 0]
        if len(ends) and text[ends[0] : ends[0] + 1] != b"}":
            break
        if len(ends):
            return itertools.chain([text[int(ends[0]) + 1 :]], rest)
    raise DataError(f"{name}: the object does not end")


def _require_blank(rest: Iterator[bytes], name: str, before: str) -> None:
    """Check that the rest of a text is white space."""
    for part in rest:
        if part.strip():
            raise _follows(part, name, before)


def _follows(text: bytes, name: str, before: str) -> DataError:
    return DataError(f"{name}: {brief(text.strip()[:40].decode(errors='replace'))} follows {before}")


def _begin(head: bytes, name: str) -> tuple[int, bool]:
    """Return the position in `head` after the "[" of the array, and whether the array is in an object."""
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
        lines = "; if each line is an object, the file's name must end in .jsonl" * is_object
        raise DataError(
            f'{name}: begins with {shown}, expected an array, or an object with an array as its "data"{lines}'
        )
    return before + len(text[: place + 1].encode("utf-8", "surrogateescape")), is_object


def _skip(text: str, place: int) -> int:
    """Return the position of the first character at or after `place` that is not white space."""
    found = _SPACE.match(text, place)
    return found.end() if found else place
