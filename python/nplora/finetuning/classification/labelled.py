"""Labelled texts: reads texts and targets from files or Python objects, with each row's file and line."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.finetuning.classification.entities import first_misfit, look_like_entities
from nplora.finetuning.classification.tagged import has_words, tags_of, words_of
from nplora.finetuning.data.bad_rows import BadRows
from nplora.finetuning.data.rows import Row
from nplora.finetuning.data.sources import Source
from nplora.finetuning.data.split import is_held_out
from nplora.formats.errors import DataError, LimitError, brief
from nplora.formats.label_record import LONGEST_LABEL

Array = npt.NDArray[Any]
Target = str | tuple[str, ...] | float  # a label, several labels, or a number
Targets = Array | list[Array]  # an array for all texts; if words are labelled, an array for each sentence

_MOST_SHOWN = 8  # labels in a message


@dataclass(frozen=True)
class Columns:
    """The names of the fields of a row.

    Attributes:
        text, label: the fields with the text and its label or labels.
        tokens, tags: the fields with the words and with the tag of each word; None: the field that has one of
            the usual names.
    """

    text: str = "text"
    label: str = "label"
    tokens: str | None = None
    tags: str | None = None

    @staticmethod
    def of(op: str, names: Mapping[str, str], task: str | None = None) -> Columns:
        """Raises ValueError for an unknown key, and TypeError for a value that is not the name of a field."""
        known = {"tokens": ("tokens", "tags")}.get(task or "", ("text", "label"))
        for ours, theirs in names.items():
            if not isinstance(theirs, str):
                raise TypeError(f"{op}: columns[{ours!r}] is {theirs!r}, expected the name of a field")
            if ours not in known:
                shown = (
                    "text or label, as in text=review"
                    if "text" in known
                    else "tokens or tags, as in tags=pos"
                )
                raise ValueError(f"{op}: columns has the key {ours!r}, expected {shown}")
        return Columns(**names)


@dataclass(frozen=True)
class Labelled:
    """A text and its target."""

    text: str
    target: Target


@dataclass(frozen=True)
class Tagged(Labelled):
    """A sentence whose target is the tag of each of its words."""

    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabelledTexts:
    """The texts and targets that were read from some sources.

    Attributes:
        names: the names of the sources, for messages.
        rows: the texts and targets.
        places: the file and line of each row, for messages.
        bad: the rows that were skipped.
        first_tags: a dict from each tag to a text for messages, which names the file, the line and the word
            where the tag first occurs. The tags are in the order of their first occurrences.
        other_labels: labels that are known even if no row has them.
    """

    names: str
    rows: list[Labelled]
    places: list[str]
    bad: BadRows
    first_tags: Mapping[str, str]
    other_labels: tuple[str, ...] = ()

    @property
    def texts(self) -> list[str]:
        return [row.text for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def labels(self, task: str) -> tuple[str, ...]:
        """All labels in their natural order: numbers by their value, then texts.

        Raises:
            DataError: no row has a label; or there is only one label, and the task is "single" or "tokens".
        """
        if task == "regression":
            return ("score",)
        given = (row.target if isinstance(row.target, tuple) else (str(row.target),) for row in self.rows)
        found = sorted({*self.other_labels, *(label for labels in given for label in labels)}, key=_natural)
        least = 2 if task in ("single", "tokens") else 1
        if len(found) < least:
            what = f"all rows have the label {found[0]!r}" if found else "no row has a label"
            raise DataError(f"{self.names}: {what}, expected at least {least} labels")
        return tuple(found)

    def fingerprint(self) -> str:
        """A SHA-256 of the texts, words and targets."""
        found = hashlib.sha256()
        for row in self.rows:
            found.update(repr(dataclasses.astuple(row)).encode())
        return found.hexdigest()

    def with_labels(self, labels: tuple[str, ...]) -> LabelledTexts:
        """Return a copy in which `labels` are known even if no row has them."""
        return dataclasses.replace(self, other_labels=labels)

    def divided(self, share: float) -> tuple[LabelledTexts, LabelledTexts]:
        """Divide the rows into rows to train on and held-out rows, by a hash of each text.

        Raises:
            DataError: one of the two parts is empty.
        """
        held = [is_held_out(text, share) for text in self.texts]
        if sum(held) in (0, len(held)):
            raise DataError(
                f"{self.names}: valid_split={share} holds out {sum(held)} of {len(held)} rows, expected some "
                "rows to train on and some to hold out"
            )
        return self._part([not each for each in held]), self._part(held)

    def _part(self, chosen: Sequence[bool]) -> LabelledTexts:
        rows = [row for row, is_chosen in zip(self.rows, chosen, strict=True) if is_chosen]
        places = [at for at, is_chosen in zip(self.places, chosen, strict=True) if is_chosen]
        return dataclasses.replace(self, rows=rows, places=places)


class RowReader:
    """Reads the text and the target of rows, and checks that all labels are of one type.

    Args:
        columns: the names of the fields.
        task: the task of a `TextClassifier`; or "tokens", if each word has a label.
        separator: the text between the labels of a row, if the row's labels are one text instead of a list.
        labels: the known labels; None: every label is accepted.
        numbered: whether rows may give the index of a label instead of the label, as in data sets of
            transformers. An integer that is itself a label is never read as an index.
    """

    def __init__(
        self,
        columns: Columns,
        task: str,
        separator: str,
        labels: Iterable[str] | None = None,
        numbered: bool = False,
    ) -> None:
        self._columns, self._task, self._separator = columns, task, separator
        self._known = None if labels is None else tuple(labels)
        # If labels are numbers themselves, a number in the data is a label, and never an index.
        self._numbered = numbered and not any(label.lstrip("+-").isdecimal() for label in self._known or ())
        self._by_name = _by_name(self._known or ())
        self._first: tuple[str, str, Any] | None = None  # kind, place and value of the first label
        self._first_tags = dict[str, str]()  # see `LabelledTexts`

    def read(self, sources: Sequence[Source], skip_bad: bool) -> LabelledTexts:
        """Read all rows.

        Raises:
            DataError: a row is wrong and `skip_bad` is not set, or there are no rows.
        """
        names, bad = ", ".join(source.name for source in sources), BadRows()
        rows, places = list[Labelled](), list[str]()
        for row in rows_of(sources):
            try:
                made = self._labelled(row)
            except (DataError, LimitError) as error:
                bad.skip(error, skip_bad)
                continue
            rows.append(made)
            places.append(row.where)
        if not rows:
            reason = f": {bad.reason()}" if bad.count else ""
            raise DataError(f"{names}: no rows to read{reason}")
        return LabelledTexts(names, rows, places, bad, self._first_tags)

    def _labelled(self, row: Row) -> Labelled:
        if self._task == "tokens":
            _, words = words_of(row, self._columns.tokens)
            if not words:
                raise DataError(f"{row.where}: the sentence has no words")
            tags = tags_of(row, self._columns.tags, words)
            labels = tuple(self._label(tag, at) for at, tag in tags)
            for label, word, (at, _) in zip(labels, words, tags, strict=True):
                if label not in self._first_tags:
                    self._first_tags[label] = f"{at}: the tag {brief(label)} of {brief(word)}"
            return Tagged(" ".join(words), labels, tuple(words))
        text = text_of(row, self._columns.text)
        if not text.strip():
            raise DataError(f"{row.where}: the text is empty")
        value = _field(row, "label", self._columns.label)
        if self._task == "regression":
            return Labelled(text, _number(value, row.where))
        if self._task == "single":
            return Labelled(text, self._label(value, row.where))
        if isinstance(value, str):
            value = [part.strip() for part in value.split(self._separator) if part.strip()]
        items = value if isinstance(value, list) else [value]
        return Labelled(text, tuple(dict.fromkeys(self._label(item, row.where) for item in items)))

    def _label(self, value: Any, where: str) -> str:
        if isinstance(value, float) and value.is_integer():  # from a pandas column with missing values
            value = int(value)
        kind = {str: "a text", int: "a number", bool: "a boolean"}.get(type(value))
        if kind is None:
            may_be_numbers = _is_float(value) and self._task != "tokens"
            hint = "; --task regression (task='regression') predicts numbers" if may_be_numbers else ""
            raise DataError(f"{where}: the label is {brief(value)}, expected a text or an integer{hint}")
        name = str(value).strip()
        if not name:
            raise DataError(f"{where}: the label is empty")
        if len(name) > LONGEST_LABEL:
            raise DataError(
                f"{where}: the label has {len(name):,} characters, expected at most {LONGEST_LABEL:,}"
            )
        first = self._first = self._first or (kind, where, value)
        if first[0] != kind:
            raise DataError(
                f"{where}: the label {brief(value)} is {kind}, but the label {brief(first[2])} ({first[1]}) "
                f"is {first[0]}; expected labels of one type"
            )
        return name if self._known is None else self._found(value, name, where)

    def _found(self, value: str | int, name: str, where: str) -> str:
        """Return the known label that matches a value in a row. The value is a label or the index of a
        label."""
        assert self._known is not None
        if str(value) in self._known:
            return str(value)
        if name in self._by_name:
            return self._by_name[name]
        if self._numbered and type(value) is int and 0 <= value < len(self._known):
            return self._known[value]
        shown = ", ".join(map(brief, self._known[:_MOST_SHOWN]))
        more = ", …" if len(self._known) > _MOST_SHOWN else ""
        raise DataError(f"{where}: the label {brief(name)} is unknown, expected one of {shown}{more}")


def task_of(task: str | None, columns: Mapping[str, str], sources: Sequence[Source]) -> str:
    """Return `task`. If `task` is None, return "tokens" if the rows have words and no text, else "single".

    The keys of `columns` show whether the rows have words or texts. If `columns` is empty, the fields of the
    first row without an error decide.
    """
    if task is not None or not {"text", "label"}.isdisjoint(columns):
        return task or "single"
    if not {"tokens", "tags"}.isdisjoint(columns):
        return "tokens"
    rows = itertools.chain.from_iterable(source.read() for source in sources if not source.is_text)
    first = next((row for row in rows if row.error is None), None)
    return (
        "tokens" if first is not None and first.values.get("text") is None and has_words(first) else "single"
    )


def require_separator(op: str, separator: object) -> None:
    """Raise TypeError if the separator of labels is not a text, or ValueError if it is empty."""
    if not isinstance(separator, str):
        raise TypeError(f"{op}: separator is {separator!r}, expected a text")
    if not separator:
        raise ValueError(f"{op}: separator is '', expected a text")


def require_tokens(where: str, ids: Sequence[int], unit: str) -> None:
    """Raise DataError if a text has no tokens. Some language models have no tokens for an empty text.

    Args:
        unit: "text" or "sentence", for the message.
    """
    if not ids:
        raise DataError(f"{where}: the {unit} has no tokens, expected at least one word")


def rows_of(sources: Iterable[Source]) -> Iterator[Row]:
    """All rows. Raises ValueError for a plain text, which has no rows."""
    for source in sources:
        if source.is_text:
            raise ValueError(f"{source.name}: a plain text has no rows; expected a table or JSON lines")
        yield from source.read()


def text_of(row: Row, column: str) -> str:
    """The text of a row.

    Raises DataError if the row has no text, or the error that occurred when the row was read.
    """
    value = _field(row, "text", column)
    if not isinstance(value, str):
        raise DataError(f"{row.where}: {column!r} is {brief(value)}, expected a text")
    return value


def _field(row: Row, ours: str, column: str) -> Any:
    """The value of a field, whose name is `ours` by default."""
    if row.error is not None:
        raise row.error
    if column not in row.values:
        raise DataError(
            f"{row.where}: no field {column!r}, only {brief(list(row.values))}; --columns {ours}=NAME names "
            "another field"
        )
    return row.values[column]


def _number(value: Any, where: str) -> float:
    wrong = DataError(f"{where}: the target is {brief(value)}, expected a finite number")
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise wrong from None
    if not abs(number) <= float(np.finfo(np.float32).max):  # also refuses NaN
        raise wrong
    return number


def _is_float(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _by_name(labels: Sequence[str]) -> dict[str, str]:
    """A dict from each label without its surrounding spaces to the label as it is.

    Labels that differ only in surrounding spaces have no entry.
    """
    counts = Counter(label.strip() for label in labels)
    return {label.strip(): label for label in labels if counts[label.strip()] == 1}


def _natural(label: str) -> tuple[int, float, str]:
    """A sort key: labels that are integers come first, ordered by their value."""
    digits = label.removeprefix("-")
    if digits.isascii() and digits.isdigit() and len(digits) < 300:
        return 0, float(label), label
    return 1, 0.0, label


def targets_of(rows: LabelledTexts, task: str, labels: Sequence[str]) -> Targets:
    """The targets in the form that the loss function of `task` takes. n is the number of rows.

    - "single": the indices of the labels, int64 (n,).
    - "multi": 1 for each label that a row has, else 0, float32 (n, labels).
    - "regression": the numbers, float32 (n, 1).
    - "tokens": for each sentence, an array with the indices of its words' labels, int64 (words,).

    Raises:
        DataError: a label is not among `labels`.
    """
    if task == "regression":
        return np.array([[row.target] for row in rows.rows], np.float32)
    index = {label: i for i, label in enumerate(labels)}
    if task == "single":
        return np.array([index[str(row.target)] for row in rows.rows], np.int64)
    if task == "tokens":
        return [np.array([index[tag] for tag in _several(row)], np.int64) for row in rows.rows]
    made = np.zeros((len(rows), len(labels)), np.float32)
    for i, row in enumerate(rows.rows):
        made[i, [index[label] for label in _several(row)]] = 1
    return made


def unfit_tag(labels: Sequence[str], *data: LabelledTexts) -> str:
    """Return a message about the first tag that fits no scheme of entities.

    If a tag fits no scheme, reports have no scores of entities. The message is empty if all tags fit a
    scheme, or if the tags do not look like tags of entities.

    Args:
        labels: all labels. data: the sentences with the tags.
    """
    places = dict[str, str]()
    for found in (*(rows.first_tags for rows in data), {each: f"the label {brief(each)}" for each in labels}):
        places |= {tag: place for tag, place in found.items() if tag not in places}
    wrong = first_misfit(places)
    if wrong is None or not look_like_entities(labels):
        return ""
    return (
        f"{places[wrong]} fits no scheme of entity tags, so reports have no scores of entities; expected O, "
        "or a letter, a hyphen and a kind of entity, such as B-PER. All tags must use letters of the same "
        "set: B, I, E and S, or B, I, L and U"
    )


def _several(row: Labelled) -> tuple[str, ...]:
    assert isinstance(row.target, tuple)
    return row.target
