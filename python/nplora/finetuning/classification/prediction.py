"""evaluate_classifier and predict_rows: apply a classifier to rows of files or of Python."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.finetuning.classification.encoded import Encoded, cut_in_words, require_words, unit_of
from nplora.finetuning.classification.labelled import (
    Columns,
    Labelled,
    RowReader,
    Tagged,
    require_separator,
    require_tokens,
    rows_of,
    targets_of,
    text_of,
    unfit_tag,
)
from nplora.finetuning.classification.metrics import ClassificationReport
from nplora.finetuning.classification.tagged import WORDS, words_of
from nplora.finetuning.data import Data
from nplora.finetuning.data.bad_rows import BadRows
from nplora.finetuning.data.rows import Row
from nplora.finetuning.data.sources import Source, sources_of
from nplora.finetuning.options import parse_columns
from nplora.finetuning.token_progress import speaker
from nplora.formats.errors import DataError, LimitError, counted
from nplora.lm import TextClassifier
from nplora.lm.classifier import probabilities, require_finite
from nplora.lm.word_ids import WordIds
from nplora.runtime.user_warning import warn_user

Array = npt.NDArray[Any]

_ROWS = 1024  # rows that are predicted at a time


@_check.keywords
def evaluate_classifier(
    classifier: TextClassifier,
    data: Data,
    columns: Mapping[str, str] | str | None = None,
    separator: str = "|",
    skip_bad: bool = False,
    progress: bool | None = False,
) -> ClassificationReport:
    """Compare the predictions of a classifier with the labels of rows.

        >>> encoder = nplora.load_encoder("encoder-model")
        >>> classifier = nplora.new_classifier(encoder, ["order", "refund"])
        >>> rows = [{"text": "a refund", "label": "refund"}, {"text": "where is it", "label": "order"}]
        >>> report = nplora.finetuning.evaluate_classifier(classifier, rows)
        >>> report.examples, int(report.confusion.sum())
        (2, 2)

    Args:
        data: rows as for `train_classifier`. If `data` is a directory, its validation data are read; if it
            has none, its training data are read. A label may also be given by its index (from 0), as in data
            sets of transformers. If the classifier classifies tokens, rows have words and tags. Long
            sentences are read in windows, as in `predict_words`. Words without a token are left out.
        columns, separator, skip_bad: as for `train_classifier`.
        progress: print on stderr how many rows are done; None: only on a terminal or in a notebook.
    Raises:
        DataError: no word has a token; or a row is wrong, or has a label that the classifier does not know.
            With `skip_bad`, such rows are left out, and a warning says how many.
        ValueError: the classifier predicts several numbers, the separator is empty, or a logit is NaN or
            infinite.
        TypeError: the separator or the name of a column is not a text.
    Warns:
        UserWarning: texts were cut or empty, words have no token, or rows were skipped; or the tags look like
            tags of entities, but one of them fits no scheme such as IOB2.
    """
    op = "evaluate_classifier"
    if not isinstance(classifier, TextClassifier):
        kind = _check.kind(classifier)
        raise TypeError(f"{op}: classifier is {kind}, expected a classifier, as load_classifier returns it")
    require_separator(op, separator)
    labels = None if classifier.task == "regression" else classifier.labels
    if labels is None and len(classifier.labels) > 1:
        raise ValueError(
            f"{op}: the classifier predicts {len(classifier.labels)} numbers, but each row has only one"
        )
    task = task_of_rows(classifier)
    named = Columns.of(op, parse_columns(columns, op), task)
    reader = RowReader(named, task, separator, labels, numbered=True)
    rows = reader.read(sources_of(op, data), skip_bad)
    if rows.bad.count:
        warn_user(f"{op}: {rows.bad.reason()}")
    if task == "tokens" and (unfit := unfit_tag(classifier.labels, rows)):
        warn_user(f"{op}: {unfit}")
    predictor, done = _Predictor(op, classifier), _Done(progress, unit_of(classifier), len(rows))
    targets = targets_of(rows, task, classifier.labels)
    logits, truth = list[Array](), list[Array]()
    for begin in range(0, len(rows), _ROWS):
        own = slice(begin, begin + _ROWS)
        encoded = predictor.encoded(rows.rows[own])
        for where, text in zip(rows.places[own], encoded.ids, strict=True):
            require_tokens(where, text, predictor.unit)
        logits.append(predictor.logits(encoded, rows.places[own]))
        truth.extend(encoded.truth(targets[own]))
        done.add(len(encoded.ids))
    if task == "tokens":
        require_words(rows.names, sum(map(len, truth)))
    predictor.warn()
    known = truth if task == "tokens" else targets
    return ClassificationReport.of(task, classifier.labels, np.concatenate(logits), known)


def predict_rows(
    classifier: TextClassifier,
    data: Data,
    columns: Mapping[str, str] | str | None = None,
    skip_bad: bool = False,
    progress: bool | None = False,
    probabilities: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield each row with the prediction for its text.

    A row keeps its fields and gets "prediction". If labels are predicted, the row also gets "probabilities",
    the probability of each label by name, and "probability", the confidence of the prediction. If each text
    has one label, "probability" is the probability of the predicted label. If a text may have several labels,
    the classifier decides for each label whether the text has it. Each of these decisions has a probability,
    and "probability" is the smallest of them.

    If the classifier classifies tokens, the new fields have an item for each word, as in `predict_words`. The
    item is None if the tokenizer drops all characters of the word.

        >>> encoder = nplora.load_encoder("encoder-model")
        >>> classifier = nplora.new_classifier(encoder, ["order", "refund"])
        >>> row = next(nplora.finetuning.predict_rows(classifier, [{"id": 7, "text": "a refund"}]))
        >>> list(row), sorted(row["probabilities"])
        (['id', 'text', 'prediction', 'probability', 'probabilities'], ['order', 'refund'])

    Args:
        data: rows with a text or words, or a .txt file with a text in each line. Rows are read when they are
            needed. Words may also be given as a text with spaces.
        columns: the name of the field with the text or the words, as in text=review or tokens=words.
        skip_bad: leave out rows without a text, and warn at the end how many rows were left out.
        progress: as in `evaluate_classifier`.
        probabilities: if words are classified, also yield the field "probabilities". If texts are classified,
            this field is always there.
    Raises:
        DataError: a row has no text, its text has no tokens, or it already has one of the new fields. With
            `skip_bad`, such rows raise no error.
        ValueError: a logit is NaN or infinite.
    Warns:
        UserWarning: texts were cut or empty, words have no token, or rows were skipped.
    """
    return (row for _, row in predictions(classifier, data, columns, skip_bad, progress, probabilities))


