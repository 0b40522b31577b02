"""Examples for the training of embeddings: pairs, triplets and scored pairs of texts, read from rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.finetuning.data.bad_rows import BadRows
from nplora.finetuning.data.kinds import renamed
from nplora.finetuning.data.parsing.fields import Fields
from nplora.finetuning.data.rows import Row
from nplora.finetuning.data.sources import Data, Source, splits_of
from nplora.finetuning.embedding.batches import TextBatch, digest
from nplora.finetuning.options import parse_columns
from nplora.formats.errors import DataError, LimitError, brief, counted
from nplora.lm import Encoder
from nplora.nn import embedding_losses
from nplora.nn.embedding_losses import EmbeddingFunction, innermost

Array = npt.NDArray[Any]

FIELDS = ("anchor", "positive", "negative", "negatives", "sentence1", "sentence2", "score")


@dataclass(frozen=True)
class TextReport:
    """A summary of the examples; `print` shows it in a line.

    Attributes:
        source: the names of the files.
        examples: the number of examples.
        texts: the number of different texts.
        tokens: the number of tokens of all different texts.
        cut: the number of different texts that were longer than `max_length` tokens, and were cut.
        max_length: the maximum number of tokens that a text may have.
        skipped: the number of bad rows that were skipped.
        problems: the errors of the first few skipped rows.

    >>> import nplora
    >>> encoder = nplora.load_encoder("encoder-model")
    >>> report = nplora.embedding.read_examples([{"anchor": "a", "positive": "cat " * 60}], encoder).report
    >>> report.examples, report.cut, report.max_length
    (1, 1, 32)
    """

    source: str
    examples: int
    texts: int
    tokens: int
    cut: int
    max_length: int
    skipped: int = 0
    problems: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = (
            f"{self.source}: {counted(self.examples, 'example')}, {counted(self.texts, 'different text')}, "
            f"{counted(self.tokens, 'token')}"
        )
        if self.cut:
            words += f"; {counted(self.cut, 'text')} cut to {self.max_length:,} tokens"
        if self.skipped:
            words += f"; {counted(self.skipped, 'bad row')} skipped ({'; '.join(self.problems)})"
        return words


@dataclass(frozen=True)
class TextExamples:
    """Pairs of texts, perhaps with negatives or scores, as token ids. Equal texts are stored once.

    Attributes:
        tokens: int32, the token ids of all different texts, one text after the other.
        starts: int64 (texts + 1,), the index in `tokens` of the first token of each text; the last value is
            the length of `tokens`.
        first: int64 (examples,), for each example, the index in `starts` of its first text. If the examples
            are pairs of an anchor and a positive, this is the anchor.
        second: int64 (examples,), for each example, the index of its second text, such as the positive.
        negatives: int64, the indices of the negatives of all examples, one example after the other.
        negative_starts: int64 (examples + 1,), the index in `negatives` of the first negative of each
            example; the last value is the length of `negatives`.
        scores: float32 (examples,), or None.
        report: a summary.

    >>> import nplora
    >>> encoder = nplora.load_encoder("encoder-model")
    >>> examples = nplora.embedding.read_examples([{"anchor": "a cat", "positive": "the cat"}], encoder)
    >>> len(examples), [len(ids) for ids in examples.texts()]
    (1, [4, 4])
    """

    tokens: Array
    starts: Array
    first: Array
    second: Array
    negatives: Array
    negative_starts: Array
    scores: Array | None
    report: TextReport

    def __len__(self) -> int:
        return len(self.first)

    def ids(self, number: int) -> Array:
        """The token ids of a text."""
        return np.asarray(self.tokens[self.starts[number] : self.starts[number + 1]])

    def texts(self) -> list[Array]:
        """The token ids of all different texts."""
        return [self.ids(number) for number in range(len(self.starts) - 1)]

    def batch(self, indices: npt.ArrayLike) -> tuple[TextBatch, Array | None]:
        """A batch of the examples with these indices, and the scores of these examples (or None)."""
        rows = np.asarray(indices, np.int64)
        numbers = [self.first[rows], self.second[rows]]
        if len(self.negatives):
            spans = zip(self.negative_starts[rows], self.negative_starts[rows + 1], strict=True)
            numbers.append(np.concatenate([self.negatives[begin:end] for begin, end in spans]))
        columns = [[self.ids(number) for number in column] for column in numbers]
        return TextBatch(columns), None if self.scores is None else self.scores[rows]

    def fingerprint(self) -> str:
        """A SHA-256 of the examples."""
        numbers = (self.first, self.second, self.negatives, self.negative_starts)
        return digest(self.tokens, self.starts, *numbers, self.scores)


@_check.keywords
def read_examples(
    data: Data,
    encoder: Encoder,
    loss: str | EmbeddingFunction = "ranking",
    columns: Mapping[str, str] | str | None = None,
    prompts: str | Mapping[str, str] | None = None,
    max_length: int | None = None,
    skip_bad: bool = False,
) -> TextExamples:
    """Read pairs, triplets or scored pairs of texts for the training of embeddings.

    The loss decides which fields a row has:

    - "ranking": {"anchor": …, "positive": …}, and perhaps "negative": …, or "negatives": […].
    - "triplet": {"anchor": …, "positive": …, "negative": …}.
    - "cosine" and "cosent": {"sentence1": …, "sentence2": …, "score": …}.

        >>> import nplora
        >>> encoder = nplora.load_encoder("encoder-model")
        >>> rows = [{"anchor": "where is my parcel", "positive": "delivery is late"}]
        >>> print(nplora.embedding.read_examples(rows, encoder).report)
        data: 1 example, 2 different texts, 11 tokens

    Args:
        data: a file (.jsonl, .json, .csv, .tsv, .parquet or .arrow), several files, or rows, as in
            `nplora.data.read_dataset`. If `data` is a directory or a dictionary of splits, its training data
            is read.
        encoder: the model, which has the tokenizer.
        loss: the name of the loss, or the loss itself, such as `RankingLoss()`.
        columns: the names of the fields in the data, if they differ from the names above: a dict such as
            {"anchor": "question"}, or a text such as "anchor=question".
        prompts: a prompt to put before each text, or a dict from fields to prompts: {"anchor": "query: "}.
            None: the model's default prompt.
        max_length: the largest number of tokens of a text, with special tokens; None: the encoder's maximum.
            Longer texts are cut, and the report says how many.
        skip_bad: skip bad rows, and count them.
    Raises:
        DataError: a field is missing or empty or has a wrong type, a score is not finite, or there are no
            rows. The message names the file and the line.
        ValueError, TypeError: an argument has a wrong value or type.
        OSError: a file cannot be read.
    """
    op = "read_examples"
    return read_sources(op, splits_of(op, data).train, encoder, loss, columns, prompts, max_length, skip_bad)


def read_sources(
    op: str,
    sources: Sequence[Source],
    encoder: Encoder,
    loss: str | EmbeddingFunction,
    columns: Mapping[str, str] | str | None,
    prompts: str | Mapping[str, str] | None,
    max_length: int | None,
    skip_bad: bool = False,
) -> TextExamples:
    """Read the examples of several sources. For the other arguments, see `read_examples`."""
    function = embedding_losses.get(op, loss)
    names = _fields(op, "columns", parse_columns(columns, op))
    longest = encoder.max_length
    if max_length is not None:
        longest = _check.integer(op, "max_length", max_length, 1, encoder.config.max_position_embeddings)
    collected = _Collected(_prompts(op, encoder, prompts))
    bad = BadRows()
    for source in sources:
        for row in source.read():
            try:
                collected.add(_parsed(row, source, names, function))
            except (DataError, LimitError) as error:
                bad.skip(error, skip_bad)
    name = ", ".join(dict.fromkeys(source.name for source in sources))
    if not collected.first:
        raise DataError(f"{name}: no rows to train on{f'; {bad.reason()}' if bad.count else ''}")
    return collected.examples(name, encoder, longest, bad)


@dataclass(frozen=True)
class _Texts:
    """The texts of a row, and its score. Each text is stored as a tuple (name of its field, text)."""

    first: tuple[str, str]
    second: tuple[str, str]
    negatives: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    score: float | None = None


def _parsed(row: Row, source: Source, names: Mapping[str, str], loss: EmbeddingFunction) -> _Texts:
    """Read the fields of a row. Raise the row's error if it has one, or a DataError if a field is wrong."""
    if row.error is not None:
        raise row.error
    if source.is_text:
        raise DataError(f"{row.where}: a plain text has no pairs, expected a table or JSON")
    fields = Fields(renamed(row.values, names, row.where), row.where)
    if loss.needs_scores:
        first, second = (fields.text(name) for name in ("sentence1", "sentence2"))
        return _Texts(("sentence1", first), ("sentence2", second), score=_score(fields, loss))
    anchor, positive = ("anchor", fields.text("anchor")), ("positive", fields.text("positive"))
    negatives = [("negative", fields.text("negative"))] if fields.has("negative") else []
    if isinstance(innermost(loss), embedding_losses.TripletLoss):
        negatives = negatives or [("negative", fields.text("negative"))]
    elif fields.has("negatives"):
        negatives += [("negative", text) for text in _list(fields, "negatives")]
    return _Texts(anchor, positive, negatives)


