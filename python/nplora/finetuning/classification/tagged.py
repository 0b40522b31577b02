"""Tagged sentences: reads the words of a row and the tag of each word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nplora.finetuning.data.rows import Row
from nplora.formats.errors import DataError, brief, counted
from nplora.tokenizer.words import is_word

# The usual names of the fields with words and with tags in data sets of Hugging Face.
WORDS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "labels")


def has_words(row: Row) -> bool:
    """Whether a row has a field with one of the usual names for words, which are in `WORDS`."""
    return any(row.values.get(name) is not None for name in WORDS)


def words_of(row: Row, column: str | None) -> tuple[str, list[str]]:
    """The words of a row, and the name of their field. If the field is a text, it is divided at its spaces.

    Args:
        column: the name of the field; None: one of the names in `WORDS`.
    Raises:
        DataError: the row has no such field, or the field is not a list of words.
        Other errors: an error that occurred when the row was read.
    """
    name, words = _items(row, "tokens", column, WORDS)
    for i, word in enumerate(words):
        if not is_word(word):
            raise DataError(f"{row.place_of(name, i)}: the word is {brief(word)}, expected a text")
    return name, words


def tags_of(row: Row, column: str | None, words: Sequence[str]) -> list[tuple[str, Any]]:
    """Return (place, tag) for each word. The place says where the tag is, for messages.

    The tags are in the field `column`. If `column` is None, the field has one of the names in `TAGS`. For the
    errors, see `words_of`.
    """
    name, tags = _items(row, "tags", column, TAGS)
    if len(tags) != len(words):
        raise DataError(
            f"{row.where}: {name!r} has {counted(len(tags), 'tag')}, expected {len(words)}, one for each word"
        )
    return [(row.place_of(name, i), tag) for i, tag in enumerate(tags)]


def _items(row: Row, ours: str, column: str | None, usual: Sequence[str]) -> tuple[str, list[Any]]:
    """The name and the items of a list field."""
    if row.error is not None:
        raise row.error
    present = [name for name in (usual if column is None else [column]) if name in row.values]
    found = [name for name in present if row.values[name] is not None] or present[:1]
    hint = f"--columns {ours}=NAME"
    if not found:
        names = " or ".join(map(repr, usual if column is None else [column]))
        raise DataError(
            f"{row.where}: no field {names}, only {brief(list(row.values))}; {hint} names another field"
        )
    if len(found) > 1:
        raise DataError(
            f"{row.where}: the row has the fields {' and '.join(map(repr, found))}; {hint} chooses one"
        )
    value = row.values[found[0]]
    if isinstance(value, str):
        value = value.split()
    if not isinstance(value, list):
        raise DataError(f"{row.where}: {found[0]!r} is {brief(value)}, expected a list")
    return found[0], value
