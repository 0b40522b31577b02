"""Judge: holds the data of an evaluation, and measures one model after another."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from nplora.finetuning.data import DataReport, Dataset
from nplora.finetuning.data.bad_rows import BadRows
from nplora.finetuning.data.builder import warn_of_unused
from nplora.finetuning.data.choices import Choices, encode_choices
from nplora.finetuning.data.comparisons import PairDataset, read_pairs
from nplora.finetuning.data.dataset import ReadOptions, check_names, kind_of, parsed, read_sources
from nplora.finetuning.data.examples import Example, MultipleChoice
from nplora.finetuning.data.kinds import BY_NAME, Kind
from nplora.finetuning.data.renaming import ColumnNames
from nplora.finetuning.data.rows import Row
from nplora.finetuning.data.sources import Source, in_memory
from nplora.finetuning.judging.answers import Asked, asked, measure_answers
from nplora.finetuning.judging.choices import measure_choices
from nplora.finetuning.judging.metrics import Metric
from nplora.finetuning.judging.pairs import PairScores
from nplora.finetuning.judging.statistics import Measured
from nplora.finetuning.judging.tokens import measure_tokens
from nplora.finetuning.load import require_vocabulary
from nplora.formats.errors import DataError, LimitError, counted
from nplora.lm import LanguageModel
from nplora.runtime.user_warning import warn_user

_CHOICE, _PAIR = "choice", "preference"  # kinds of rows
_JUDGED = {_CHOICE: "multiple-choice questions", _PAIR: "preference pairs"}

Record = Callable[[dict[str, Any]], None]


@dataclass
class Judge:
    """Holds the data of an evaluation, and measures models on them.

    Attributes:
        report: a summary of the data.
        metrics: the metrics of generated answers.
        max_new_tokens: maximum tokens of a generated answer.
        dataset: the examples for a loss; None if the rows are multiple-choice questions or preference pairs.
        choices: the multiple-choice questions; empty if the rows are not multiple-choice questions.
        asked: the prompts to which the model generates answers.
        pairs: the preference pairs; None if the rows are not preference pairs.
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
        """Measure `lm`, a model without an adapter, as the reference for the rewards of preference pairs. Do
        nothing if the data are not preference pairs."""
        if self.pairs is not None:
            self._reference = PairScores(lm, self.pairs)

    def measure(self, lm: LanguageModel, record: Record = lambda entry: None) -> list[Measured]:
        """Measure a model.

        Args:
            record: a function that is called with the results for each question and each generated answer.
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
        ValueError: `reading.learn` is "all", and the rows are multiple-choice questions or preference pairs.
        DataError: a row is wrong; or a metric of generated answers is given, and a row has no prompt; or
            there are no examples.
        Other errors: see `read_dataset`.
    """
    if metrics:  # the rows are read twice: for the loss, and for the prompts
        sources = [source if source.is_text else in_memory(source) for source in sources]
    kind = _kind(sources, reading)
    if kind in _JUDGED and reading.learn != "completion":
        raise ValueError(
            f"{op}: learn={reading.learn!r} counts prompts too, but {_JUDGED[kind]} are judged only by their "
            "answers"
        )
    if kind == _CHOICE:
        choices, report = _read_choices(lm, sources, reading)
        judge = Judge(report, metrics, max_new_tokens, choices=choices)
    elif kind == _PAIR:
        if metrics:
            raise ValueError(
                f"{op}: metric scores generated answers, but no answers are generated for preference pairs"
            )
        pairs = read_pairs(op, sources, lm.tokenizer, reading, "eval", PairDataset)
        require_vocabulary(lm, pairs.report.source, pairs.largest_id)
        judge = Judge(pairs.report, metrics, max_new_tokens, pairs=pairs)
    else:
        dataset = read_sources(op, sources, lm.tokenizer, reading)
        require_vocabulary(lm, dataset.report.source, dataset.largest_id)
        judge = Judge(dataset.report, metrics, max_new_tokens, dataset)
    if metrics:
        judge.report = replace(judge.report, unread={})  # a metric may read any field
        bad = BadRows()
        judge.asked = list(_asked(lm, sources, reading, judge.choices, bad))
        if not judge.asked:
            raise DataError(
                f"{judge.report.source}: no row has a prompt that can be used: {'; '.join(bad.problems)}"
            )
        if bad.count:
            rows = counted(bad.count, "row")
            warn_user(f"{op}: no answer for {rows} of {judge.report.source}: {'; '.join(bad.problems)}")
    return judge


