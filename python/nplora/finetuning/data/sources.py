"""Sources: the files or Python objects that provide the rows of a data set, each with a weight."""

from __future__ import annotations

import dataclasses
import errno
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from nplora import _check
from nplora.finetuning.data.rows import COMPRESSED, ENDS, SUFFIXES, Row, is_text, read_rows, suffix_of
from nplora.finetuning.data.tables import frame_rows, plain, without_nulls
from nplora.formats import files, model_directory
from nplora.formats.errors import DataError, LimitError, brief
from nplora.formats.files import StrPath

# A file; rows; or several files, perhaps each with a weight.
Data: TypeAlias = StrPath | Iterable[Any]

# Names of validation data. "test" is not among them, because validation data decide which adapter is saved.
_VALID = ("valid", "validation", "eval")
_VALID_FILES = ("valid", "validation")


@dataclass(frozen=True)
class Source:
    """A source of rows.

    Attributes:
        name: the name of the file, or "data" for Python objects.
        read: a function that reads the rows, and can be called several times.
        path: the path of the file; None for Python objects.
        weight: how many times an epoch contains each example. With a weight of 0.5, each epoch contains the
            same half of the examples.
        may_be_empty: whether the source may have no rows.
    """

    name: str
    read: Callable[[], Iterator[Row]]
    path: Path | None = None
    weight: float = 1.0
    may_be_empty: bool = False

    @property
    def is_text(self) -> bool:
        """Whether the source is a plain text, which has no rows."""
        return self.path is not None and is_text(self.path)


class Splits(NamedTuple):
    """The sources of the training data, and of the validation data (None if there are no such data)."""

    train: list[Source]
    valid: list[Source] | None


def splits_of(op: str, data: Data) -> Splits:
    """The training data in `data`, and the validation data if `data` is a directory or a mapping of splits.

    Raises:
        FileNotFoundError: there is no such file, or a directory has no train.*.
        TypeError, ValueError: `data` has the wrong type, a weight is not above 0, or there are no rows.
    """
    if isinstance(data, str | os.PathLike):
        files.require_named(op, data=data)
        return _splits_of_path(data)
    if isinstance(data, Mapping):
        return _splits_of_mapping(op, data)
    if frame_rows(data) is not None:
        return Splits([_objects(_Frame(data), is_table=True)], None)
    if isinstance(data, Iterable) and not isinstance(data, bytes):
        given = data if isinstance(data, Sequence) or hasattr(data, "column_names") else list(data)
        first = next(iter(given), None)
        if first is None:
            raise DataError(f"{op}: data is empty, expected rows")
        if not isinstance(first, Mapping):
            return _splits_of_paths(op, list(given))
        is_table = hasattr(given, "column_names")  # a dataset of Hugging Face
        return Splits([_objects(given, is_table)], None)
    hint = "; its method .collect() returns a data frame" if hasattr(type(data), "collect_schema") else ""
    wanted = "a path, paths, or rows such as a list of dictionaries or a data frame"
    raise TypeError(f"{op}: data is {_check.kind(data)}, expected {wanted}{hint}")


def sources_of(op: str, data: Data) -> list[Source]:
    """The sources to evaluate on.

    If `data` is a directory, these are the validation data, or the training data if there are no validation
    data. If `data` is a mapping of splits, the sources are those of the first split that exists, in this
    order: validation, test, training.

    Raises the same errors as `splits_of`.
    """
    if isinstance(data, str | os.PathLike) and os.fspath(data) and Path(data).is_dir():
        return [_file(find_evaluated(data))]
    if isinstance(data, Mapping):
        return splits_of(op, _split_named(op, data, *_VALID, "test", "train")).train
    splits = splits_of(op, data)
    return splits.valid or splits.train


def _splits_of_path(path: StrPath) -> Splits:
    train, valid = find_splits(path)
    return Splits([_file(train)], None if valid is None else [_file(valid)])


def _splits_of_paths(op: str, given: list[Any]) -> Splits:
    """Find the splits of a list of paths or of pairs (path, weight). The validation files of all directories
    in the list are joined."""
    pairs = [item if isinstance(item, tuple) and len(item) == 2 else (item, 1.0) for item in given]
    for path, weight in pairs:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(
                f"{op}: data contains {brief(path)}, expected paths, pairs (path, weight), or rows as "
                "dictionaries"
            )
        if isinstance(path, str) and suffix_of(path) not in SUFFIXES and not os.path.exists(path):
            hint = 'no such file; if this is a text to train on, expected a row {"text": …}'
            raise FileNotFoundError(errno.ENOENT, hint, brief(path))
        if _check.number(op, f"the weight of {files.name(path)}", weight) <= 0:
            raise ValueError(f"{op}: the weight of {files.name(path)} is {weight}, expected above 0")
    train, valid = list[Source](), list[Source]()
    for path, weight in pairs:
        found = _splits_of_path(path)
        train += [_weighted(source, weight) for source in found.train]
        valid += found.valid or []
    return Splits(train, valid or None)


