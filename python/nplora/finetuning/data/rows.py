"""Rows of files of training data, each with its place in the file.

Files are read in parts of limited size. A wrong line causes a DataError, and a line over a limit causes a
LimitError. The messages of DataError and LimitError name the file and the line.
"""

import codecs
import csv
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nplora.finetuning.data.json_array import elements
from nplora.finetuning.data.tables import read_arrow, read_parquet, require_different
from nplora.formats import files, strict_json
from nplora.formats.errors import DataError, FormatError, LimitError, brief, counted
from nplora.formats.files import StrPath

MAX_LINE = 1 << 24  # bytes
MOST_INFLATED = 256  # bytes of text for each byte of a compressed file
BEGINS_DOCUMENT = "-DOCSTART-"  # a line of a CoNLL file that begins with this text starts a new document
_PART = 1 << 20
_MOST_WORDS = 1 << 18  # the most words of a sentence in a CoNLL file
_FREE = 1 << 26  # bytes of text to which any compressed file may expand
_FREE_LINES = 1 << 20  # empty lines that any file may have
_GIVEN = 1 << 12  # bytes that zlib gets at a time
_BOM = b"\xef\xbb\xbf"
_GZIP = 31  # zlib's window size for gzip's header


@dataclass(frozen=True, slots=True)
class Row:
    """A row, or the error that occurred when the row was read.

    Attributes:
        where: the file and line of the row, for messages.
        values: the fields of the row; empty if there is an error.
        lines: for a sentence of a CoNLL file, a tuple: the name of the file, and the number of the line with
            the first word. In such a file, each line has one word. None for rows of all other files.
    """

    where: str
    values: dict[str, Any]
    error: FormatError | None = None
    lines: tuple[str, int] | None = None

    def place_of(self, name: str, i: int) -> str:
        """Return the place of item `i` of the list in the field `name`, for messages."""
        if self.lines is None:
            return f"{self.where}, {name}[{i}]"
        file, first = self.lines
        return f"{file}, line {first + i}"


def read_rows(path: StrPath) -> Iterator[Row]:
    """The rows of a file. A .txt file is divided into parts, each of which is a row {"text": ...}.

    Raises:
        DataError: the suffix is unknown, or the file cannot be divided into rows.
        FormatError: the path is a directory, FIFO or device. OSError: the file cannot be read.
        ModuleNotFoundError: the file needs the package `pyarrow`.
    """
    suffix = suffix_of(path)
    if suffix not in _READERS:
        os.stat(path)
        raise DataError(f"{files.name(path)}: expected a name that ends in {ENDS}")
    return _READERS[suffix](path)


def suffix_of(path: StrPath) -> str:
    """The suffix that decides how a file is read: ".jsonl" for train.jsonl and for train.jsonl.gz."""
    plain = Path(path)
    if files.suffix(plain) == ".gz":
        plain = plain.with_suffix("")
        return f"{files.suffix(plain)}.gz" if files.suffix(plain) in _BINARY else files.suffix(plain)
    return files.suffix(plain)


def is_text(path: StrPath) -> bool:
    """Whether a file is a plain text, which has no rows."""
    return suffix_of(path) == ".txt"


# ---- bytes and lines ----


