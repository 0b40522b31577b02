"""Rows of tables: Parquet and Arrow files, and the data frames of pandas and polars.

Nothing here imports these packages before it is needed. A frame is recognised by its methods.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from nplora.formats import files
from nplora.formats.errors import DataError, FormatError
from nplora.formats.files import StrPath

_ROWS = 1024  # rows that become Python objects at a time


def read_parquet(path: StrPath) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file.

    Raises:
        DataError: the file is not a Parquet file. ModuleNotFoundError: `pyarrow` is not installed.
    """
    with files.reading(path):  # refuses what is not a regular file
        pass
    arrow = _pyarrow()
    import pyarrow.parquet

    with _errors(arrow, path), pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS):
            yield from _rows(batch)


def read_arrow(path: StrPath) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow file: a stream, as Hugging Face's `datasets` writes it, or a file with an index.

    Raises as `read_parquet`.
    """
    with files.reading(path):
        pass
    arrow = _pyarrow()
    import pyarrow.ipc

    with _errors(arrow, path), arrow.memory_map(str(path)) as mapped:
        try:
            reader = pyarrow.ipc.open_file(mapped)
            batches: Any = (reader.get_batch(index) for index in range(reader.num_record_batches))
        except arrow.ArrowInvalid:
            mapped.seek(0)
            batches = pyarrow.ipc.open_stream(mapped)
        for batch in batches:
            for begin in range(0, batch.num_rows, _ROWS):
                yield from _rows(batch.slice(begin, _ROWS))


def _rows(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a batch from a file, which pyarrow does not check by itself."""
    batch.validate(full=True)
    return map(without_nulls, batch.to_pylist())


def frame_rows(table: Any) -> Iterator[dict[str, Any]] | None:
    """The rows of a data frame of pandas or polars, or of a table of pyarrow; None for anything else."""
    if hasattr(table, "iter_rows") and hasattr(table, "columns"):  # polars
        return map(without_nulls, table.iter_rows(named=True))
    if hasattr(table, "to_pylist") and hasattr(table, "to_batches"):  # pyarrow
        return (without_nulls(row) for batch in table.to_batches(_ROWS) for row in batch.to_pylist())
    if hasattr(table, "itertuples") and hasattr(table, "columns"):  # pandas
        names = list(map(str, table.columns))
        return (
            without_nulls(dict(zip(names, map(_present, map(plain, row)), strict=True)))
            for row in table.itertuples(index=False, name=None)
        )
    return None


def without_nulls(row: Any) -> Any:
    """The row without the nulls inside its lists of objects.

    In a table, all objects of a list have the same fields, so a field that an object lacks is null there.
    """
    if isinstance(row, Mapping):
        return {str(name): without_nulls(value) for name, value in row.items() if value is not None}
    return [without_nulls(item) for item in row] if isinstance(row, list) else row


def plain(value: Any) -> Any:
    """The value made of Python's own objects: arrays become lists, and NumPy's scalars become numbers."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist") and not isinstance(value, str | bytes):
        return plain(value.tolist()) if hasattr(value, "dtype") else value
    return value


def _present(value: Any) -> Any:
    """None for the NaN or NA that pandas has for a missing value."""
    is_missing = (isinstance(value, float) and math.isnan(value)) or type(value).__name__ in (
        "NAType",
        "NaTType",
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
    except (arrow.ArrowException, OSError, ValueError, OverflowError, SystemError) as error:
        if isinstance(error, FormatError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        first = str(error).partition("\n")[0]
        raise DataError(f"{files.name(path)}: {first}") from error
