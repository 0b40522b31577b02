"""Rows of all kinds of files, including hostile files, and of Python objects."""

import contextlib
import datetime
import gzip
import json
import os
import random
import re
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nplora.finetuning.data import find_splits
from nplora.finetuning.data.json_array import elements
from nplora.finetuning.data.kinds import recognise
from nplora.finetuning.data.parsing.fields import Fields
from nplora.finetuning.data.rows import read_rows
from nplora.finetuning.data.sources import sources_of, splits_of
from nplora.finetuning.data.table_limits import row_sizes
from nplora.formats.errors import DataError, FormatError, LimitError

ROWS = [
    {"prompt": "a", "completion": 'b "quoted" \\ [{,'},
    {"prompt": "é\n", "completion": "]}"},
    {"prompt": "", "completion": "c\u2028d"},
]


def values(path: Path) -> list[dict[str, Any]]:
    rows = list(read_rows(path))
    assert all(row.error is None for row in rows)
    return [row.values for row in rows]


def objects(data: Any) -> list[dict[str, Any]]:
    [source] = splits_of("test", data).train
    assert [row.values for row in source.read()] == [row.values for row in source.read()]
    return [row.values for row in source.read()]


# ---- arrays of JSON ----


def any_json(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(7 if depth else 5)
    if kind < 3:
        pool = ['"', "\\", "[", "]", "{", "}", ",", ":", " ", "\n", "é", "😀", "a", "\\u005c", "\\\\"]
        return "".join(rng.choices(pool, k=rng.randrange(8)))
    if kind == 3:
        return rng.choice([True, None, -1.5e3, 0, 12])
    if kind == 5:
        return [any_json(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {str(any_json(rng, 0)): any_json(rng, max(depth - 1, 0)) for _ in range(rng.randrange(3))}


def test_the_elements_of_an_array_are_those_of_json_wherever_the_parts_end() -> None:
    rng = random.Random(0)
    for _ in range(300):
        rows = [any_json(rng, 3) for _ in range(rng.randrange(5))]
        spaces = rng.choice([{}, {"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False}])
        text = json.dumps(rows, **spaces)
        if rng.random() < 0.5:
            other = json.dumps({"a": any_json(rng, 2), "b": "data"}, **spaces).rstrip()[:-1].rstrip()
            text = f'{other}, "data": {text}, "more": [1]}}'
        raw = rng.choice([b"", b"\xef\xbb\xbf"]) + text.encode() + b"\n"
        size = rng.randrange(1, 9)
        parts = (raw[begin : begin + size] for begin in range(0, len(raw), size))
        assert [json.loads(element) for element in elements(parts, "data", 10**6)] == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begins with ''"),
        ("{}", "begins with '{}'"),
        ('{"data": {"a": 1}}', 'expected an array, or an object with an array as its "data"'),
        ('{"data": 1, "more": [1]}', "expected an array"),
        ('"data": []', "expected an array"),
        ("[1, 2", "the array does not end"),
        ('["a]', "the array does not end"),
        ('["a\\"]', "the array does not end"),
        ("[1] [2]", r"'\[2\]' follows the array"),
        ("[1]]", r"'\]' follows the array"),
        ('{"data": [1] garbage}', "'garbage}' follows the array"),
        ('{"data": [1]   garbage!!', "'garbage!!' follows the array"),
        ('{"data": [1]} {', "'{' follows the object"),
        ('{"data": [1]}}', "'}' follows the object"),
        ('{"data": [1]', "the object does not end"),
        ('{"data": [1], "more": 1', "the object does not end"),
        ('{"data": [1], "more": 1]', "the object does not end"),
        ('{"data": [1], "more": "}"', "the object does not end"),
        ('{"data": [1], "more": {"a": 1}', "the object does not end"),
        (
            '{"text": "a"}\n{"text": "b"}\n',
            r"expected an array, .*; if each line is an object, the file's name must end in \.jsonl",
        ),
        ('{"a": ' + "[" * 100_000, "expected an array"),
        ('{"a":' + " " * 900_000, "expected an array"),
    ],
)
def test_text_that_is_no_array_is_refused(text: str, message: str) -> None:
    raw, begin = text.encode(), time.process_time()
    for size in (3, 1 << 20):
        parts = (raw[at : at + size] for at in range(0, len(raw), size))
        with pytest.raises(DataError, match=message):
            list(elements(parts, "data.json", 100))
    assert time.process_time() - begin < 5


def test_an_array_in_a_file_of_lines_is_refused_with_the_right_suffix(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    for text in (json.dumps(ROWS, indent=1), json.dumps(ROWS)):
        file.write_text(text, encoding="utf-8")
        error = next(read_rows(file)).error
        assert isinstance(error, DataError)
        assert str(error).startswith(f"{file}, line 1: ")
        assert str(error).endswith("; if the file is one JSON array, its name must end in .json")


def test_a_compressed_object_that_is_cut_after_its_array_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 10**9, 1000).tolist()
    whole = gzip.compress(json.dumps({"data": ROWS, "more": noise}).encode())
    (tmp_path / "data.json.gz").write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"data\.json\.gz: the gzip file is cut short"):
        list(read_rows(tmp_path / "data.json.gz"))


def test_a_long_element_is_refused_before_it_is_read() -> None:
    parts = (b"[" + b"1" * 100 if number == 0 else b"1" * 100 for number in range(10**9))
    with pytest.raises(LimitError, match=r"data, row 1: the row has more than 1,000 bytes"):
        list(elements(parts, "data", 1000))


def test_a_bad_element_is_an_error_of_its_row(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[{"text": "a"}, {"text": }, 3, {"text": "b"},, {"text": "\\ud800"}]')
    rows = list(read_rows(path))
    assert [row.error is None for row in rows] == [True, False, False, True, False, False]
    assert [row.where.rpartition(", ")[2] for row in rows] == [f"row {n}" for n in range(1, 7)]
    assert "row 3: the row is 3, expected an object" in str(rows[2].error)


# ---- files ----


def arrow() -> tuple[Any, Any]:
    return pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")


def written(path: Path, suffix: str) -> Path:
    """The rows as a file with this suffix."""
    file = path / f"train{suffix}"
    if suffix.endswith(".gz"):
        plain = written(path, suffix.removesuffix(".gz"))
        file.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    elif suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif suffix == ".json":
        file.write_text(json.dumps({"version": 1, "info": {"a": [1]}, "data": ROWS, "more": []}, indent=1))
    elif suffix in (".csv", ".tsv"):
        pandas = pytest.importorskip("pandas")
        separator = "," if suffix == ".csv" else "\t"
        pandas.DataFrame(ROWS).to_csv(file, index=False, sep=separator)
    else:
        pyarrow, parquet = arrow()
        table = pyarrow.Table.from_pylist(ROWS)
        if suffix == ".parquet":
            parquet.write_table(table, file, row_group_size=2)
        else:
            with pyarrow.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
    return file


SUFFIXES = [
    ".jsonl",
    ".json",
    ".csv",
    ".tsv",
    ".parquet",
    ".arrow",
    ".jsonl.gz",
    ".json.gz",
    ".csv.gz",
    ".tsv.gz",
]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_of_file_has_the_same_rows(tmp_path: Path, suffix: str) -> None:
    file = written(tmp_path, suffix)
    found = values(file)
    assert found == ROWS
    assert find_splits(tmp_path) == (file, None)
    link = tmp_path / f"link{suffix}"
    link.symlink_to(file)
    assert values(link) == ROWS
    upper = file.rename(tmp_path / f"train{suffix.upper()}")
    assert values(upper) == ROWS


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".jsonl.gz", ".json.gz"])
@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "other"])
def test_a_damaged_file_is_refused(tmp_path: Path, suffix: str, damage: str) -> None:
    file = written(tmp_path, suffix)
    whole = file.read_bytes()
    noise = np.random.default_rng(0).bytes(len(whole))
    file.write_bytes(
        {"empty": b"", "cut": whole[: len(whole) // 2], "noise": noise, "other": b"[]" * 50}[damage]
    )
    with pytest.raises(FormatError, match=r"train\.\w+"):
        list(read_rows(file))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_what_is_not_a_regular_file_is_not_opened(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"a{suffix}")
    with pytest.raises(FormatError, match="a FIFO, expected a regular file"):
        list(read_rows(tmp_path / f"a{suffix}"))
    with pytest.raises(FileNotFoundError):
        list(read_rows(tmp_path / f"missing{suffix}"))


@pytest.mark.slow
def test_a_small_compressed_file_does_not_fill_the_memory(tmp_path: Path) -> None:
    """A line of 256 MB in a file of 300 KB, and many streams in one file."""
    zeros = gzip.compress(b"\0" * (16 << 20))
    file = tmp_path / "data.jsonl.gz"
    with gzip.open(file, "wb", 9) as out:
        for _ in range(16):
            out.write(b"\0" * (16 << 20))
    assert file.stat().st_size < 1 << 19
    for content in (file.read_bytes(), zeros * 16):
        file.write_bytes(content)
        tracemalloc.start()
        with pytest.raises(LimitError, match=r"line 1: more than 16,777,216 bytes"):
            list(read_rows(file))
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
        tracemalloc.stop()


@pytest.mark.parametrize("size", [0, 1, 1 << 19, 1 << 20, (1 << 20) + 1, 1 << 21, 3_000_001])
def test_compressed_text_is_whole_at_any_size(tmp_path: Path, size: int) -> None:
    """The content of a stream may fill a part exactly, or wait in it when all its bytes are read."""
    text = b'{"text": "' + b"a" * size + b'"}\n'
    file = tmp_path / "data.jsonl.gz"
    for content in (gzip.compress(text), gzip.compress(text[:7]) + gzip.compress(text[7:]) + b"\0" * 512):
        file.write_bytes(content)
        assert values(file) == [{"text": "a" * size}]


def test_a_stream_does_not_copy_all_the_streams_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = list[int]()

    class Counted:
        """A stream that counts the bytes it gets: zlib copies those that follow the end of the stream."""

        def __init__(self, window: int) -> None:
            self.stream = zlib.decompressobj(window)

        def decompress(self, part: bytes, most: int) -> bytes:
            given.append(len(part))
            return self.stream.decompress(part, most)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stream, name)

    monkeypatch.setattr(
        "nplora.finetuning.data.rows.zlib", SimpleNamespace(decompressobj=Counted, error=zlib.error)
    )
    file = tmp_path / "data.jsonl.gz"
    streams = gzip.compress(b"") * 10_000 + gzip.compress(b'{"text": "a"}\n') + b"\0" * 5_000
    file.write_bytes(streams)
    assert values(file) == [{"text": "a"}]
    assert len(given) > 10_000
    assert sum(given) < 400 * len(streams)


@pytest.mark.slow
@pytest.mark.parametrize("blank", [b"\n", b" \t\r\n"])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt"])
def test_a_file_of_empty_lines_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blank: bytes, suffix: str
) -> None:
    monkeypatch.setattr("nplora.finetuning.data.rows._FREE_LINES", 1000)
    file = tmp_path / f"data{suffix}.gz"
    file.write_bytes(gzip.compress(b"text\n" + blank * 2_000))
    with pytest.raises(LimitError, match=r"line 1,00\d: most lines of the file up to this one are empty"):
        list(read_rows(file))
    file.write_bytes(gzip.compress(b"text\n" + (b"a b c" * 9 + blank * 40) * 300))
    assert list(read_rows(file))