def _parts(path: StrPath) -> Iterator[bytes]:
    """The bytes of a text file, decompressed if its name ends in .gz. Raises DataError for UTF-16."""
    with files.reading(path) as reader:
        places = range(0, len(reader), _PART)
        parts: Iterator[bytes] = (bytes(reader[begin : begin + _PART]) for begin in places)
        if files.suffix(path) == ".gz":
            parts = _decompressed(parts, files.name(path))
        for number, part in enumerate(parts):
            if number == 0 and part[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise DataError(
                    f"{files.name(path)}: begins like UTF-16, expected UTF-8; save the file as UTF-8"
                )
            yield part


def _decompressed(parts: Iterator[bytes], name: str) -> Iterator[bytes]:
    """Decompress a gzip file. Yield the content in parts of less than 2 * `_PART` bytes."""
    held = bytearray()
    for content in _inflated(parts, name):
        held += content
        if len(held) >= _PART:
            yield bytes(held)
            held.clear()
    yield bytes(held)


def _inflated(parts: Iterator[bytes], name: str) -> Iterator[bytes]:
    """Decompress a gzip file, which holds one or several streams. Yield at most `_PART` bytes at a time.

    If a stream ends within the input of a call, zlib copies the rest of this input. So each call gets at most
    `_GIVEN` bytes.
    """
    stream, read, made = zlib.decompressobj(_GZIP), 0, 0
    try:
        for part in parts:
            begin, size, read = 0, 0, read + len(part)
            while begin < len(part) or size == _PART:  # after a full piece, the stream may hold more
                if stream.eof:
                    begin = _after_padding(part, begin)
                    if begin == len(part):
                        break
                    stream = zlib.decompressobj(_GZIP)
                given = part[begin : begin + _GIVEN]
                content = stream.decompress(given, _PART)
                begin += len(given) - len(stream.unconsumed_tail or stream.unused_data)
                size, made = len(content), made + len(content)
                if made > _FREE + MOST_INFLATED * read:
                    raise LimitError(
                        f"{name}: {read:,} compressed bytes expand to more than {made:,} bytes, expected at "
                        f"most {MOST_INFLATED} times the compressed size"
                    )
                yield content
    except zlib.error as error:
        raise DataError(f"{name}: not a gzip file: {error}") from error
    if not stream.eof:
        raise DataError(f"{name}: the gzip file is cut short")


def _after_padding(part: bytes, begin: int) -> int:
    """Skip the zero bytes that may follow a stream in a gzip file. Return the position after them."""
    is_padded = part[begin : begin + 1] == b"\0"
    return len(part) - len(part[begin:].lstrip(b"\0")) if is_padded else begin


def _lines(path: StrPath) -> Iterator[tuple[int, bytes]]:
    """Yield a tuple for each line: the number of the line (from 1), and its content.

    Raises:
        LimitError: a line is too long, or nearly all lines of the file are empty.
    """
    number, rest, empty, filled = 0, b"", 0, 0
    for part in _parts(path):
        *whole, rest = (rest + part).split(b"\n")
        for line in whole:
            number += 1
            if not line or line.isspace():
                empty += 1
                if empty > _FREE_LINES + filled:
                    where = f"{files.name(path)}, line {number:,}"
                    raise LimitError(
                        f"{where}: most lines of the file up to this one are empty; remove the empty lines"
                    )
            else:
                filled += len(line)
            yield number, _bare(line, number)
        if len(rest) > MAX_LINE:
            where = f"{files.name(path)}, line {number + 1}"
            raise LimitError(f"{where}: more than {MAX_LINE:,} bytes, the limit for a line")
    if rest:
        yield number + 1, _bare(rest, number + 1)


def _bare(line: bytes, number: int) -> bytes:
    """Remove what some editors add: a byte order mark before line 1, and a carriage return after a line."""
    return (line.removeprefix(_BOM) if number == 1 else line).removesuffix(b"\r")


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start}") from error


# ---- the formats ----


def _jsonl(path: StrPath) -> Iterator[Row]:
    for number, line in _lines(path):
        if line.strip():
            row = _parsed(line, f"{files.name(path)}, line {number}")
            if row.error is not None and number == 1 and line.lstrip().startswith(b"["):
                words = f"{row.error}; if the file is one JSON array, its name must end in .json"
                row = Row(row.where, {}, DataError(words))
            yield row


def _json(path: StrPath) -> Iterator[Row]:
    name = files.name(path)
    for number, element in enumerate(elements(_parts(path), name, MAX_LINE), 1):
        yield _parsed(element, f"{name}, row {number}")


def _parsed(text: bytes, where: str) -> Row:
    try:
        value = strict_json.loads(text, where)
    except LimitError as error:
        return Row(where, {}, error)
    except FormatError as error:
        return Row(where, {}, DataError(str(error)))
    if isinstance(value, dict):
        return Row(where, value)
    return Row(where, {}, DataError(f"{where}: the row is {brief(value)}, expected an object"))


def _csv(path: StrPath) -> Iterator[Row]:
    return _separated(path, ",")


def _tsv(path: StrPath) -> Iterator[Row]:
    return _separated(path, "\t")


def _separated(path: StrPath, delimiter: str) -> Iterator[Row]:
    """The rows of a .csv or .tsv file. The first line names the columns."""
    name = files.name(path)
    lines = (_decoded(line, f"{name}, line {number}") + "\n" for number, line in _lines(path))
    reader, begin = csv.reader(lines, strict=True, delimiter=delimiter), 1
    try:
        columns = next(filter(None, iter(lambda: _next(reader), None)), [])
        require_different(columns, name)
        while True:
            begin = reader.line_num + 1
            fields = _next(reader)
            if fields is None:
                return
            where = f"{name}, line {begin}"
            if len(fields) == len(columns):
                yield Row(where, dict(zip(columns, fields, strict=True)))
            elif fields:  # an empty line has no fields
                words = f"{where}: the row has {counted(len(fields), 'field')}, expected {len(columns)}"
                yield Row(where, {}, DataError(words))
    except csv.Error as error:
        if str(error) == "unexpected end of data":
            raise DataError(f"{name}, line {begin}: a quote is not closed") from error
        raise DataError(f"{name}, line {reader.line_num}: {error}") from error


