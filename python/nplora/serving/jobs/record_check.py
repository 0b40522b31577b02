"""Checks the records of files and jobs, which a server reads from JSON files when it starts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from nplora.formats.errors import FormatError, brief

SCHEMA = 1  # the version of the records' form

Check = Callable[[object], bool]


def _is(*kinds: type) -> Check:
    return lambda value: isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _texts(value: object) -> bool:
    """Whether a value is an object whose values are texts."""
    return isinstance(value, Mapping) and all(isinstance(one, str) for one in value.values())


def _file_names(value: object) -> bool:
    """Whether a value is an object whose values are plain file names, without a path."""
    return _texts(value) and all(map(_is_file_name, value.values()))  # type: ignore[attr-defined]


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[a-z]+(\.[a-z0-9]+)*", value) is not None


def _checkpoints(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) and _fits(one, _CHECKPOINT) for one in value)


def _fits(record: Mapping[str, Any], fields: Mapping[str, Check]) -> bool:
    return _wrong(record, fields) is None


def _wrong(record: Mapping[str, Any], fields: Mapping[str, Check]) -> str | None:
    """The name of the first field that is missing or wrong; None if all fields are right."""
    return next(
        (name for name, check in fields.items() if name not in record or not check(record[name])), None
    )


_TEXT, _INTEGER, _OBJECT = _is(str), _is(int), _is(dict)
_NUMBER = _is(int, float)
_CHECKPOINT = {
    "id": _TEXT, "created_at": _INTEGER, "step": _INTEGER, "name": _TEXT,
    "train_loss": _or_none(_NUMBER), "valid_loss": _or_none(_NUMBER),
}  # fmt: skip
FILE: Mapping[str, Check] = {
    "id": _TEXT, "serial": _INTEGER, "bytes": _INTEGER, "created_at": _INTEGER, "filename": _TEXT,
    "purpose": _TEXT, "content": _is_file_name,
}  # fmt: skip
JOB: Mapping[str, Check] = {
    "id": _TEXT, "serial": _INTEGER, "created_at": _INTEGER, "status": _TEXT, "model": _TEXT, "name": _TEXT,
    "suffix": _or_none(_TEXT), "training_file": _TEXT, "validation_file": _or_none(_TEXT),
    "filenames": _texts, "seed": _INTEGER, "metadata": _or_none(_texts), "method": _TEXT,
    "hyperparameters": _OBJECT, "options": _OBJECT, "multiplier": _or_none(_NUMBER), "resolved": _OBJECT,
    "checkpoints": _checkpoints, "result_files": _is(list), "error": _or_none(_OBJECT),
    "finished_at": _or_none(_INTEGER), "fine_tuned_model": _or_none(_TEXT),
    "trained_tokens": _or_none(_INTEGER), "data": _file_names,
}  # fmt: skip


def require_record(path: str, record: object, id_: str, fields: Mapping[str, Check]) -> dict[str, Any]:
    """Check that a record has the id `id_` and the given fields; return the record.

    Raises:
        FormatError: the record has the wrong id or schema version, or a field is missing or wrong.
    """
    if not isinstance(record, dict) or record.get("id") != id_:
        raise FormatError(f"{path}: not a record with the id {id_}")
    if record.get("schema") != SCHEMA:
        raise FormatError(f"{path}: schema is {brief(record.get('schema'))}, expected {SCHEMA}")
    if (name := _wrong(record, fields)) is not None:
        raise FormatError(f"{path}: the field {name} is missing or wrong: {brief(record.get(name))}")
    return record
