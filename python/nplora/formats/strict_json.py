"""JSON as RFC 8259 and serde_json have it, for text that nobody vouches for.

Python's own parser takes NaN, duplicate keys, lone surrogates and any depth; the readers must not.
"""

import json
import math
import re
from collections import Counter
from typing import Any, NoReturn

import numpy as np

from nplora.formats.errors import FormatError, LimitError, brief

MAX_DEPTH = 64
_MAX_DIGITS = 100
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)  # the "?" keeps an endless string linear
_STEP = np.zeros(256, np.int8)
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1
_ALL_BUT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def loads(raw: bytes, source: str) -> Any:
    """The value of UTF-8 JSON text. Objects keep their order.

    Args:
        source: what the messages call the text, usually the file's path.
    Raises:
        FormatError: not UTF-8, not JSON, a duplicate key, NaN, 1e999, half a surrogate pair.
        LimitError: nested deeper than 64, or a number of more than 100 characters.
    """
    _check_depth(raw, source)

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
        text = raw.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=unique, parse_constant=constant, parse_int=integer, parse_float=real
        )
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # finds half a surrogate pair
    except UnicodeDecodeError as error:
        raise FormatError(f"{source}: not UTF-8 at byte {error.start:,} of the JSON text") from error
    except UnicodeEncodeError as error:
        raise FormatError(f"{source}: a string holds half a surrogate pair") from error
    except json.JSONDecodeError as error:
        raise FormatError(f"{source}: not JSON at character {error.pos:,}: {error.msg}") from error
    return value


def _check_depth(raw: bytes, source: str) -> None:
    """Measure the nesting without recursion: drop the strings, keep the brackets, add them up."""
    brackets = _STRING.sub(b"", raw).translate(None, _ALL_BUT_BRACKETS)
    steps = _STEP[np.frombuffer(brackets, np.uint8)]
    depth = int(np.cumsum(steps, dtype=np.int64).max(initial=0))
    if depth > MAX_DEPTH:
        raise LimitError(f"{source}: JSON nested {depth:,} deep, at most {MAX_DEPTH} is read")