def _list(fields: Fields, name: str) -> Iterator[str]:
    value = fields.get(name)
    if not isinstance(value, list):
        raise fields.error(f"{name} is {brief(value)}, expected a list of texts")
    for i, text in enumerate(value):
        if not isinstance(text, str) or not text.strip():
            raise fields.error(f"{name}[{i}] is {brief(text)}, expected a text")
        yield text


def _score(fields: Fields, loss: EmbeddingFunction) -> float:
    value = fields.get("score")
    try:
        score = float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        score = math.nan
    if isinstance(value, bool) or not abs(score) <= float(np.finfo(np.float32).max):
        raise fields.error(f"score is {brief(value)}, expected a number")
    if isinstance(innermost(loss), embedding_losses.CosineLoss) and not -1 <= score <= 1:
        raise fields.error(
            f"score is {score:g}, but a cosine is from -1 to 1; scale the scores to this range, or use "
            "loss 'cosent', for which only the order of the scores matters"
        )
    return score


def _fields(op: str, name: str, given: object) -> Mapping[str, str]:
    """Check an argument that must be a dict from names of fields to texts."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{op}: {name} is {_check.kind(given)}, expected a dictionary")
    for field, text in given.items():
        if field not in FIELDS:
            raise ValueError(f"{op}: {name} has {brief(field)}, expected one of {', '.join(FIELDS)}")
        if not isinstance(text, str):
            raise TypeError(f"{op}: {name}[{field!r}] is {_check.kind(text)}, expected a text")
    return given


def _prompts(op: str, encoder: Encoder, prompts: str | Mapping[str, str] | None) -> dict[str, str]:
    """The prompt of each field."""
    if isinstance(prompts, str | None):
        text = encoder.prompt_text(prompts)
        return dict.fromkeys(FIELDS, text)
    given = _fields(op, "prompts", prompts)
    return {name: encoder.prompt_text(given.get(name, "")) for name in FIELDS}


class _Collected:
    """Collects the texts of the rows, and numbers them. Equal texts get the same number."""

    def __init__(self, prompts: Mapping[str, str]) -> None:
        self._prompts = prompts
        self._numbers = dict[str, int]()
        self.first, self.second = list[int](), list[int]()
        self._negatives, self._negative_starts = list[int](), [0]
        self._scores = list[float]()

    def add(self, texts: _Texts) -> None:
        self.first.append(self._number(*texts.first))
        self.second.append(self._number(*texts.second))
        self._negatives += [self._number(*each) for each in texts.negatives]
        self._negative_starts.append(len(self._negatives))
        if texts.score is not None:
            self._scores.append(texts.score)

    def _number(self, field: str, text: str) -> int:
        return self._numbers.setdefault(self._prompts[field] + text, len(self._numbers))

    def examples(self, name: str, encoder: Encoder, longest: int, bad: BadRows) -> TextExamples:
        ids, cut = encoder.token_ids(list(self._numbers), longest)
        starts = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        tokens = np.concatenate([np.asarray(each, np.int32) for each in ids])
        report = TextReport(
            name, len(self.first), len(ids), len(tokens), cut, longest, bad.count, tuple(bad.problems)
        )  # fmt: skip
        numbers = (self.first, self.second, self._negatives, self._negative_starts)
        first, second, negatives, negative_starts = (np.array(each, np.int64) for each in numbers)
        scores = np.array(self._scores, np.float32) if self._scores else None
        return TextExamples(
            tokens, starts, first, second, negatives, negative_starts, scores, report
        )  # fmt: skip