def test_compressed_text_that_is_too_large_for_its_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nplora.finetuning.data.rows._FREE", 1 << 10)
    file = tmp_path / "data.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"text": "a"}\n' * 40_000))
    with pytest.raises(LimitError, match=r"data\.jsonl\.gz: .* compressed bytes expand to more than "):
        list(read_rows(file))
    file.write_bytes(gzip.compress(b"".join(b'{"text": "%d"}\n' % n for n in range(1000))))
    assert len(values(file)) == 1000


def test_a_missing_pyarrow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.parquet").touch()
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "nplora\[data\]"'):
        list(read_rows(tmp_path / "data.parquet"))


def test_fields_of_a_table_that_are_no_text_are_named_by_row(tmp_path: Path) -> None:
    pyarrow, parquet = arrow()
    odd = [datetime.date(2024, 1, 2), b"bytes", 1.5, None, [1]]
    for value in odd:
        table = pyarrow.table({"prompt": [value], "completion": ["b"]})
        parquet.write_table(table, tmp_path / "data.parquet")
        [row] = read_rows(tmp_path / "data.parquet")
        place = r"data\.parquet, row 1(: prompt|, message 1 of prompt: a message) is"
        with pytest.raises(DataError, match=place):
            recognise(row.values, row.where).parse(Fields(row.values, row.where))