def _kind(sources: list[Source], reading: ReadOptions) -> str | None:
    """The name of the data's format: `reading.format`, or the format of the first row that can be read.

    Only the first 100 rows of each source are tried. The result is None if none of these rows can be read.
    """
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
    """A check that accepts rows of every format."""


def _require_choice(kind: Kind, where: str) -> None:
    if kind.name != _CHOICE:
        raise DataError(
            f"{where}: the row has {kind.fields}, but the earlier rows have {BY_NAME[_CHOICE].fields}; "
            "expected one format in all files"
        )


def _examples(
    sources: list[Source],
    reading: ReadOptions,
    require: Callable[[Kind, str], None],
    bad: BadRows,
    names: ColumnNames | None = None,
) -> Iterator[tuple[Example, Row, tuple[str, ...]]]:
    """For each row without an error, yield a tuple: example, row and `lost_context` (see `Parsed`)."""
    for source in sources:
        if source.is_text:
            raise DataError(f"{source.name}: a plain text has no prompts, expected rows with prompts")
        kind = None if reading.format is None else BY_NAME[reading.format]
        for row in source.read():
            if names is not None:
                names.look_in(row)
            try:
                found = parsed(row, kind, reading, require)
            except (DataError, LimitError) as error:
                bad.skip(error, reading.skip_bad)
                continue
            kind = found.kind
            if names is not None:
                names.count(row, source, found.is_renamed)
            yield found.example, row, found.lost_context


def _read_choices(
    lm: LanguageModel, sources: list[Source], reading: ReadOptions
) -> tuple[list[Choices], DataReport]:
    bad, found, unused, left_out = BadRows(), list[Choices](), 0, set[str]()
    names = ColumnNames(reading.columns)
    for example, row, lost_context in _examples(sources, reading, _require_choice, bad, names):
        assert isinstance(example, MultipleChoice)
        try:
            choices = encode_choices(lm.tokenizer, example, row.where, reading.chat)
            _require_room(choices, reading.max_length)
            require_vocabulary(lm, choices.where, max(map(max, [choices.prompt, *choices.continuations])))
        except (DataError, LimitError) as error:
            bad.skip(error, reading.skip_bad)
        else:
            found.append(choices)
            unused += bool(lost_context)
            left_out.update(lost_context)
    check_names(names, reading)
    report = _report(sources, found, bad, unused)
    warn_of_unused(report.source, unused, left_out)
    return found, report


def _require_room(choices: Choices, most: int | None) -> None:
    if most is not None and choices.longest > most:
        raise DataError(
            f"{choices.where}: the prompt with its longest choice has {counted(choices.longest, 'token')}, "
            f"expected at most {most:,}"
        )


def _report(sources: list[Source], found: list[Choices], bad: BadRows, unused: int) -> DataReport:
    name = ", ".join(source.name for source in sources)
    if not found:
        reason = bad.reason()
        raise DataError(f"{name}: no examples{reason and f': {reason}'}")
    right = [len(q.continuations[q.answer]) for q in found]
    lengths = np.array([len(q.prompt) for q in found]) + right
    return DataReport(
        name, len(found), int(lengths.sum()), sum(right), int(lengths.min()), int(np.median(lengths)),
        int(lengths.max()), 0, 0, bad.count, tuple(bad.problems), unused, _CHOICE,
    )  # fmt: skip


def _asked(
    lm: LanguageModel, sources: list[Source], reading: ReadOptions, choices: list[Choices], bad: BadRows
) -> Iterator[Asked]:
    """Yield the prompts of all rows without an error. If a prompt cannot be used, add the row to `bad`."""
    context, counted_before = lm.config.max_position_embeddings, BadRows()
    questions = {question.where for question in choices}
    require = _require_choice if choices else _any_kind
    for example, row, _ in _examples(sources, reading, require, counted_before):
        if choices and row.where not in questions:
            continue
        try:
            question = asked(lm.tokenizer, example, row.values, row.where, reading.chat)
            if len(question.ids) >= context:
                raise DataError(
                    f"{row.where}: the prompt has {counted(len(question.ids), 'token')}, expected fewer than "
                    f"{context:,} (the model's context)"
                )
        except (DataError, LimitError) as error:
            bad.skip(error, reading.skip_bad)
        else:
            yield question
