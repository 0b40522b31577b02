"""A model's config.json: reads its fields and checks their types."""

from __future__ import annotations

from collections.abc import ItemsView, Mapping
from pathlib import Path
from typing import Any, NoReturn

from nplora.formats import files, strict_json
from nplora.formats.errors import FormatError, brief, nearest_names
from nplora.formats.files import StrPath

MAX_CONFIG = 16 << 20


class Fields:
    """The fields of a JSON object. Only `integer_or_null` distinguishes null from a missing field.

    The methods raise FormatError if a field has the wrong type, or is missing and has no default.
    """

    def __init__(self, source: str, values: Mapping[str, Any]) -> None:
        self.source, self._values = source, values

    def items(self) -> ItemsView[str, Any]:
        """The names and values of all fields, without a check of their types."""
        return self._values.items()

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if type(value) is not int:
            self._refuse(name, "an integer")
        return value

    def integer_or_null(self, name: str, default: int | None) -> int | None:
        """Return an integer, or None if the field is null, or `default` if the field is missing."""
        return self.integer(name) if name in self else None if name in self._values else default

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if type(value) is not int and type(value) is not float:
            self._refuse(name, "a number")
        return float(value)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        value = self._get(name, default)
        if type(value) is not bool:
            self._refuse(name, "true or false")
        return value

    def string(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if type(value) is not str:
            self._refuse(name, "text")
        return value

    def strings(self, name: str, count: int) -> list[str]:
        return self._list(name, count, (str,), f"a list of {count} texts")

    def integers(self, name: str, count: int) -> list[int]:
        return self._list(name, count, (int,), f"a list of {count} integers")

    def numbers(self, name: str, count: int) -> list[float]:
        return [float(item) for item in self._list(name, count, (int, float), f"a list of {count} numbers")]

    def _list(self, name: str, count: int, kinds: tuple[type, ...], expected: str) -> list[Any]:
        value = self._get(name, None)
        if (
            not isinstance(value, list)
            or len(value) != count
            or any(type(item) not in kinds for item in value)
        ):
            self._refuse(name, expected)
        return value

    def object(self, name: str) -> Fields:
        """Return the object in a field or, if the field is missing, an object without fields."""
        value = self._get(name, {})
        if not isinstance(value, dict):
            self._refuse(name, "an object")
        return Fields(f"{self.source}: {name}", value)

    def _get(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        return default if value is None else value

    def _refuse(self, name: str, expected: str) -> NoReturn:
        if name not in self:
            near = ", ".join(map(repr, nearest_names(name, (key for key in self._values if key in self))))
            hint = f"; the nearest names: {near}" if near else ""
            raise FormatError(f"{self.source}: {name} is missing, expected {expected}{hint}")
        raise FormatError(f"{self.source}: {name} is {brief(self._values[name])}, expected {expected}")


def read_fields(path: StrPath) -> Fields:
    """Read a JSON file that holds one object.

    Raises:
        FormatError: the file is not JSON, or its top-level value is not an object.
        OSError: the file cannot be read.
    """
    source = files.name(path)
    values = strict_json.loads(bytes(files.read(Path(path), MAX_CONFIG)), source)
    if not isinstance(values, dict):
        raise FormatError(f"{source}: {brief(values)}, expected an object")
    return Fields(source, values)