CHAT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
]


def test_fields_that_a_table_adds_to_messages_are_not_there(tmp_path: Path) -> None:
    """In an Arrow table all messages have all fields. A template may ask whether 'tool_calls' is there."""
    pyarrow, parquet = arrow()
    table = pyarrow.Table.from_pylist([{"messages": CHAT}, {"messages": CHAT[:1]}])
    assert table.to_pylist()[1]["messages"][0]["tool_calls"] is None
    parquet.write_table(table, tmp_path / "data.parquet")
    expected = [{"messages": CHAT}, {"messages": CHAT[:1]}]
    assert values(tmp_path / "data.parquet") == objects(table) == expected


# ---- tables that are larger than their files ----


def size_of(value: Any) -> int:
    """The size of a value, from its objects: 32 bytes a value, and the bytes of texts."""
    if isinstance(value, dict):
        return 32 + sum(size_of(item) for item in value.values())
    if isinstance(value, list):
        return 32 + sum(size_of(item) for item in value)
    if isinstance(value, tuple):  # an entry of a map
        return sum(size_of(item) for item in value)
    return 32 + (len(value.encode()) if isinstance(value, str) else 0)


def test_the_size_of_a_row_is_known_before_its_objects_are_made() -> None:
    pa, _ = arrow()
    texts = ["a", None, "bé" * 20, "", "c" * 5]
    lists = [["a"], [], ["bb", "c" * 30], None, ["d"]]
    plain = pa.array(texts)
    columns = {
        "text": plain,
        "large": plain.cast(pa.large_string()),
        "view": plain.cast(pa.string_view()),
        "dictionary": pa.DictionaryArray.from_arrays([1, 1, None, 0, 1], ["a", "b" * 40]),
        "runs": pa.RunEndEncodedArray.from_arrays([2, 5], ["a", "b" * 40]),
        "list": pa.array(lists),
        "lists": pa.array([[["a"], ["bb"]], [], [[]], [["c" * 9]], []]),
        "fixed": pa.array([[1, 2]] * 5, pa.list_(pa.int64(), 2)),
        "list view": pa.ListViewArray.from_arrays([0, 0, 1, 2, 0], [2, 1, 1, 0, 2], ["a" * 30, "b"]),
        "struct": pa.array([{"a": "x" * n, "b": [1.5] * n} for n in range(5)]),
        "map": pa.array([[("k" * n, n)] * n for n in range(5)], pa.map_(pa.string(), pa.int64())),
        "number": pa.array([1, 2.5, None, 4, 5]),
        "flag": pa.array([True, False, None, True, True]),
    }
    for name, column in columns.items():
        for part in (column, column.slice(1, 3), column.slice(5)):
            found = row_sizes(pa.record_batch([part], [name]))
            assert found.tolist() == [size_of(value) for value in part.to_pylist()], name
    union = pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array(["a"])])
    with pytest.raises(DataError, match="expected texts, numbers, lists or structs"):
        row_sizes(pa.record_batch([union], ["union"]))


