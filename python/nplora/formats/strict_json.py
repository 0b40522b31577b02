"""JSON as RFC 8259 and serde_json have it, for text that nobody vouches for.

Python's own parser takes NaN, duplicate keys, lone surrogates and any depth; the readers must not.
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
MAX_VALUES = 1 << 19  # of one text: as Python's objects they take up to 200 MB
_MAX_DIGITS = 100
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_PIECE = 1 << 18  # bytes that are measured together
_STEP, _IS_MARK = np.zeros(256, np.int8), np.zeros(256, np.uint8)
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1
_IS_MARK[list(b"[{]},")] = 1

Bytes = bytes | memoryview
Array = npt.NDArray[Any]


def loads(raw: Bytes, source: str, most: int | Sequence[int] = MAX_VALUES) -> Any:
    """The value of UTF-8 JSON text. Objects keep their order.

    Args:
        source: what the messages call the text, usually the file's path.
        most: how many values are read. A sequence: how many at each depth, those of the outermost array or
            object first, and the last number for all that is deeper. They are counted before any is made.
    Raises:
        FormatError: not UTF-8, not JSON, a duplicate key, NaN, 1e999, half a surrogate pair.
        LimitError: nested deeper than 64, more values than are read, or a number of more than 100 characters.
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
        return -0.0 if text == "-0" else int(text)  # as serde_json: no integer is -0

    def real(text: str) -> float:
        short(text)
        value = float(text)
        if math.isinf(value):
            raise FormatError(f"{source}: the number {text} is beyond float64")
        return value

    def short(text: str) -> None:
        if len(text) > _MAX_DIGITS:
            raise LimitError(f"{source}: a number of {len(text):,} characters, at most {_MAX_DIGITS}")

    try:
        text = str(raw, "utf-8")
        value = json.loads(
            text, object_pairs_hook=unique, parse_constant=constant, parse_int=integer, parse_float=real
        )
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # finds half a surrogate pair
    except UnicodeDecodeError as error:
        raise FormatError(f"{source}: not UTF-8 at byte {error.start:,} of the JSON text") from error
    except UnicodeEncodeError as error:
        raise FormatError(f"{source}: a string holds half a surrogate pair") from error
    except json.JSONDecodeError as error:
        raise FormatError(f"{source}: not JSON at character {error.pos:,}: {error.msg}") from error
    return value


def require_size(raw: Bytes, source: str, most: int | Sequence[int]) -> None:
    """Count the values of a text and measure its nesting, without making any of them. Raises as `loads`."""
    short = isinstance(raw, bytes) and isinstance(most, int) and len(raw) <= most
    if short and bytes(raw).count(b"[") + bytes(raw).count(b"{") <= MAX_DEPTH:  # nothing can be over a limit
        return
    deepest, counts = _measured(raw)
    if deepest > MAX_DEPTH:
        raise LimitError(f"{source}: JSON nested {deepest:,} deep, at most {MAX_DEPTH} is read")
    if isinstance(most, int):
        found = [("", int(counts.sum()), most)]
    else:
        depths = range(1, len(most) + 1)
        counts[len(most)] = counts[len(most) :].sum()
        found = [(f" at depth {depth}", int(counts[depth]), most[depth - 1]) for depth in depths]
    for where, count, limit in found:
        if count > limit:
            raise LimitError(f"{source}: {count:,} values{where}, at most {limit:,} are read")


def _measured(raw: Bytes) -> tuple[int, Array]:
    """How deep the text nests, and how many values it has at each depth.

    Each opening bracket and each comma counts as a value. So an empty array counts as if it held one.
    """
    counts, deepest, depth = np.zeros(MAX_DEPTH + 2, np.int64), 0, 0
    in_string, rest = False, b""
    for begin in range(0, len(raw), _PIECE):
        text = rest + bytes(raw[begin : begin + _PIECE])
        if b"\\" in text:  # what a backslash escapes ends no string
            text = text.replace(b"\\\\", b"  ").replace(b'\\"', b"  ")
        rest = b"\\" * text.endswith(b"\\")
        piece = np.frombuffer(text, np.uint8)
        inside = np.cumsum(piece == ord('"'), dtype=np.uint8) + np.uint8(in_string) & 1
        in_string = bool(inside[-1])
        marks = piece[_IS_MARK[piece] > inside]
        depths = depth + np.cumsum(_STEP[marks], dtype=np.int64)
        depth = int(depths[-1]) if len(depths) else depth
        deepest = max(deepest, int(depths.max(initial=0)))
        begun = depths[_STEP[marks] >= 0].clip(0, MAX_DEPTH + 1)
        counts += np.bincount(begun, minlength=MAX_DEPTH + 2)
    return deepest, counts
