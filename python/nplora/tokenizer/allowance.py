"""The allowance of a chat template: bytes that it may handle, and what each operation takes of them.

    a line of the template's compiled code      one node; calls and filters some more
    what an operation makes                     its nodes, or the length of a text
    what an operation takes                     the same; where it looks through all of it, to compare or to
                                                write it, what is shared counts each time it is met

Operations that make large things of small ones (`*`, `%`, replace, join, split, indent) are charged for what
they will make.
"""

from __future__ import annotations

import json
import re
import sys
from types import FrameType
from typing import Any, NoReturn

from nplora.formats.errors import UnsafeError, brief

ALLOWANCE = 1 << 23
ALLOWANCE_PER_BYTE = 64  # of the messages
FILE = "<chat template>"  # the compiled code's name
NODE = 64  # bytes: about what Python's smallest objects take
CALL = 16 * NODE  # what a call takes in time, beside its arguments
_MAX_BITS = 4096  # of an integer
_MAX_WIDTH = 1000  # that a filter may be asked to fill
_MAX_PLACE = 2000  # that a number takes in a format of three digits: 999 of them, and those before the point
_MAX_ESCAPE = 8  # bytes that a byte becomes where a text is quoted
_WIDENING = frozenset(["indent", "round", "tojson"])  # filters whose integers are widths
_WIDE_FORMAT = re.compile(r"\d{4}|\*")


class ExhaustedError(UnsafeError):
    """A rendering took more than its allowance; one of another chat may not."""


class ExcessError(Exception):
    """An operation that is not even tried."""


class Meter:
    """How much a rendering may still handle."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.allow(0)

    def allow(self, amount: int) -> None:
        self.left = self.allowed = amount

    def charge(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            self.exceeded()

    def exceeded(self) -> NoReturn:
        raise ExhaustedError(
            f"{self.source}: the chat template takes more than the {self.allowed:,} bytes of work it may"
        )

    def weigh(self, *values: Any) -> int:
        """The nodes of values and the bytes of their texts; what is shared counts each time it is met."""
        total, waiting = 0, list(values)
        while waiting:
            value = waiting.pop()
            total += NODE
            if isinstance(value, str):
                total += nbytes(value)
            elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
                raise UnsafeError(
                    f"{self.source}: the chat template makes an integer of over {_MAX_BITS} bits"
                )
            parts = _parts(value)
            if total + NODE * (len(waiting) + len(parts)) > self.left:
                self.exceeded()
            waiting.extend(parts)
            waiting.extend(parts.values() if isinstance(parts, dict) else ())
        return total

    def size(self, value: Any) -> int:
        """The value's own bytes."""
        if isinstance(value, str):
            return NODE + nbytes(value)
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise ExcessError(f"an integer of over {_MAX_BITS} bits")
        return NODE + NODE * len(_parts(value))

    def pay(self, *values: Any, deep: bool) -> None:
        """Charge for values that are about to be used."""
        self.charge(self.weigh(*values) if deep else sum(map(self.size, values)))

    def paid(self, value: Any) -> Any:
        """A value that was just made, charged for."""
        self.charge(self.size(value))
        return value

    def written(self, value: Any) -> Any:
        """A value that is about to be written, charged for."""
        self.charge(self.weigh(value))
        return value


_CONTAINERS: tuple[Any, ...] = (
    dict,
    list,
    tuple,
    range,
    type({}.keys()),
    type({}.values()),
    type({}.items()),
)


def _parts(value: Any) -> Any:
    """What the texts of a value are made of, beside its own."""
    if type(value).__name__ == "Namespace":
        return object.__getattribute__(value, "_Namespace__attrs")
    return value if isinstance(value, _CONTAINERS) else ()


def nbytes(text: str) -> int:
    return len(text) if text.isascii() else 4 * len(text)


class Traced:
    """While entered, every line of compiled templates is charged for."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._on_call)

    def __exit__(self, *exception: object) -> None:
        sys.settrace(self._before)

    def _on_call(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._on_line if frame.f_code.co_filename == FILE else None

    def _on_line(self, frame: FrameType, event: str, argument: Any) -> Any:
        self._meter.charge(NODE)
        return self._on_line


def amplified(meter: Meter, name: str, *operands: Any, **named: Any) -> int:
    """The bytes that an operation makes beyond those of its operands."""
    left, right = operands[0], operands[1] if len(operands) > 1 else None
    if name == "*":
        for size, value in ((left, right), (right, left)):
            if isinstance(size, int) and isinstance(value, str | list | tuple):
                return max(0, size) * (nbytes(value) if isinstance(value, str) else NODE * len(value))
    elif name == "**" and isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * max(0, right)
    elif (name == "%" and isinstance(left, str)) or name == "format":
        return _formatted(meter, str(left), *operands[1:], *named.values())
    elif name == "replace" and len(operands) > 2:
        return str(left).count(str(right)) * nbytes(str(operands[2]))
    elif name == "join":
        separator, items = (left, right) if isinstance(left, str) and right is not None else (right, left)
        return nbytes(str(separator or "")) * (len(items) if hasattr(items, "__len__") else 0)
    elif name in ("split", "rsplit", "splitlines", "list") and isinstance(left, str):
        return NODE * (left.count(right) + 1 if isinstance(right, str) and right else len(left))
    elif name in _WIDENING:
        widths = [value for value in (*operands[1:], *named.values()) if type(value) is int]
        if max(widths, default=0) > _MAX_WIDTH:
            raise ExcessError(f"{name} of {max(widths)}, at most {_MAX_WIDTH}")
        return max(widths, default=0) * len(json.dumps(left, default=str)) if name != "round" else 0
    return 0


def _formatted(meter: Meter, text: str, *values: Any) -> int:
    """What a format makes: each of its places as wide as it may be, and every value in each by name."""
    if _WIDE_FORMAT.search(text):
        raise ExcessError(f"the format {brief(text)}, widths may have three digits")
    places = text.count("%")
    return places * _MAX_PLACE + (places if "%(" in text else 1) * _MAX_ESCAPE * meter.weigh(*values)
