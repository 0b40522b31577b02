"""Fields: a class that reads the fields of a row, and checks the types of the values."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

from nplora.finetuning.data.examples import Objects
from nplora.formats import strict_json
from nplora.formats.errors import DataError, brief

CONTEXT = ("tools", "documents")  # fields of a row that the chat template gets besides the messages


class _Noted(Mapping[str, Any]):
    """A mapping that records which of its keys were looked up."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.raw, self.asked = values, set[str]()

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return self.raw[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.raw)

    def __len__(self) -> int:
        return len(self.raw)


class Fields:
    """Reads the fields of a row, and checks their types. A field that is null counts as missing.

    A field counts as used after its value has been looked up; see `unread`.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = _Noted(values), where

    def unread(self) -> dict[str, Any]:
        """The fields whose values were not looked up. Empty fields, tools and documents are left out."""
        known = self.values.asked.union(CONTEXT)
        return {k: v for k, v in self.values.raw.items() if k not in known and not _is_empty(v)}

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def get(self, name: str) -> Any:
        """The value of a required field."""
        if name not in self.values:
            raise self.error(f"{name} is missing; the row has {brief(list(self.values))}; {renaming(name)}")
        return self.values[name]

    def unpacked(self, name: str) -> Any:
        """The value of a required field that holds a list or an object, which may be given as JSON text."""
        value = self.get(name)
        if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
            with contextlib.suppress(ValueError):
                return loads(value)
        return value

    def text(self, name: str, may_be_empty: bool = False, default: str | None = None) -> str:
        if default is not None and not self.has(name):
            return default
        value = self.get(name)
        if not isinstance(value, str):
            raise self.error(f"{name} is {brief(value)}, expected a string")
        if not value.strip() and not may_be_empty:
            raise self.error(f"{name} is empty, expected a text")
        return value

    def objects(self, name: str) -> Objects | None:
        """A list of objects, which may be given as JSON text; None if the field is missing."""
        value = self.values.get(name)
        if isinstance(value, str):
            value = self._json(name, value) if value.strip() else None
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.error(f"{name} is {brief(value)}, expected a list of objects")
        return value

    def _json(self, name: str, text: str) -> Any:
        try:
            return loads(text)
        except ValueError:
            raise self.error(
                f"{name} is {brief(text)}, expected a list of objects, or such a list as JSON"
            ) from None

    def part(self, words: str) -> Fields:
        """Return a copy whose error messages also name a part of the row, such as "message 2"."""
        part = copy.copy(self)
        part.where = f"{self.where}, {words}"
        return part

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.where}: {problem}")


def renaming(ours: str, theirs: str | None = None) -> str:
    """The end of an error message: the option with which the field `theirs` is read as the field `ours`."""
    name = theirs or "NAME"
    return f"--columns {ours}={name} (columns={{{ours!r}: {name!r}}}) reads the field {name!r} as {ours}"


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def loads(text: str) -> Any:
    """Parse a text of a row as JSON, with the strict rules for JSON files.

    Raises:
        ValueError: the text is not JSON, or exceeds a limit.
    """
    return strict_json.loads(text.encode("utf-8"), "JSON")
