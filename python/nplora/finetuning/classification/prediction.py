"""evaluate_classifier and predict_rows: apply a classifier to rows of files or of Python."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.finetuning.classification.labelled import (
    Columns,
    RowReader,
    require_separator,
    require_tokens,
    rows_of,
    targets_of,
    text_of,
)
from nplora.finetuning.classification.metrics import ClassificationReport
from nplora.finetuning.data import Data
from nplora.finetuning.data.bad_rows import BadRows
from nplora.finetuning.data.rows import Row
from nplora.finetuning.data.sources import Source, sources_of
from nplora.finetuning.options import parse_columns
from nplora.finetuning.token_progress import speaker
from nplora.formats.errors import DataError, LimitError, counted
from nplora.lm import TextClassifier
from nplora.lm.classifier import probabilities, require_finite
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
        data: rows as for `train_classifier`. In a directory, the validation data are read, or else train.csv.
            A label may also be given by its number, counted from 0, as in data sets of transformers.
        columns, separator, skip_bad: as for `train_classifier`.
        progress: print on stderr how many rows are done; None: only on a terminal or in a notebook.
    Raises:
        DataError: a row is wrong, or has a label that the classifier does not know. With `skip_bad`, such
            rows are left out, and a warning says how many.
        ValueError: the classifier classifies tokens or predicts several numbers, the separator is empty, or a
            logit is NaN or infinite.
        TypeError: the separator or the name of a column is not a text.
    Warns:
        UserWarning: texts were cut, or rows were skipped.
    """
    op = "evaluate_classifier"
    _require_texts(op, classifier)
    require_separator(op, separator)
    labels = None if classifier.task == "regression" else classifier.labels
    if labels is None and len(classifier.labels) > 1:
        raise ValueError(f"{op}: the classifier predicts {len(classifier.labels)} numbers, but rows have one")
    named = Columns.of(op, parse_columns(columns, op))
    reader = RowReader(named, classifier.task, separator, labels, numbered=True)
    rows = reader.read(sources_of(op, data), skip_bad)
    if rows.bad.count:
        warn_user(f"{op}: {rows.bad.reason()}")
    predictor, done = _Predictor(op, classifier), _Done(progress, len(rows))
    parts = list[Array]()
    every = rows.texts
    for begin in range(0, len(rows), _ROWS):
        own = slice(begin, begin + _ROWS)
        ids = predictor.token_ids(every[own])
        for where, text in zip(rows.places[own], ids, strict=True):
            require_tokens(where, text)
        parts.append(predictor.logits(ids, rows.places[own]))
        done.add(len(ids))
    predictor.warn()
    targets = targets_of(rows, classifier.task, classifier.labels)
    return ClassificationReport.of(classifier.task, classifier.labels, np.concatenate(parts), targets)


def predict_rows(
    classifier: TextClassifier,
    data: Data,
    columns: Mapping[str, str] | str | None = None,
    skip_bad: bool = False,
    progress: bool | None = False,
) -> Iterator[dict[str, Any]]:
    """Yield each row with the prediction for its text.

    A row keeps its fields and gets "prediction". If labels are predicted, the row also gets "probabilities",
    the probability of each label by name, and "probability", the confidence of the prediction. If each text
    has one label, "probability" is the probability of the predicted label. If texts may have several labels,
    a decision is made about each label. Then "probability" is the smallest probability of these decisions.

        >>> encoder = nplora.load_encoder("encoder-model")
        >>> classifier = nplora.new_classifier(encoder, ["order", "refund"])
        >>> row = next(nplora.finetuning.predict_rows(classifier, [{"id": 7, "text": "a refund"}]))
        >>> list(row), sorted(row["probabilities"])
        (['id', 'text', 'prediction', 'probability', 'probabilities'], ['order', 'refund'])

    Args:
        data: rows with a text, or a .txt file, each line of which is a text. Rows are read when they are
            needed.
        columns: the name of the field with the text, as in text=review.
        skip_bad: leave out rows without a text, and warn at the end how many rows were left out.
        progress: as in `evaluate_classifier`.
    Raises:
        DataError: a row has no text, a text has no tokens, or a row has a field with the name of one of the
            new ones, and `skip_bad` is not set.
        ValueError: the classifier classifies tokens, or a logit is NaN or infinite.
    Warns:
        UserWarning: texts were cut, texts were empty, or rows were skipped.
    """
    op = "predict_rows"
    _require_texts(op, classifier)
    column = Columns.of(op, parse_columns(columns, op)).text
    return _predicted(_Predictor(op, classifier), sources_of(op, data), column, skip_bad, progress)


