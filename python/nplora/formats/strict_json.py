"""Parses untrusted JSON text as strictly as RFC 8259 and serde_json, and prepares values for writing.

Unlike Python's own parser, this parser refuses NaN, duplicate keys, lone surrogates and deep nesting.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from nplora.formats.errors import FormatError, LimitError, brief

MAX_DEPTH = 64
MAX_VALUES = 1 << 19  # in one text; as Python objects, this many values take up to 200 MB
_MAX_DIGITS = 100
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_PIECE = 1 << 18  # bytes of text that are measured at a time
_STEP, _IS_MARK = np.zeros(256, np.int8), np.zeros(256, np.uint8)
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1
_IS_MARK[list(b"[{]},")] = 1

Bytes = bytes | memoryview
Array = npt.NDArray[Any]


def loads(raw: Bytes, source: str, most: int | Sequence[int] = MAX_VALUES) -> Any:
    """Parse UTF-8 JSON text. Each object keeps the order of its keys.

    Args:
        source: the text's name in error messages, usually the file's path.
        most: the maximum number of values in the text. `most` may also be a sequence with one
            maximum for each nesting depth, the outermost first. The last maximum limits the total of its
            depth and all deeper depths. Values are counted before any object is created.
    Raises:
        FormatError: the text is not UTF-8 or not JSON, or has a duplicate key, NaN, half a surrogate pair
            or a number beyond the range of float64.
        LimitError: the text is nested more than 64 deep, has too many values, or has a number with more than
            100 characters.
    """
    require_size(raw, source, most)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise FormatError(f"{source}: the name {brief(twice)} appears twice")
        return result

    def constant(text: str) -> NoReturn:
        raise FormatError(f"{source}: {text} is not JSON")

    def integer(text: str) -> int | float:
        short(text)
        return -0.0 if text == "-0" else int(text)  # -0 is a float, as in serde_json: no integer is -0

    def real(text: str) -> float:
        short(text)
        value = float(text)
        if math.isinf(value):
            raise FormatError(f"{source}: the number {text} is beyond the range of float64")
        return value

    def short(text: str) -> None:
        if len(text) > _MAX_DIGITS:
            raise LimitError(
                f"{source}: a number has {len(text):,} characters, expected at most {_MAX_DIGITS}"
            )

    try:
        text = str(raw, "utf-8")
        value = json.loads(
            text, object_pairs_hook=unique, parse_constant=constant, parse_int=integer, parse_float=real
        )
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # fails on half a surrogate pair
    except UnicodeDecodeError as error:
        raise FormatError(f"{source}: not UTF-8 at byte {error.start:,} of the JSON text") from error
    except UnicodeEncodeError as error:
        raise FormatError(f"{source}: a string holds half a surrogate pair") from error
    except json.JSONDecodeError as error:
        raise FormatError(f"{source}: not JSON at character {error.pos:,}: {error.msg}") from error
    return value


def require_size(raw: Bytes, source: str, most: int | Sequence[int]) -> None:
    """Check a text's number of values and nesting depth without creating objects. Raises LimitError."""
    short = isinstance(raw, bytes) and isinstance(most, int) and len(raw) <= most
    if short and bytes(raw).count(b"[") + bytes(raw).count(b"{") <= MAX_DEPTH:  # no limit can be exceeded
        return
    deepest, counts = _measured(raw)
    if deepest > MAX_DEPTH:
        raise LimitError(f"{source}: JSON nested {deepest:,} deep, expected at most {MAX_DEPTH}")
    if isinstance(most, int):
        found = [("", int(counts.sum()), most)]
    else:
        depths = range(1, len(most) + 1)
        counts[len(most)] = counts[len(most) :].sum()
        found = [(f" at depth {depth}", int(counts[depth]), most[depth - 1]) for depth in depths]
    for where, count, limit in found:
        if count > limit:
            raise LimitError(f"{source}: {count:,} values{where}, expected at most {limit:,}")


def _measured(raw: Bytes) -> tuple[int, Array]:
    """The text's nesting depth, and its number of values at each depth.

    The function counts opening brackets and commas instead of values. So an empty array counts as one value.
    """
    counts, deepest, marks = np.zeros(MAX_DEPTH + 2, np.int64), 0, Marks()
    for begin in range(0, len(raw), _PIECE):
        text, places, depths = marks.find(bytes(raw[begin : begin + _PIECE]))
        deepest = max(deepest, int(depths.max(initial=0)))
        is_begin = _STEP[np.frombuffer(text, np.uint8)[places]] >= 0
        shallow = depths[is_begin].clip(0, MAX_DEPTH + 1).astype(np.intp, copy=False)
        counts += np.bincount(shallow, minlength=MAX_DEPTH + 2)
    return deepest, counts


def json_values(value: Any) -> Any:
    """Return a copy of a value in which None replaces NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {name: json_values(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Marks:
    """Finds the marks (brackets and commas outside strings) of a JSON text that is read part by part.

    Attributes:
        depth: the nesting depth at the end of the part that was read last.
    """

    def __init__(self, depth: int = 0) -> None:
        self.depth = depth
        self._in_string, self._rest = False, b""

    def find(self, part: bytes) -> tuple[bytes, Array, Array]:
        """Find the marks of the next part.

        Returns: a tuple of the part, the positions of the marks in the part, and the nesting depth after each
            mark. If the part ends with a backslash that begins an escape, this backslash is moved to the next
            part.
        """
        text = self._rest + part
        hidden = text
        if b"\\" in text:  # an escaped quote does not end a string
            hidden = text.replace(b"\\\\", b"  ").replace(b'\\"', b"  ")
        self._rest = b"\\" * hidden.endswith(b"\\")
        if self._rest:
            text, hidden = text[:-1], hidden[:-1]
        piece = np.frombuffer(hidden, np.uint8)
        inside = np.cumsum(piece == ord('"'), dtype=np.uint8) + np.uint8(self._in_string) & 1
        self._in_string = bool(inside[-1]) if len(inside) else self._in_string
        places = np.flatnonzero(_IS_MARK[piece] > inside)
        depths = self.depth + np.cumsum(_STEP[piece[places]], dtype=np.int64)
        self.depth = int(depths[-1]) if len(depths) else self.depth
        return text, places, depths