def _next(reader: Any) -> list[str] | None:
    """Read the next record, with a limit of `MAX_LINE` characters for each field.

    The csv module's limit is a global setting, so this function restores the previous limit.
    """
    before = csv.field_size_limit(MAX_LINE)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(before)


def _text(path: StrPath) -> Iterator[Row]:
    """Split a plain text into parts. Newlines at the end of the text are dropped.

    Each part except the first begins with a line whose first character is a letter. Every tokenizer divides a
    text before such a line too. So no token crosses the border of two parts, and the parts together have the
    same tokens as the whole text.
    """
    part, size, first = list[str](), 0, 1
    for number, line in _lines(path):
        text = _decoded(line, f"{files.name(path)}, line {number}") + "\n"
        if size > _PART and text[0].isalpha():
            yield Row(f"{files.name(path)}, line {first}", {"text": "".join(part)})
            part, size, first = [], 0, number
        part.append(text)
        size += len(text)
    last = "".join(part).rstrip("\n")
    if last:
        yield Row(f"{files.name(path)}, line {first}", {"text": last})


def _conll(path: StrPath) -> Iterator[Row]:
    """The sentences of a CoNLL file as rows {"tokens": [...], "tags": [...]}.

    Each line holds a word in its first column, and the tag of the word in its last column. A file without
    tags has only one column. An empty line ends a sentence. A line that begins a document (-DOCSTART- in
    CoNLL 2003) is left out.
    """
    lines, size, name = list[tuple[int, bytes]](), 0, files.name(path)
    document = BEGINS_DOCUMENT.encode()
    for number, line in _lines(path):
        size += len(line)
        if line.strip(b" \t") and not line.startswith(document):
            if size > MAX_LINE or len(lines) == _MOST_WORDS:
                raise LimitError(
                    f"{name}, line {number}: the sentence has more than {_MOST_WORDS:,} words or "
                    f"{MAX_LINE:,} bytes; expected an empty line after each sentence"
                )
            lines.append((number, line))
            continue
        if lines:
            yield _sentence(lines, name)
        lines, size = [], 0
    if lines:
        yield _sentence(lines, name)


def _sentence(lines: list[tuple[int, bytes]], name: str) -> Row:
    begin, where = lines[0][0], f"{name}, line {lines[0][0]}"
    words, tags, columns = list[str](), list[str](), 0
    for number, line in lines:
        try:
            text = _decoded(line, f"{name}, line {number}")
        except DataError as error:
            return Row(where, {}, error)
        fields = text.split("\t") if "\t" in text else [field for field in text.split(" ") if field]
        columns = columns or len(fields)
        if len(fields) != columns:
            wrong = f"{counted(len(fields), 'column')}, expected {columns} as in line {begin}"
            return Row(where, {}, DataError(f"{name}, line {number}: {wrong}"))
        words.append(fields[0])
        tags.append(fields[-1])
    return Row(where, {"tokens": words} | ({"tags": tags} if columns > 1 else {}), lines=(name, begin))


def _table(
    read: Callable[[StrPath, int], Iterator[dict[str, Any] | None]],
) -> Callable[[StrPath], Iterator[Row]]:
    def rows(path: StrPath) -> Iterator[Row]:
        for number, values in enumerate(read(path, MAX_LINE), 1):
            where = f"{files.name(path)}, row {number}"
            if values is None:
                words = f"{where}: the row has more than {MAX_LINE:,} bytes"
                yield Row(where, {}, LimitError(words))
            else:
                yield Row(where, values)

    return rows


_READERS: dict[str, Callable[[StrPath], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".txt": _text,
    ".conll": _conll,
    ".parquet": _table(read_parquet),
    ".arrow": _table(read_arrow),
}
_BINARY = (".parquet", ".arrow")
SUFFIXES = tuple(_READERS)
ENDS = f"{', '.join(SUFFIXES)}, or a text format followed by .gz"  # for messages
COMPRESSED = tuple(f"{suffix}.gz" for suffix in SUFFIXES if suffix not in _BINARY)