LONG = "a" * (1 << 20)


def write_arrow(path: Path, column: Any, kind: str = "stream") -> Path:
    pa, _ = arrow()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    schema = pa.schema([("text", column.type)])
    with (
        pa.OSFile(str(path), "wb") as out,
        getattr(pa.ipc, f"new_{kind}")(out, schema, options=options) as to,
    ):
        to.write_batch(pa.record_batch([column], ["text"]))
    return path


def repeated(path: Path, form: str) -> Path:
    """A file of 64 rows in which all rows share one text of a megabyte."""
    pa, parquet = arrow()
    dictionary = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), [LONG])
    if form == "parquet":
        parquet.write_table(pa.table({"text": dictionary}), path / "data.parquet", compression="zstd")
    elif form == "delta":
        table, delta = pa.table({"text": [LONG] * 64}), {"column_encoding": "DELTA_BYTE_ARRAY"}
        parquet.write_table(table, path / "data.parquet", compression="zstd", use_dictionary=False, **delta)
    elif form == "runs":
        return write_arrow(path / "data.arrow", pa.RunEndEncodedArray.from_arrays([64], [LONG]))
    else:
        return write_arrow(path / "data.arrow", dictionary, form)
    return path / "data.parquet"


@pytest.mark.parametrize(
    "form", ["parquet", pytest.param("delta", marks=pytest.mark.slow), "runs", "stream", "file"]
)
def test_a_text_that_all_rows_share_is_not_copied_for_all_at_once(tmp_path: Path, form: str) -> None:
    file = repeated(tmp_path, form)
    assert file.stat().st_size < 2000
    next(read_rows(file))  # imports what it needs
    tracemalloc.start()
    assert sum(row.values == {"text": LONG} for row in read_rows(file)) == 64
    assert tracemalloc.get_traced_memory()[1] < 40 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("form", ["stream", "file"])
