"""Untrusted JSON: what the standard library would accept, but RFC 8259 does not allow, is refused."""

import json
from typing import Any

import numpy as np
import pytest

from nplora.formats import strict_json
from nplora.formats.errors import FormatError, LimitError


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        -2,
        1.5,
        "text",
        'é\n"\\',
        "\U0001f600",
        [],
        {},
        {"b": [1, {"a": None}], "a": 2},
        "[" * 100,
        {'"[\\': "{"},
    ],
)
def test_json_is_read_as_the_standard_library_reads_it(value: Any) -> None:
    for ascii_only in (True, False):
        raw = json.dumps(value, ensure_ascii=ascii_only).encode()
        assert strict_json.loads(raw, "here") == value


def test_64_levels_are_read_and_65_refused() -> None:
    strict_json.loads(b"[" * 64 + b"]" * 64, "here")
    with pytest.raises(LimitError, match="here: JSON nested 65 deep, expected at most 64"):
        strict_json.loads(b"[" * 65 + b"]" * 65, "here")


def test_numbers_of_more_than_100_characters_are_refused() -> None:
    assert strict_json.loads(b"9" * 100, "here") == int("9" * 100)
    for raw in (b"9" * 101, b"0." + b"1" * 99):
        with pytest.raises(LimitError, match="101 characters"):
            strict_json.loads(raw, "here")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'{"a": 1, "b": 2, "a": 3}', "the name 'a' appears twice"),
        (b"[NaN]", "NaN is not JSON"),
        (b"-Infinity", "-Infinity is not JSON"),
        (b"1e400", "1e400 is beyond the range of float64"),
        (b'"\\udc00"', "half a surrogate pair"),
        (b'{"\\ud800x": 1}', "half a surrogate pair"),
        (b'"\xed\xa0\x80"', "not UTF-8 at byte 1"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'"a\nb"', "not JSON at character 2"),
        (b"{'a': 1}", "not JSON"),
        (b"[1,]", "not JSON"),
        (b"01", "not JSON"),
        (b"{} {}", "not JSON"),
        (b"", "not JSON"),
        (b"]" * 99 + b"[" * 99, "not JSON"),
    ],
)
def test_invalid_json_is_refused(raw: bytes, words: str) -> None:
    with pytest.raises(FormatError, match=words) as caught:
        strict_json.loads(raw, "here")
    assert caught.type is FormatError
    assert str(caught.value).startswith("here")


def test_values_for_json_have_none_in_place_of_what_json_lacks() -> None:
    inf, nan = float("inf"), float("nan")
    value = {"a": nan, "b": [1, 2.5, -inf, {"c": np.float64(nan)}], "d": (inf, "NaN", True, None)}
    found = strict_json.json_values(value)
    assert found == {"a": None, "b": [1, 2.5, None, {"c": None}], "d": [None, "NaN", True, None]}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert np.isnan(value["a"])  # the value itself is unchanged