def save_array(stream: BinaryIO, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the results of `predict_rows` to a .npy file.

    The array is float64: the probabilities (texts, labels), or the numbers of a regression (texts, 1).
    """
    values = [
        list(row["probabilities"].values()) if "probabilities" in row else [row["prediction"]] for row in rows
    ]
    np.save(stream, np.array(values, np.float64), allow_pickle=False)


def _predicted(
    predictor: _Predictor, sources: Iterable[Source], column: str, skip_bad: bool, progress: bool | None
) -> Iterator[dict[str, Any]]:
    bad, done, rows = BadRows(), _Done(progress), _rows(sources, column)
    while held := list(itertools.islice(rows, _ROWS)):
        found = list[tuple[Row, str]]()
        for row in held:
            try:
                predictor.require_free_names(row)
                found.append((row, text_of(row, column)))
            except (DataError, LimitError) as error:
                bad.skip(error, skip_bad)
        kept, ids = list[Row](), list[list[int]]()
        for (row, _), own in zip(found, predictor.token_ids([text for _, text in found]), strict=True):
            try:
                require_tokens(row.where, own)
            except DataError as error:
                bad.skip(error, skip_bad)
                continue
            kept.append(row)
            ids.append(own)
        yield from predictor.rows(kept, ids)
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
    """Prints the number of finished texts, the texts per second and, if the total is known, the time left."""

    def __init__(self, progress: bool | None, total: int | None = None) -> None:
        self._say, self._total = speaker(progress), total
        self._count, self._begun = 0, time.monotonic()

    def add(self, count: int) -> None:
        self._count += count
        rate = self._count / max(1e-9, time.monotonic() - self._begun)
        total = "" if self._total is None else f" of {self._total:,}"
        left = "" if self._total is None else f", {(self._total - self._count) / rate:.0f} s left"
        self._say(f"{self._count:,}{total} texts, {rate:.1f} texts/s{left}")


class _Predictor:
    """Predicts texts, and counts those that were cut or empty."""

    def __init__(self, op: str, classifier: TextClassifier) -> None:
        self._op, self._classifier = op, classifier
        self._cut = self._empty = 0

    def require_free_names(self, row: Row) -> None:
        """Raise DataError if a row has a field that the prediction would replace."""
        names = ["prediction"]
        if self._classifier.task != "regression":
            names += ["probability", "probabilities"]
        for name in names:
            if name in row.values:
                raise DataError(f"{row.where}: the field {name!r} has the name of a new field; rename it")

    def token_ids(self, texts: list[str]) -> list[list[int]]:
        ids, cut = self._classifier.encoder.token_ids(texts, self._classifier.max_length)
        self._cut += cut
        self._empty += sum(bool(own) and not text.strip() for text, own in zip(texts, ids, strict=True))
        return ids

    def logits(self, ids: list[list[int]], places: list[str]) -> Array:
        found = self._classifier.logits_of_ids(ids)
        require_finite(self._op, found, places)
        return found

    def rows(self, held: list[Row], ids: list[list[int]]) -> Iterator[dict[str, Any]]:
        if not held:
            return
        classifier = self._classifier
        logits = self.logits(ids, [row.where for row in held])
        decided = classifier.decided(logits)
        if classifier.task == "regression":
            for row, value in zip(held, decided, strict=True):
                yield {**row.values, "prediction": value}
            return
        chances = probabilities(classifier.task, logits)
        for row, value, own in zip(held, decided, chances, strict=True):
            chosen = own.max() if classifier.task == "single" else np.maximum(own, 1 - own).min()
            named = dict(zip(classifier.labels, own.tolist(), strict=True))
            yield {**row.values, "prediction": value, "probability": float(chosen), "probabilities": named}

    def warn(self) -> None:
        """Warn of texts that were cut, and of empty texts."""
        longest = self._classifier.max_length
        if self._cut:
            warn_user(f"{self._op}: {counted(self._cut, 'text')} had more than {longest} tokens and were cut")
        if self._empty:
            warn_user(f"{self._op}: {counted(self._empty, 'empty text')}; the predictions mean little")


def _require_texts(op: str, classifier: TextClassifier) -> None:
    if classifier.classifies_tokens:
        raise ValueError(f"{op}: the classifier classifies tokens, expected one of whole texts")
