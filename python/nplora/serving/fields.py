"""Fields: reads and checks the fields of a request's JSON object."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from nplora import _check
from nplora.formats.errors import brief
from nplora.serving.request_error import RequestError


class Fields:
    """The fields of a JSON object. A field that is null counts as missing.

    Args:
        values: the object.
        inside: the prefix of the fields' names in error messages, such as "messages[0].".
    """

    def __init__(self, values: object, inside: str = "") -> None:
        if not isinstance(values, Mapping):
            name = inside.rstrip(".") or "the body"
            raise wrong(name, values, "an object", inside.rstrip(".") or None)
        self.values, self._inside = values, inside

    def name(self, field: str) -> str:
        """The full name of a field."""
        return self._inside + field

    def has(self, field: str) -> bool:
        return self.values.get(field) is not None

    def get(self, field: str) -> Any:
        return self.values.get(field)

    def required(self, field: str) -> Any:
        if not self.has(field):
            name = self.name(field)
            raise RequestError(f"{name} is missing", param=name, code="missing_required_parameter")
        return self.values[field]

    def require_known(self, known: Collection[str], unsupported: Mapping[str, Collection[Any]]) -> None:
        """Raise a RequestError if a field is unknown, or if its value is not supported.

        Args:
            unsupported: a dict {field that the server does not implement: accepted values}. These values are
                accepted because they do not change the answer.
        """
        for field, value in self.values.items():
            if field in unsupported:
                if value is not None and not any(_same(value, one) for one in unsupported[field]):
                    raise RequestError(
                        f"{self.name(field)} is not supported by this server",
                        param=self.name(field),
                        code="unsupported_parameter",
                    )
            elif field not in known:
                near = _check.suggestion(str(field), known)
                raise RequestError(
                    f"unrecognized field {brief(field)}{near}",
                    param=str(field)[:80],
                    code="unknown_parameter",
                )

    # ---- values by type ----

    def text(self, field: str, default: str | None = None, empty: bool = True) -> str | None:
        value = self.get(field)
        if value is None:
            return default
        return checked_text(self.name(field), value, empty)

    def boolean(self, field: str, default: bool = False) -> bool:
        value = self.get(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise wrong(self.name(field), value, "true or false")
        return value

    def integer(self, field: str, least: int, most: int | None = None) -> int | None:
        value = self.get(field)
        return None if value is None else checked_integer(self.name(field), value, least, most)

    def number(self, field: str, least: float, most: float = math.inf) -> float | None:
        value = self.get(field)
        return None if value is None else checked_number(self.name(field), value, least, most)

    def choice(self, field: str, words: Iterable[str], default: str | None = None) -> str | None:
        value = self.get(field)
        if value is None:
            return default
        allowed = list(words)
        if not isinstance(value, str) or value not in allowed:
            raise wrong(self.name(field), value, f"one of {', '.join(allowed)}")
        return value

    def object(self, field: str) -> Fields | None:
        value = self.get(field)
        return None if value is None else Fields(value, f"{self.name(field)}.")

    def objects(self, field: str, most: int) -> list[Fields]:
        """Return the objects in a field whose value is a list; an empty list if the field is missing."""
        value = self.get(field)
        if value is None:
            return []
        items = checked_list(self.name(field), value, most)
        return [Fields(item, f"{self.name(field)}[{index}].") for index, item in enumerate(items)]


def wrong(name: str, value: object, expected: str, param: str | None = None) -> RequestError:
    """The error for a value that has a wrong type or is out of range."""
    return RequestError(
        f"{name} is {brief(value)}, expected {expected}", param=param or name, code="invalid_value"
    )


def checked_text(name: str, value: object, empty: bool = True) -> str:
    if not isinstance(value, str) or not (value or empty):
        raise wrong(name, value, "a text" if empty else "a text that is not empty")
    return value


def checked_integer(name: str, value: object, least: int, most: int | None = None) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong(name, value, "an integer")
    if value < least or (most is not None and value > most):
        raise wrong(name, value, f"at least {least}" if most is None else f"{least} to {most}")
    return value


def checked_number(name: str, value: object, least: float, most: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(name, value, "a number")
    if not least <= value <= most or math.isinf(value):
        raise wrong(name, value, f"at least {least:g}" if math.isinf(most) else f"{least:g} to {most:g}")
    return float(value)


def checked_list(name: str, value: object, most: int) -> list[Any]:
    if not isinstance(value, list):
        raise wrong(name, value, "a list")
    if len(value) > most:
        raise RequestError(
            f"{name} has {len(value):,} items, expected at most {most:,}",
            param=name,
            code="invalid_value",
        )
    return value


def _same(value: object, one: object) -> bool:
    return type(value) is type(one) and value == one
