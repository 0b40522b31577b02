"""Judge: the data of an evaluation, ready to measure one model after another."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nplora.finetuning.data import DataReport, Dataset
from nplora.finetuning.data.comparisons import PairDataset, read_pairs
from nplora.finetuning.data.dataset import ReadOptions, kind_of, read_sources
from nplora.finetuning.data.examples import Example, MultipleChoice
from nplora.finetuning.data.kinds import BY_NAME, Fields, Kind, renamed
from nplora.finetuning.data.rows import Row
from nplora.finetuning.data.sources import Source
from nplora.finetuning.judging.answers import Asked, asked, measure_answers
from nplora.finetuning.judging.choices import Choices, encode_choices, measure_choices
from nplora.finetuning.judging.metrics import Metric
from nplora.finetuning.judging.pairs import PairScores
from nplora.finetuning.judging.statistics import Measured
from nplora.finetuning.judging.tokens import measure_tokens
from nplora.finetuning.load import require_vocabulary
from nplora.formats.errors import DataError, FormatError, LimitError, counted
from nplora.lm import LanguageModel
from nplora.runtime.user_warning import warn_user

_CHOICE, _PAIR = "choice", "preference"  # kinds of rows
_QUOTED = 3  # bad rows that a report quotes

Record = Callable[[dict[str, Any]], None]


@dataclass
class Judge:
    """What a model is measured on.

    Attributes:
        report: a summary of the data.
        metrics: the metrics of generated answers.
        max_new_tokens: the maximum length of an answer.
        dataset: the examples to compute a loss on; None if the rows are of another kind.
        choices: the multiple-choice questions; empty if the rows are of another kind.
        asked: the prompts to answer.
        pairs: the preference pairs; None if the rows are of another kind.
    """

    report: DataReport
    metrics: list[Metric]
    max_new_tokens: int
    dataset: Dataset | None = None
    choices: list[Choices] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    pairs: PairDataset | None = None
    _reference: PairScores | None = None

    def refer_to(self, lm: LanguageModel) -> None:
        """Take a model without an adapter as the reference of preference pairs."""
        if self.pairs is not None:
            self._reference = PairScores(lm, self.pairs)

    def measure(self, lm: LanguageModel, record: Record = lambda entry: None) -> list[Measured]:
        """Measure a model.

        Args:
            record: is called with the results for each question and each generated answer.
        """
        if self.pairs is not None:
            found = PairScores(lm, self.pairs).measured(self._reference)
        elif self.dataset is None:
            found = measure_choices(lm, self.choices, record)
        else:
            found = measure_tokens(lm, self.dataset)
        if self.metrics:
            found += measure_answers(lm, self.asked, self.metrics, self.max_new_tokens, record)
        return found


def read_judge(
    op: str,
    lm: LanguageModel,
    sources: list[Source],
    reading: ReadOptions,
    metrics: list[Metric],
    max_new_tokens: int,
) -> Judge:
    """Read the data of an evaluation.

    Raises:
        DataError: a row is wrong; a row has no prompt, although answers are to be generated; or there are no
            examples. The other errors are those of `read_dataset`.
    """
    kind = _kind(sources, reading)
    if kind == _CHOICE:
        judge = _of_choices(lm, sources, reading, metrics, max_new_tokens)
    elif kind == _PAIR:
        if metrics:
            raise ValueError(f"{op}: metric is for generated answers, but the rows are pairs of answers")
        pairs = read_pairs(op, sources, lm.tokenizer, reading, "eval", PairDataset)
        require_vocabulary(lm, pairs)
        judge = Judge(pairs.report, metrics, max_new_tokens, pairs=pairs)
    else:
        dataset = read_sources(op, sources, lm.tokenizer, reading)
        require_vocabulary(lm, dataset)
        judge = Judge(dataset.report, metrics, max_new_tokens, dataset)
    if metrics:
        bad = _Bad(reading.skip_bad)
        judge.asked = list(_asked(lm, sources, reading, judge.choices, bad))
        if not judge.asked:
            raise DataError(f"{judge.report.source}: no prompt to answer: {'; '.join(bad.problems)}")
        if bad.count:
            rows = counted(bad.count, "row")
            warn_user(f"{op}: {rows} of {judge.report.source} not answered: {'; '.join(bad.problems)}")
    return judge


def _kind(sources: list[Source], reading: ReadOptions) -> str | None:
    """The kind of the first good row; None if there is no such row."""
    if reading.format is not None:
        return reading.format
    for source in sources:
        for row in itertools.islice(() if source.is_text else source.read(), 100):
            try:
                return kind_of(row, None, reading, _any_kind).name
            except (DataError, LimitError):
                continue  # reported when all rows are read
    return None


def _any_kind(kind: Kind, where: str) -> None:
    """Accept any kind of rows."""


def _require_choice(kind: Kind, where: str) -> None:
    if kind.name != _CHOICE:
        raise DataError(
            f"{where}: has {kind.fields}, and the rows before have {BY_NAME[_CHOICE].fields}; expected one "
            "format in all files"
        )


class _Bad:
    """Counts bad rows, if they may be skipped."""

    def __init__(self, may_skip: bool) -> None:
        self._may_skip, self.count, self.problems = may_skip, 0, list[str]()

    def skip(self, error: FormatError) -> None:
        if not self._may_skip:
            raise error
        self.count += 1
        if len(self.problems) < _QUOTED:
            self.problems.append(str(error))


def _examples(
    sources: list[Source], reading: ReadOptions, require: Callable[[Kind, str], None], bad: _Bad
) -> Iterator[tuple[Example, Row]]:
    for source in sources:
        if source.is_text:
            raise DataError(f"{source.name}: a plain text has no prompts, expected rows with prompts")
        kind = None if reading.format is None else BY_NAME[reading.format]
        for row in source.read():
            try:
                kind = kind_of(row, kind, reading, require)
                yield kind.parse(Fields(renamed(row.values, reading.columns, row.where), row.where)), row
            except (DataError, LimitError) as error:
                bad.skip(error)


def _of_choices(
    lm: LanguageModel,
    sources: list[Source],
    reading: ReadOptions,
    metrics: list[Metric],
    max_new_tokens: int,
) -> Judge:
    bad, found = _Bad(reading.skip_bad), list[Choices]()
    for example, row in _examples(sources, reading, _require_choice, bad):
        assert isinstance(example, MultipleChoice)
        try:
            choices = encode_choices(lm.tokenizer, example, row.where, reading.chat)
            _require_room(choices, reading.max_length, lm.vocab_size)
        except (DataError, LimitError) as error:
            bad.skip(error)
        else:
            found.append(choices)
    return Judge(_report(sources, found, bad), metrics, max_new_tokens, choices=found)


def _require_room(choices: Choices, most: int | None, vocab_size: int) -> None:
    if most is not None and choices.longest > most:
        raise DataError(
            f"{choices.where}: the prompt and a choice have {counted(choices.longest, 'token')}, "
            f"expected at most {most:,}"
        )
    largest = max(map(max, [choices.prompt, *choices.continuations]))
    if largest >= vocab_size:
        raise FormatError(
            f"{choices.where}: the text has token {largest}, but the model's vocabulary ends with "
            f"{vocab_size - 1}"
        )


def _report(sources: list[Source], found: list[Choices], bad: _Bad) -> DataReport:
    name = ", ".join(source.name for source in sources)
    if not found:
        skipped = (
            f": {counted(bad.count, 'bad row')} skipped ({'; '.join(bad.problems)})" if bad.count else ""
        )
        raise DataError(f"{name}: no examples{skipped}")
    right = [len(q.continuations[q.answer]) for q in found]
    lengths = np.array([len(q.prompt) for q in found]) + right
    return DataReport(
        name, len(found), int(lengths.sum()), sum(right), int(lengths.min()), int(np.median(lengths)),
        int(lengths.max()), 0, 0, bad.count, tuple(bad.problems), kind=_CHOICE,
    )  # fmt: skip


def _asked(
    lm: LanguageModel, sources: list[Source], reading: ReadOptions, choices: list[Choices], bad: _Bad
) -> Iterator[Asked]:
    """The prompts of all good rows. `bad` counts the good rows without a prompt that can be answered."""
    context, counted_before = lm.config.max_position_embeddings, _Bad(reading.skip_bad)
    questions = {question.where for question in choices}
    require = _require_choice if choices else _any_kind
    for example, row in _examples(sources, reading, require, counted_before):
        if choices and row.where not in questions:
            continue
        try:
            question = asked(lm.tokenizer, example, row.values, row.where, reading.chat)
            if len(question.ids) >= context:
                raise DataError(
                    f"{row.where}: the prompt has {counted(len(question.ids), 'token')}, the model's context "
                    f"is {context:,}"
                )
        except (DataError, LimitError) as error:
            bad.skip(error)
        else:
            yield question