def test_a_row_of_a_table_over_the_limit_is_an_error_of_its_row(tmp_path: Path, form: str) -> None:
    pa, parquet = arrow()
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 22, pa.int32()), [LONG])
    column = pa.ListArray.from_arrays([0, 1, 21, 22], texts)
    file = write_arrow(tmp_path / "data.arrow", column, form)
    parquet.write_table(pa.table({"text": column}), tmp_path / "data.parquet")
    for path in (file, tmp_path / "data.parquet"):
        rows = list(read_rows(path))
        assert [row.error is None for row in rows] == [True, False, True]
        assert isinstance(rows[1].error, LimitError)
        assert f"{path.name}, row 2: the row has more than 16,777,216 bytes" in str(rows[1].error)


@pytest.fixture
def one_megabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a table may have a megabyte, so that tests need not write more."""
    monkeypatch.setattr("nplora.finetuning.data.table_limits._FREE", 1 << 20)


@pytest.mark.usefixtures("one_megabyte")
@pytest.mark.parametrize("form", ["parquet", "stream", "file"])
def test_a_compressed_part_of_a_table_is_refused_before_it_is_decompressed(tmp_path: Path, form: str) -> None:
    pa, parquet = arrow()
    column = pa.array([LONG] * 4)
    if form == "parquet":
        file = tmp_path / "data.parquet"
        parquet.write_table(pa.table({"text": column}), file, compression="zstd", use_dictionary=False)
    else:
        file = write_arrow(tmp_path / "data.arrow", column, form)
    assert file.stat().st_size < 1 << 15
    with pytest.raises(LimitError, match=r"bytes expand to 4,194,\d{3} bytes, expected at most 1,048,576"):
        list(read_rows(file))


@pytest.mark.slow
@pytest.mark.usefixtures("one_megabyte")
def test_nulls_that_take_no_bytes_are_refused_before_they_are_read(tmp_path: Path) -> None:
    pa, parquet = arrow()
    nulls = pa.ListArray.from_arrays(pa.array([0, 1 << 20]), pa.nulls(1 << 20, pa.int8()))
    parquet.write_table(pa.table({"text": nulls}), tmp_path / "data.parquet", compression="zstd")
    with pytest.raises(LimitError, match=r"row group 1: .* bytes expand to 8,388,"):
        list(read_rows(tmp_path / "data.parquet"))
    file = write_arrow(tmp_path / "data.arrow", pa.nulls(1 << 30))
    with pytest.raises(LimitError, match="message 2: 1,073,741,824 rows in "):
        list(read_rows(file))


@pytest.mark.slow
def test_the_metadata_of_an_arrow_file_may_be_any_bytes(tmp_path: Path) -> None:
    """Each byte of a small file is changed: the file is read, or refused by an error of its format."""
    pa, _ = arrow()
    file = write_arrow(tmp_path / "data.arrow", pa.array(["a" * 99, "b"]))
    whole = file.read_bytes()
    for place in range(len(whole)):
        changed = whole[place] ^ (1, 0x80, 0xFF)[place % 3]
        damaged = tmp_path / f"{place}.arrow"  # a new name, because one before may still be mapped
        damaged.write_bytes(whole[:place] + bytes([changed]) + whole[place + 1 :])
        with contextlib.suppress(FormatError):
            list(read_rows(damaged))


# ---- objects of Python ----


def test_iterables_of_dictionaries_are_rows() -> None:
    def generated() -> Iterator[dict[str, str]]:
        yield from ROWS

    for data in (ROWS, tuple(ROWS), generated(), iter(ROWS), {"train": ROWS, "valid": ROWS[:1]}):
        assert objects(data) == ROWS
    assert splits_of("test", {"train": ROWS, "validation": ROWS[:1]}).valid is not None


def test_arrays_and_scalars_of_numpy_are_lists_and_numbers() -> None:
    messages = np.array([{"role": "user", "content": np.str_("a"), "weight": np.int64(1)}], object)
    assert objects([{"messages": messages, "label": np.bool_(True)}]) == [
        {"messages": [{"role": "user", "content": "a", "weight": 1}], "label": True}
    ]
    [row] = objects([{"label": np.bool_(True), "n": np.float32(0.5)}])
    assert row["label"] is True
    assert type(row["n"]) is float


def test_frames_of_pandas_are_rows(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"prompt": ["a", None, float("nan"), pandas.NA], "n": [1, 2, 3, 4]})
    nulls = [{"prompt": None, "n": n} for n in (2, 3, 4)]
    assert objects(frame) == [{"prompt": "a", "n": 1}, *nulls]
    pytest.importorskip("pyarrow")
    pandas.DataFrame({"messages": [CHAT, CHAT[:1]]}).to_parquet(tmp_path / "data.parquet")
    again = pandas.read_parquet(tmp_path / "data.parquet")  # its lists are arrays
    assert objects(again) == [{"messages": CHAT}, {"messages": CHAT[:1]}]


def test_rows_of_a_frame_are_made_only_while_they_are_read() -> None:
    """So a large frame does not become a list of dictionaries. `tune` looks at it twice and reads it once."""
    made = list[int]()

    class Frame:
        """Has the methods of a frame of polars."""

        columns = ("text",)

        def iter_rows(self, named: bool) -> Iterator[dict[str, Any]]:
            for number in range(1000):
                made.append(number)
                yield {"text": str(number)}

    [source] = splits_of("test", Frame()).train  # type: ignore[arg-type]
    assert not made
    rows = source.read()
    assert [next(rows).values for _ in range(2)] == [{"text": "0"}, {"text": "1"}]
    assert len(made) <= 2
    assert len(list(source.read())) == 1000


@pytest.mark.parametrize(("sign", "suffix"), [(";", "csv"), ("\t", "csv"), ("|", "tsv"), (",", "tsv")])
def test_another_separator_is_named(tmp_path: Path, sign: str, suffix: str) -> None:
    path = tmp_path / f"d.{suffix}"
    path.write_text(f"prompt{sign}completion\na{sign}b\n")
    [row] = read_rows(path)
    with pytest.raises(DataError, match=re.escape(f"{sign!r} seems to separate the columns; a .csv file ")):
        recognise(row.values, row.where)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    """One of them would be lost."""
    arrow = pytest.importorskip("pyarrow")
    columns = [arrow.array(["a"]), arrow.array(["b"]), arrow.array(["c"])]
    table = arrow.table(columns, names=["prompt", "prompt", "completion"])
    arrow.parquet.write_table(table, tmp_path / "d.parquet")
    with arrow.ipc.new_file(str(tmp_path / "d.arrow"), table.schema) as file:
        file.write_table(table)
    message = r"the columns are \['prompt', 'prompt', 'completion'\], expected a different name"
    given: list[Any] = [table, tmp_path / "d.parquet", tmp_path / "d.arrow"]
    pandas = pytest.importorskip("pandas")
    for data in (*given, pandas.DataFrame([["a", "b", "c"]], columns=table.column_names)):
        with pytest.raises(DataError, match=message):
            list(splits_of("test", data).train[0].read())


def test_frames_of_polars_are_rows() -> None:
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame({"messages": [CHAT, CHAT[:1]], "label": [True, None]})
    assert objects(frame) == [{"messages": CHAT, "label": True}, {"messages": CHAT[:1], "label": None}]


def test_a_test_split_is_evaluated_but_never_chooses_the_adapter() -> None:
    """Validation data choose the adapter that is saved, so a test set among them would say too much."""
    splits = {"train": ROWS, "test": ROWS[:1]}
    assert splits_of("test", splits).valid is None
    [source] = sources_of("test", splits)
    assert len(list(source.read())) == 1
    for name in ("valid", "validation", "eval"):
        [source] = splits_of("test", splits | {name: ROWS[:2]}).valid or []
        assert len(list(source.read())) == 2
        [source] = sources_of("test", splits | {name: ROWS[:2]})
        assert len(list(source.read())) == 2


@pytest.mark.slow
def test_datasets_of_hugging_face_are_rows() -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list([{"messages": CHAT}, {"messages": CHAT[:1]}])
    expected = [{"messages": CHAT}, {"messages": CHAT[:1]}]
    assert objects(dataset) == expected
    assert objects(dataset.to_iterable_dataset()) == expected
    splits = splits_of("test", datasets.DatasetDict({"train": dataset, "validation": dataset.select([0])}))
    assert splits.valid is not None
    assert [row.values for row in splits.valid[0].read()] == expected[:1]
    assert objects(datasets.Dataset.from_dict({"label": [1, 2]}).with_format("numpy")) == [
        {"label": 1},
        {"label": 2},
    ]


@pytest.mark.parametrize("data", [[], (), {"train": []}, iter([])])
def test_no_rows_are_refused(data: Any) -> None:
    with pytest.raises(DataError, match="test: data is empty, expected rows"):
        splits_of("test", data)


def test_a_row_that_is_no_dictionary_is_an_error_of_its_row() -> None:
    [source] = splits_of("test", [{"text": "a"}, ["text"]]).train
    assert str(list(source.read())[1].error) == "data, row 2: the row is ['text'], expected a dictionary"


def deep(levels: int) -> Any:
    value: Any = "a"
    for _ in range(levels):
        value = [value]
    return value


def cyclic() -> Any:
    row: dict[str, Any] = {}
    row["again"] = [row]
    return row


BAD_VALUES = [
    ("a\ud800", DataError, "a string holds half a surrogate pair"),
    ([{"role": "user\udfff"}], DataError, "a string holds half a surrogate pair"),
    ({"\ud800": 1}, DataError, "a string holds half a surrogate pair"),
    (deep(64), LimitError, "values nested more than 64 deep"),
    (deep(100_000), LimitError, "values nested more than 64 deep"),
    (cyclic(), LimitError, "values nested more than 64 deep"),
]


@pytest.mark.parametrize(("value", "error", "message"), BAD_VALUES, ids=range(len(BAD_VALUES)))
def test_a_value_that_no_text_can_hold_is_an_error_of_its_row(
    value: Any, error: type[FormatError], message: str
) -> None:
    pandas = pytest.importorskip("pandas")
    for rows in (
        [{"x": "é\U0001f600", "y": deep(63)}, {"x": value}],
        pandas.DataFrame({"x": ["a", value]}, dtype=object),
    ):
        [source] = splits_of("test", rows).train
        good, bad = source.read()
        assert good.error is None
        assert type(bad.error) is error
        assert str(bad.error) == f"data, row 2: {message}"


@pytest.mark.parametrize("data", [3, b"train.jsonl", object(), 1.5])
def test_what_is_no_data_is_refused(data: Any) -> None:
    with pytest.raises(TypeError, match="expected a path, paths, or rows"):
        splits_of("test", data)


def test_a_lazy_frame_of_polars_must_be_collected() -> None:
    polars = pytest.importorskip("polars")
    lazy = polars.LazyFrame({"text": ["a"]})
    words = (
        "test: data is a polars.lazyframe.frame.LazyFrame, expected a path, paths, or rows such as a list of "
        "dictionaries or a data frame; its method .collect() returns a data frame"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(words)}$"):
        splits_of("test", lazy)
    assert objects(lazy.collect()) == [{"text": "a"}]


@pytest.mark.parametrize("text", ["Hello, world", "a\nb", "x" * 5000, "Dr. No"])
def test_a_list_of_texts_is_no_list_of_rows(text: str) -> None:
    with pytest.raises(
        FileNotFoundError, match=r'if this is a text to train on, expected a row \{"text": …\}'
    ):
        splits_of("test", [text, "b"])
    with pytest.raises(FileNotFoundError, match=r"^\[\w+ 2\] (No such file|File not found)"):
        splits_of("test", ["no.jsonl"])


# ---- CoNLL files ----


def test_a_word_of_a_conll_file_keeps_its_characters(tmp_path: Path) -> None:
    """Only tabs divide the columns of a line that has one; other spaces of Unicode never do."""
    (tmp_path / "a.conll").write_text("New York\tB-LOC\n\u00a0x\u3000  NN   O\n", encoding="utf-8")
    first, second = "a.conll, line 2: 3 columns, expected 2", "New York\tB-LOC\n\n\u00a0x\u3000  NN   O\n"
    assert first in str(next(read_rows(tmp_path / "a.conll")).error)
    (tmp_path / "a.conll").write_text(second, encoding="utf-8")
    assert [(row.where.rpartition(" ")[2], row.values) for row in read_rows(tmp_path / "a.conll")] == [
        ("1", {"tokens": ["New York"], "tags": ["B-LOC"]}),
        ("3", {"tokens": ["\u00a0x\u3000"], "tags": ["O"]}),
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt", ".conll", ".jsonl.gz"])
def test_utf_16_is_named(tmp_path: Path, suffix: str) -> None:
    for order in ("utf-16-le", "utf-16-be"):
        content = "\ufefftext\na\n".encode(order)
        (tmp_path / f"d{suffix}").write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
        with pytest.raises(DataError, match=f"d{suffix}: begins like UTF-16, expected UTF-8"):
            list(read_rows(tmp_path / f"d{suffix}"))


def test_a_sentence_that_is_not_utf_8_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_bytes(b"a O\nb\xff O\n\nc O\n")
    bad, good = read_rows(tmp_path / "a.conll")
    assert isinstance(bad.error, DataError)
    assert str(bad.error).endswith("a.conll, line 2: not UTF-8 at byte 1")
    assert good.values == {"tokens": ["c"], "tags": ["O"]}


@pytest.mark.parametrize("space", ["\u3000", "\u00a0", "\u2028", "\x0c"])
def test_only_spaces_and_tabs_make_an_empty_line(space: str, tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text(f"a\n{space}\ncat\n \t\nb\n", encoding="utf-8")
    assert [row.values["tokens"] for row in read_rows(tmp_path / "a.conll")] == [["a", space, "cat"], ["b"]]


@pytest.mark.slow
def test_hostile_conll_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.conll"
    for line, number in ((b"a O\n", 262_145), (b"a " * 200_000 + b"\n", 42)):
        file.write_bytes(line * number)
        with pytest.raises(
            LimitError, match=rf"a\.conll, line {number}: the sentence has more than 262,144 words"
        ):
            list(read_rows(file))
        file.write_bytes(line * (number - 1) + b"\n" + line)
        assert len(list(read_rows(file))) == 2
