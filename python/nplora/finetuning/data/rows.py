"""Read the rows of JSONL, CSV and plain text files, each with its line number.

Files are read in parts. An invalid line gives a DataError, and a line over a limit gives a LimitError. Both
errors name the file and the line.
"""

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nplora.formats import files, strict_json
from nplora.formats.errors import DataError, FormatError, LimitError, brief, counted
from nplora.formats.files import StrPath

MAX_LINE = 1 << 24  # bytes
_PART = 1 << 20
_BOM = b"\xef\xbb\xbf"
_CSV_COLUMNS = ({"prompt", "completion"}, {"text"})


@dataclass(frozen=True, slots=True)
class Row:
    """A row, or the error that occurred when the row was read.

    Attributes:
        where: the file and the line of the row, for error messages.
        values: the fields of the row; empty if there is an error.
        error: why the row could not be read, or None.
    """

    where: str
    values: dict[str, Any]
    error: FormatError | None = None


def read_rows(path: StrPath) -> Iterator[Row]:
    """Read the rows of a .jsonl, .csv or .txt file. Each part of a plain text becomes a row {"text": ...}.

    Raises:
        DataError: the file has another suffix, a CSV file lacks the expected columns, or a CSV or plain text
            is not UTF-8.
        FormatError: the path is a directory, FIFO or device.
        OSError: the file cannot be read.
    """
    readers = {".jsonl": _jsonl, ".csv": _csv, ".txt": _text}
    suffix = files.suffix(path)
    if suffix not in readers:
        os.stat(path)
        raise DataError(f"{files.name(path)}: expected a file that ends in {', '.join(readers)}")
    return readers[suffix](path)


def _lines(path: StrPath) -> Iterator[tuple[int, bytes | LimitError]]:
    """The number (from 1) and the content of each line. After a line that is too long, reading ends."""
    number, rest = 0, b""
    with files.reading(path) as reader:
        for begin in range(0, len(reader), _PART):
            *whole, rest = (rest + bytes(reader[begin : begin + _PART])).split(b"\n")
            for line in whole:
                number += 1
                yield number, _bare(line, number)
            if len(rest) > MAX_LINE:
                where = f"{files.name(path)}, line {number + 1}"
                yield (
                    number + 1,
                    LimitError(f"{where}: more than {MAX_LINE:,} bytes, the limit for a line"),
                )
                return
    if rest:
        yield number + 1, _bare(rest, number + 1)


def _bare(line: bytes, number: int) -> bytes:
    """The line without the byte order mark and the carriage return that some editors add."""
    return (line.removeprefix(_BOM) if number == 1 else line).removesuffix(b"\r")


# ---- the formats ----


def _jsonl(path: StrPath) -> Iterator[Row]:
    for number, line in _lines(path):
        where = f"{files.name(path)}, line {number}"
        if isinstance(line, LimitError):
            raise line
        if not line.strip():
            continue
        try:
            value = strict_json.loads(line, where)
        except LimitError as error:
            yield Row(where, {}, error)
        except FormatError as error:
            yield Row(where, {}, DataError(str(error)))
        else:
            if isinstance(value, dict):
                yield Row(where, value)
            else:
                yield Row(where, {}, DataError(f"{where}: the row is {brief(value)}, expected an object"))


def _csv(path: StrPath) -> Iterator[Row]:
    name = files.name(path)

    def decoded() -> Iterator[str]:
        for number, line in _lines(path):
            if isinstance(line, LimitError):
                raise line
            yield _decoded(line, f"{name}, line {number}") + "\n"

    reader, begin = csv.reader(decoded(), strict=True), 1
    try:
        columns = _next(reader) or []
        if not any(wanted <= set(columns) for wanted in _CSV_COLUMNS):
            raise DataError(
                f"{name}: the columns are {brief(columns)}, expected prompt and completion, or text"
            )
        while True:
            begin = reader.line_num + 1
            fields = _next(reader)
            if fields is None:
                return
            where = f"{name}, line {reader.line_num}"
            if len(fields) == len(columns):
                yield Row(where, dict(zip(columns, fields, strict=True)))
            elif fields:  # none: an empty line
                words = f"{where}: the row has {counted(len(fields), 'field')}, expected {len(columns)}"
                yield Row(where, {}, DataError(words))
    except csv.Error as error:
        if str(error) == "unexpected end of data":
            raise DataError(f"{name}, line {begin}: a quote is not closed") from error
        raise DataError(f"{name}, line {reader.line_num}: {error}") from error


def _next(reader: Any) -> list[str] | None:
    """Read the next record, with fields as long as a line may be.

    The csv module's limit for fields is global, so its old value is restored afterwards.
    """
    before = csv.field_size_limit(MAX_LINE)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(before)


def _text(path: StrPath) -> Iterator[Row]:
    """Split a plain text into parts. Newlines at the end of the text are dropped.

    Each part begins with a line whose first character is a letter, because every tokenizer splits there too.
    """
    part, size, first = list[str](), 0, 1
    for number, line in _lines(path):
        if isinstance(line, LimitError):
            raise line
        text = _decoded(line, f"{files.name(path)}, line {number}") + "\n"
        if size > _PART and text[0].isalpha():
            yield Row(f"{files.name(path)}, line {first}", {"text": "".join(part)})
            part, size, first = [], 0, number
        part.append(text)
        size += len(text)
    last = "".join(part).rstrip("\n")
    if last:
        yield Row(f"{files.name(path)}, line {first}", {"text": last})


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start}") from error