def _weighted(source: Source, weight: float) -> Source:
    return Source(source.name, source.read, source.path, float(weight))


def _splits_of_mapping(op: str, data: Mapping[Any, Any]) -> Splits:
    """Find the splits in a dictionary from names of splits to data, such as Hugging Face's `DatasetDict`."""
    train = splits_of(op, _split_named(op, data, "train")).train
    name = next((name for name in _VALID if name in data), None)
    return Splits(train, None if name is None else splits_of(op, data[name]).train)


def _split_named(op: str, data: Mapping[Any, Any], *names: str) -> Any:
    """Find the first of `names` that is a key of the mapping, and return its split."""
    for name in names:
        if name in data:
            return data[name]
    wanted = " or ".join(map(repr, names))
    raise TypeError(
        f"{op}: data is a dictionary with the keys {brief(list(data))}, expected a split named {wanted}; "
        "rows must be in a list of dictionaries"
    )


def _file(path: Path) -> Source:
    return Source(files.name(path), lambda: read_rows(path), path)


class _Frame:
    """The rows of a data frame. Each row becomes a dictionary only when it is read."""

    def __init__(self, frame: Any) -> None:
        self._frame = frame

    def __iter__(self) -> Iterator[Any]:
        return frame_rows(self._frame) or iter(())


def _objects(rows: Iterable[Any], is_table: bool) -> Source:
    """The source of rows that are Python objects.

    Args:
        is_table: whether the rows come from a table. A null in a table means that the row has no such field.
    """

    def read() -> Iterator[Row]:
        for number, values in enumerate(rows, 1):
            yield _row(values, f"data, row {number}", is_table)

    return Source("data", read)


def _row(values: object, where: str, is_table: bool) -> Row:
    if not isinstance(values, Mapping):
        return Row(where, {}, DataError(f"{where}: the row is {brief(values)}, expected a dictionary"))
    try:
        row = plain(values)
    except (DataError, LimitError) as error:
        return Row(where, {}, type(error)(f"{where}: {error}"))
    return Row(where, without_nulls(row) if is_table else row)


def in_memory(source: Source) -> Source:
    """Read all rows of a source into memory. Return a source that provides these rows."""
    return dataclasses.replace(source, read=functools.partial(iter, list(source.read())))


# ---- directories ----


def find_splits(path: StrPath) -> tuple[Path, Path | None]:
    """Find the training file and, if there is one, the validation file.

    In a directory, these files are train.* and valid.*. If the path is a file, it is the training file.

    Raises:
        FileNotFoundError: there is no such file, or the directory has no train.jsonl (or .csv, .txt, …).
        ValueError: the directory has two files for the same split, such as train.jsonl and train.csv.

    >>> train, valid = nplora.data.find_splits(".")
    >>> train.name, valid.name
    ('train.jsonl', 'valid.jsonl')
    """
    given = Path(path)
    if not given.is_dir():
        return _existing(given), None
    return _required(given, ("train",)), _split(given, _VALID_FILES)


def find_evaluated(path: StrPath) -> Path:
    """Find the file that a model is evaluated on: in a directory, valid.*, or train.* if there is no valid.*.

    Raises:
        FileNotFoundError: there is no such file, or the directory has neither valid.* nor train.*.
        ValueError: the directory has two files for the same split, such as valid.jsonl and valid.csv.

    >>> nplora.data.find_evaluated(".").name
    'valid.jsonl'
    """
    given = Path(path)
    if given.is_dir():
        return _required(given, _VALID_FILES, ("train",))
    return _existing(given)


def _existing(file: Path) -> Path:
    """Return the file. Raise a FileNotFoundError if there is no such file."""
    if not file.suffix and not file.parent.is_dir():
        model_directory.require_no_hub_name(file, model_directory.DATA_SET)
    file.stat()
    return file


def _required(directory: Path, *splits: tuple[str, ...]) -> Path:
    """Look for a file of each split, in the given order, and return the first file found.

    Args:
        splits: for each split, a tuple of the names that its file may have, without suffix.
    """
    found = next((file for names in splits if (file := _split(directory, names))), None)
    if found is None:
        wanted = ", ".join(f"{name}.*" for names in splits for name in names)
        raise FileNotFoundError(
            errno.ENOENT, f"the directory has no {wanted} that ends in {ENDS}", os.fspath(directory)
        )
    return found


def _split(directory: Path, names: tuple[str, ...]) -> Path | None:
    """Return the file whose name is one of `names` with a suffix; None if there is no such file."""
    named = (directory / f"{name}{s}" for name, s in itertools.product(names, (*SUFFIXES, *COMPRESSED)))
    found = [file for file in named if file.exists()]
    if len(found) > 1:
        both = " and ".join(file.name for file in found)
        raise ValueError(f"{files.name(directory)}: the directory has {both}, expected only one of them")
    return found[0] if found else None
