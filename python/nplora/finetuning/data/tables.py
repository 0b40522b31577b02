"""Reads the rows of tables: of Parquet and Arrow files, and of data frames of pandas and polars.

pyarrow is imported only when a file needs it. Data frames are recognised by their methods, without an import
of pandas or polars.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nplora.finetuning.data.table_limits import reading, require_arrow, require_parquet, row_sizes
from nplora.formats import files, strict_json
from nplora.formats.errors import DataError, FormatError, LimitError, brief
from nplora.formats.files import StrPath

_ROWS = 1024  # rows that become Python objects at a time, at most
_SURROGATE = re.compile("[\ud800-\udfff]")
_ARROW_FILE = b"ARROW1\0\0"


def read_parquet(path: StrPath, most: int) -> Iterator[dict[str, Any] | None]:
    """The rows of a Parquet file.

    Args:
        most: the largest number of bytes that a row may have. A row with more bytes is replaced by None.
    Raises:
        DataError: the file is not a Parquet file.
        LimitError: there are too many rows, or a row group (Parquet) or a message (Arrow) is too large.
        ModuleNotFoundError: `pyarrow` is not installed.
    """
    with files.reading(path) as reader:  # refuses what is not a regular file
        size = len(reader)
    arrow = _pyarrow()
    import pyarrow.parquet

    with _errors(arrow, path), pyarrow.parquet.ParquetFile(path) as file:
        require_parquet(file.metadata, files.name(path), size)
        require_different(file.schema_arrow.names, files.name(path))
        texts, rows = reading(file.metadata, _ROWS)
    with _errors(arrow, path), pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
        for batch in file.iter_batches(rows):
            yield from _rows(batch, most)


def read_arrow(path: StrPath, most: int) -> Iterator[dict[str, Any] | None]:
    """The rows of an Arrow file. The file holds a stream, as Hugging Face's `datasets` writes it, and may end
    with an index.

    The arguments and errors are those of `read_parquet`.
    """
    with files.reading(path):
        pass
    arrow = _pyarrow()
    import pyarrow.ipc

    with _errors(arrow, path), arrow.memory_map(str(path)) as mapped:
        begin = 0
        if mapped.read(len(_ARROW_FILE)) == _ARROW_FILE:
            pyarrow.ipc.open_file(mapped)  # refuses a file that is cut short
            begin = len(_ARROW_FILE)  # the file holds a stream, then the index
        mapped.seek(begin)
        require_arrow(pyarrow.ipc.MessageReader.open_stream(mapped), files.name(path))
        mapped.seek(begin)
        stream = pyarrow.ipc.open_stream(mapped)
        require_different(stream.schema.names, files.name(path))
        for batch in stream:
            yield from _rows(batch, most)


def require_different(columns: Sequence[str], where: str) -> None:
    """Raise a DataError if two columns of a table have the same name."""
    if len(set(columns)) < len(columns):
        raise DataError(
            f"{where}: the columns are {brief(list(columns))}, expected a different name for each column"
        )


def _rows(batch: Any, most: int) -> Iterator[dict[str, Any] | None]:
    """The rows of a record batch of pyarrow. At most `_ROWS` rows at a time become Python objects.

    The record batch is validated first, because pyarrow does not validate what it reads.
    """
    batch.validate(full=True)
    ends = np.cumsum(row_sizes(batch))
    begin, before = 0, 0
    while begin < len(ends):
        end = min(int(np.searchsorted(ends, before + most, side="right")), begin + _ROWS)
        if end > begin:
            yield from map(without_nulls, batch.slice(begin, end - begin).to_pylist())
        else:
            end = begin + 1
            yield None
        begin, before = end, int(ends[end - 1])


def frame_rows(table: Any) -> Iterator[dict[str, Any]] | None:
    """The rows of a data frame of pandas or polars, or of a table of pyarrow. None for all other objects.

    The values in a row may be None or NumPy arrays.

    Raises:
        DataError: two columns have the same name.
    """
    if hasattr(table, "iter_rows") and hasattr(table, "columns"):  # polars
        rows: Iterator[dict[str, Any]] = table.iter_rows(named=True)
        return rows
    if hasattr(table, "to_pylist") and hasattr(table, "to_batches"):  # pyarrow
        require_different(table.column_names, "data")
        return (row for batch in table.to_batches(_ROWS) for row in batch.to_pylist())
    if hasattr(table, "itertuples") and hasattr(table, "columns"):  # pandas
        names = list(map(str, table.columns))
        require_different(names, "data")
        return (
            dict(zip(names, map(_present, row), strict=True))
            for row in table.itertuples(index=False, name=None)
        )
    return None


def without_nulls(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the row without the null fields of the objects inside it.

    In a table, all objects in a list have the same fields. So a table stores null for a field that an object
    lacks. The row itself keeps its null fields, because the code that reads rows treats them as missing.
    """
    return {str(name): _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def plain(value: Any, depth: int = 0) -> Any:
    """The value as Python objects: arrays become lists, and NumPy scalars become numbers.

    Raises:
        DataError: a text cannot be encoded. LimitError: the value is nested too deeply, or contains itself.
    """
    if isinstance(value, str):
        if not value.isascii() and _SURROGATE.search(value):
            raise DataError("a string holds half a surrogate pair")
        return value
    if isinstance(value, Mapping | list | tuple) and depth >= strict_json.MAX_DEPTH:
        raise LimitError(f"values nested more than {strict_json.MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        return {plain(str(name)): plain(item, depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, depth + 1) for item in value]
    if hasattr(value, "tolist") and not isinstance(value, bytes):
        return plain(value.tolist(), depth) if hasattr(value, "dtype") else value
    return value


def _present(value: Any) -> Any:
    """Replace NaN or NA, which pandas uses for a missing value, by None."""
    is_missing = (isinstance(value, float | np.floating) and math.isnan(value)) or (
        type(value).__name__ in ("NAType", "NaTType")
    )
    return None if is_missing else value


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        message = 'Parquet and Arrow files need the package pyarrow: pip install "nplora[data]"'
        raise ModuleNotFoundError(message, name="pyarrow") from error
    return pyarrow


@contextlib.contextmanager
def _errors(arrow: Any, path: StrPath) -> Iterator[None]:
    """Turn the errors of pyarrow into DataErrors."""
    try:
        yield
    except (arrow.ArrowException, OSError, ValueError, OverflowError, SystemError, RecursionError) as error:
        if isinstance(error, FormatError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        first = str(error).partition("\n")[0]
        raise DataError(f"{files.name(path)}: {first}") from error