def predictions(
    classifier: TextClassifier,
    data: Data,
    columns: Mapping[str, str] | str | None = None,
    skip_bad: bool = False,
    progress: bool | None = False,
    probabilities: bool = False,
) -> Iterator[tuple[Labelled, dict[str, Any]]]:
    """Yield the text or the words of each row, and what `predict_rows` yields for the row."""
    op = "predict_rows"
    named = Columns.of(op, parse_columns(columns, op), task_of_rows(classifier))
    predictor = _Predictor(op, classifier, named, probabilities)
    return _predicted(predictor, sources_of(op, data), skip_bad, progress)


def task_of_rows(classifier: TextClassifier) -> str:
    """The value of the option `task` with which `train_classifier` makes a classifier of this kind."""
    return "tokens" if classifier.classifies_tokens else classifier.task


def save_array(stream: BinaryIO, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the results of `predict_rows` to a .npy file.

    The array is float64: the probabilities (texts, labels), or the numbers of a regression (texts, 1).
    """
    values = [
        list(row["probabilities"].values()) if "probabilities" in row else [row["prediction"]] for row in rows
    ]
    np.save(stream, np.array(values, np.float64), allow_pickle=False)


def _predicted(
    predictor: _Predictor, sources: Iterable[Source], skip_bad: bool, progress: bool | None
) -> Iterator[tuple[Labelled, dict[str, Any]]]:
    bad, done, rows = BadRows(), _Done(progress, predictor.unit), _rows(sources, predictor.column)
    while held := list(itertools.islice(rows, _ROWS)):
        found = list[tuple[Row, Labelled]]()
        for row in held:
            try:
                found.append(predictor.read(row))
            except (DataError, LimitError) as error:
                bad.skip(error, skip_bad)
        encoded, kept = predictor.encoded([text for _, text in found]), list[int]()
        for i, (row, _) in enumerate(found):
            try:
                require_tokens(row.where, encoded.ids[i], predictor.unit)
            except DataError as error:
                bad.skip(error, skip_bad)
                continue
            kept.append(i)
        made = predictor.rows([found[i][0] for i in kept], encoded.part(kept))
        yield from zip((found[i][1] for i in kept), made, strict=True)
        done.add(len(kept))
    predictor.warn()
    if bad.count:
        warn_user(f"predict_rows: {bad.reason()}")


def _rows(sources: Iterable[Source], column: str) -> Iterator[Row]:
    """The rows of all sources. Each line of a plain text is a row."""
    for source in sources:
        if not source.is_text:
            yield from rows_of([source])
            continue
        number = 0
        for part in source.read():
            if part.error is not None:
                raise part.error
            for line in str(part.values["text"]).removesuffix("\n").split("\n"):
                number += 1
                yield Row(f"{source.name}, line {number}", {column: line})


class _Done:
    """Prints the number of finished texts or sentences, their number per second and, if the total is known,
    the time left.
    """

    def __init__(self, progress: bool | None, unit: str, total: int | None = None) -> None:
        self._say, self._unit, self._total = speaker(progress), unit, total
        self._count, self._begun = 0, time.monotonic()

    def add(self, count: int) -> None:
        self._count += count
        rate = self._count / max(1e-9, time.monotonic() - self._begun)
        done = "" if self._total is None else f"{self._count:,} of "
        done += counted(self._count if self._total is None else self._total, self._unit)
        left = "" if self._total is None else f", {(self._total - self._count) / rate:.0f} s left"
        self._say(f"{done}, {rate:.1f} {self._unit}s/s{left}")


class _Predictor:
    """Classifies texts or words, and counts texts that were cut or empty, and words without a token."""

    def __init__(
        self,
        op: str,
        classifier: TextClassifier,
        columns: Columns | None = None,
        with_probabilities: bool = False,
    ) -> None:
        self._op, self._classifier, self._columns = op, classifier, columns or Columns()
        self._with_probabilities = with_probabilities
        self._cut = self._lost = self._empty = 0

    @property
    def unit(self) -> str:
        """What a row holds: "sentence" or "text"."""
        return unit_of(self._classifier)

    @property
    def column(self) -> str:
        """The name of the field into which a line of a plain text file is put."""
        columns = self._columns
        return (columns.tokens or WORDS[0]) if self._classifier.classifies_tokens else columns.text

    def read(self, row: Row) -> tuple[Row, Labelled]:
        """Return the row, and its text or its words. If the row has words, the returned row has them as a
        list.

        Raises DataError if the row has no text, or has a field that the prediction would replace.
        """
        names = ["prediction"]
        if self._classifier.task != "regression":
            names += ["probability", "probabilities"]
        for name in names:
            if name in row.values:
                raise DataError(
                    f"{row.where}: the row already has a field {name!r}, but a field of this name is added "
                    "to each row; rename the row's field"
                )
        if not self._classifier.classifies_tokens:
            return row, Labelled(text_of(row, self._columns.text), ())
        name, words = words_of(row, self._columns.tokens)
        return Row(row.where, {**row.values, name: words}), Tagged(" ".join(words), (), tuple(words))

    def encoded(self, rows: Sequence[Labelled]) -> Encoded:
        made = Encoded.of(self._classifier, rows, whole=True)
        self._cut += made.cut
        self._lost += made.lost
        self._empty += sum(
            bool(own) and not row.text.strip() for row, own in zip(rows, made.ids, strict=True)
        )
        return made

    def logits(self, encoded: Encoded, places: list[str]) -> Array:
        ids, chosen = encoded.inputs(self._classifier)
        found = self._classifier.logits_of_ids(ids)[chosen]
        require_finite(self._op, found, encoded.places(places))
        return found

    def rows(self, held: list[Row], encoded: Encoded) -> Iterator[dict[str, Any]]:
        if not held:
            return
        classifier = self._classifier
        logits = self.logits(encoded, [row.where for row in held])
        decided = classifier.decided(logits)
        if classifier.task == "regression":
            for row, value in zip(held, decided, strict=True):
                yield {**row.values, "prediction": value}
            return
        chances = probabilities(classifier.task, logits)
        if encoded.words is not None:
            yield from self._tagged(held, encoded.words, decided, chances)
            return
        for row, value, own in zip(held, decided, chances, strict=True):
            chosen = own.max() if classifier.task == "single" else np.maximum(own, 1 - own).min()
            named = dict(zip(classifier.labels, own.tolist(), strict=True))
            yield {**row.values, "prediction": value, "probability": float(chosen), "probabilities": named}

    def _tagged(
        self, held: list[Row], words: WordIds, decided: list[Any], chances: Array
    ) -> Iterator[dict[str, Any]]:
        tags, chosen = words.per_word(decided), words.per_word(chances.max(axis=-1).tolist())
        each = words.per_word(chances.tolist()) if self._with_probabilities else None
        for i, row in enumerate(held):
            made = {**row.values, "prediction": tags[i], "probability": chosen[i]}
            if each is not None:
                made["probabilities"] = {
                    label: [None if one is None else one[k] for one in each[i]]
                    for k, label in enumerate(self._classifier.labels)
                }
            yield made

    def warn(self) -> None:
        """Warn of texts that were cut, of words without a label, and of empty texts."""
        if self._cut or self._lost:
            found = cut_in_words(self._cut, self._lost, self._classifier.max_length, self.unit)
            warn_user(f"{self._op}: {found}")
        if self._empty:
            found = counted(self._empty, f"empty {self.unit}")
            warn_user(f"{self._op}: {found}; the prediction for an empty {self.unit} means little")
