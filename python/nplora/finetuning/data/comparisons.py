"""Data sets of comparisons: pairs of a chosen and a rejected answer, and judged answers."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.finetuning.data.builder import Builder
from nplora.finetuning.data.dataset import ReadOptions, add_rows, check_names, one_example
from nplora.finetuning.data.encoding import Encoded
from nplora.finetuning.data.examples import Example, Judged
from nplora.finetuning.data.kinds import BY_NAME, Kind
from nplora.finetuning.data.renaming import ColumnNames
from nplora.finetuning.data.sources import Source
from nplora.finetuning.data.stored import Stored
from nplora.formats.errors import DataError, counted
from nplora.models.packing import PackedBatch, pack
from nplora.tokenizer import Tokenizer

Array = npt.NDArray[Any]
Labelled = tuple[Array, Array]  # ids and labels of a sequence


@dataclass(frozen=True)
class Answers:
    """The inputs that a loss over pairs needs in addition to a batch.

    Attributes:
        is_answer: for each token of the batch, whether the next token belongs to an answer.
        tokens_per_pair: the mean number of trained tokens of a chosen sequence, over all pairs of the data.
    """

    is_answer: Array
    tokens_per_pair: float


class PairDataset(Stored):
    """Pairs: a chosen and a rejected answer to the same prompt. A pair has two sequences: the prompt with the
    chosen answer, and the prompt with the rejected answer."""

    sequences = 2

    def __getitem__(self, index: int) -> tuple[Labelled, Labelled]:
        """The ids and labels of the chosen and of the rejected sequence."""
        first = 2 * int(self._order[index])
        return self._labelled(first), self._labelled(first + 1)

    def batch(self, indices: Array) -> tuple[PackedBatch, Answers]:
        """Return a batch of the pairs with these indices, and the additional inputs of the loss."""
        batch = pack(sequence for index in indices for sequence in self[int(index)])
        return batch, Answers(batch.targets >= 0, self._tokens_per_pair)

    @functools.cached_property
    def _tokens_per_pair(self) -> float:
        return float(self._trained_counts()[::2][self._order].mean())


class LearnedPairs(PairDataset):
    """Pairs for ORPO. ORPO trains on all tokens of the chosen sequence, including the prompt."""

    def batch(self, indices: Array) -> tuple[PackedBatch, Answers]:
        _, answers = super().batch(indices)
        sequences = [sequence for index in indices for sequence in self[int(index)]]
        whole = pack((ids, labels if number % 2 else ids) for number, (ids, labels) in enumerate(sequences))
        return whole, answers

    def _trained_counts(self) -> Array:
        counts = super()._trained_counts()
        counts[::2] = np.diff(self._starts)[::2] - 1
        return counts


@dataclass(frozen=True)
class Judgements:
    """What the loss of judged answers needs in addition to a batch.

    Attributes:
        good: whether each answer is good.
        mismatched: a batch of mismatched pairs. Such a pair joins a prompt to an answer to a different
            prompt. The batch is empty if the loss needs no mismatched pairs.
    """

    good: Array
    mismatched: PackedBatch


class JudgedDataset(Stored):
    """Answers that were judged as good or bad.

    Each batch comes with a mismatched pair for each of its examples: the prompt of the example, and the
    answer of the nearest earlier example with a different prompt. If no earlier example has a different
    prompt, the search continues backwards from the end of the batch. If all prompts of the batch are equal,
    the search covers the whole data set instead. The mean of log(p / p_reference) over the mismatched pairs
    estimates the KL divergence of the model from the reference. Here, p is the probability of an answer under
    the model, and p_reference is its probability under the reference. The batches are the same in all epochs,
    so the log-probabilities of the reference are computed only once.

    Attributes:
        good: for each stored example, whether its answer was judged as good.
        max_length: maximum tokens of a mismatched pair.
        mismatches: whether the loss needs mismatched pairs.
    """

    same_batches = True
    good: Array
    max_length: int | None = None
    mismatches = True

    def __getitem__(self, index: int) -> tuple[Array, Array, bool]:
        """The ids and labels of the sequence, and whether the answer is good."""
        stored = int(self._order[index])
        return (*self._labelled(stored), bool(self.good[stored]))

    def digests(self) -> list[bytes]:
        judgements = self.good[self._order]
        return [one + bytes([good]) for one, good in zip(super().digests(), judgements.tolist(), strict=True)]

    def batch(self, indices: Array) -> tuple[PackedBatch, Judgements]:
        """Return a batch of the answers with these indices, and the judgements of the answers."""
        batch = pack(self[int(index)][:2] for index in indices)
        pairs = zip(indices.tolist(), self._others(indices).tolist(), strict=True) if self.mismatches else ()
        mismatched = pack(self._mismatched(*pair) for pair in pairs)
        return batch, Judgements(self.good[self._order[indices]], mismatched)

    @property
    def has_other_prompts(self) -> bool:
        """Whether there are at least two different prompts."""
        return bool((self._prompts != self._prompts[0]).any())

    def _others(self, indices: Array) -> Array:
        """For each example in `indices`, return the index of an example with a different prompt."""
        found = _before_with_another(self._prompts[indices])
        return self._others_in_data[indices] if found is None else indices[found]

    @functools.cached_property
    def _others_in_data(self) -> Array:
        found = _before_with_another(self._prompts)
        assert found is not None, "`read_judged` refuses data in which all prompts are equal"
        return found

    @functools.cached_property
    def _prompts(self) -> Array:
        """An integer for the prompt of each example: equal prompts have the same integer."""
        numbers = dict[bytes, int]()
        stored = []
        for number in range(len(self.good)):
            ids, labels = self._labelled(number)
            prompt = ids[: _first_trained(labels)].tobytes()
            stored.append(numbers.setdefault(prompt, len(numbers)))
        return np.array(stored)[self._order]

    def _mismatched(self, one: int, other: int) -> Labelled:
        """The prompt of example `one` and the answer of example `other`, cut to the maximum length."""
        (prompt, own), (ids, labels) = self[one][:2], self[other][:2]
        begin, answer = _first_trained(own), _first_trained(labels)
        joined = np.concatenate([prompt[:begin], ids[answer:]])
        targets = np.concatenate([own[:begin], labels[answer:]])
        return joined[: self.max_length], targets[: self.max_length]

    def fingerprint(self) -> str:
        return hashlib.sha256(super().fingerprint().encode() + self.good.tobytes()).hexdigest()


def _first_trained(labels: Array) -> int:
    """The index of the first trained token, at least 1: the token at index 0 is never trained."""
    return 1 + int(np.argmax(labels[1:] >= 0))


def _before_with_another(values: Array) -> Array | None:
    """For each index of `values`, find the nearest earlier index with a different value.

    After index 0, the search continues at the last index. If all values are equal, the result is None.
    """
    begins = np.flatnonzero(values != np.roll(values, 1))  # each begins a run of equal values
    if not len(begins):
        return None
    run = np.searchsorted(begins, np.arange(len(values)), side="right") - 1
    return np.asarray((begins[run] - 1) % len(values))


# ---- reading ----


def read_pairs(
    op: str,
    sources: list[Source],
    tokenizer: Tokenizer,
    options: ReadOptions,
    objective: str,
    made: type[PairDataset],
) -> PairDataset:
    """The pairs of all sources.

    Args:
        objective: the name of the objective, for messages.
    Raises the same errors as `read_dataset`, and a DataError if the rows are not comparisons.
    """
    builder = Builder(options.max_length, options.strict, made, "pair")
    _read(op, builder, sources, tokenizer, options, wanted_pairs(objective), one_example)
    return builder.dataset()


def read_judged(
    op: str,
    sources: list[Source],
    tokenizer: Tokenizer,
    options: ReadOptions,
    objective: str,
    mismatches: bool,
) -> JudgedDataset:
    """The judged answers of all sources. The chosen answer of a pair counts as good.

    Args:
        mismatches: whether the loss needs mismatched pairs: prompts with answers to other prompts.
    Raises the same errors as `read_dataset`, and a DataError if the rows have no judgement, or if all rows
    have the same prompt and the loss needs mismatched pairs.
    """
    builder = _JudgedBuilder(options.max_length, options.strict, JudgedDataset, "answer")
    _read(op, builder, sources, tokenizer, options, wanted_judgements(objective), _each)
    dataset = builder.dataset()
    dataset.good, dataset.max_length = np.array(builder.good, np.bool_), options.max_length
    dataset.mismatches = mismatches
    if mismatches and not dataset.has_other_prompts:
        raise DataError(
            f"{dataset.report.source}: {counted(len(dataset), 'answer')} to one prompt, expected at least "
            "two different prompts: loss_type 'kto' compares each prompt with an answer to another prompt; "
            "loss_type 'apo_zero_unpaired' works with one prompt"
        )
    return dataset


class _JudgedBuilder(Builder[JudgedDataset]):
    """Builds judged answers. The builder also stores whether each answer is good."""

    def __init__(
        self, max_length: int | None, strict: bool, made: type[JudgedDataset], unit: str = "answer"
    ) -> None:
        super().__init__(max_length, strict, made, unit)
        self.good = list[bool]()

    def add(self, sequences: list[Encoded], where: str, unused: tuple[str, ...] = ()) -> None:
        before = self.stored
        super().add(sequences, where, unused)
        if self.stored > before:
            self.good.append(sequences[0].good)


@dataclass(frozen=True)
class Wanted:
    """An objective, and the names of the kinds of rows that it reads."""

    objective: str
    kinds: tuple[str, ...]

    @property
    def fields(self) -> str:
        return ", or ".join(BY_NAME[name].fields for name in self.kinds)

    def require(self, kind: Kind, where: str) -> None:
        if kind.name not in self.kinds:
            hint = ""
            if "kto" in self.kinds:
                hint = "; an empty label counts as missing, and labels of 1 and 0 need --format kto"
            raise DataError(
                f"{where}: the row has {kind.fields}; objective {self.objective!r} needs rows with "
                f"{self.fields}{hint}"
            )


def wanted_pairs(objective: str) -> Wanted:
    """The rows that an objective reads if it learns from pairs."""
    return Wanted(objective, ("preference",))


def wanted_judgements(objective: str) -> Wanted:
    """The rows that an objective reads if it learns from judged answers."""
    return Wanted(objective, ("kto", "preference"))


def _read(
    op: str,
    builder: Builder[Any],
    sources: list[Source],
    tokenizer: Tokenizer,
    options: ReadOptions,
    wanted: Wanted,
    examples_of: Callable[[Example, list[Encoded]], list[list[Encoded]]],
) -> None:
    names = ColumnNames(options.columns)
    for source in sources:
        builder.begin(source)
        if source.is_text:
            raise DataError(
                f"{op}: {source.name} is a plain text; objective {wanted.objective!r} needs rows with "
                f"{wanted.fields}"
            )
        add_rows(builder, names, source, tokenizer, options, wanted.require, examples_of)
        builder.end()
    check_names(names, options)


def _each(example: Example, sequences: list[Encoded]) -> list[list[Encoded]]:
    """Make one example for each answer of a row."""
    good = [example.good] if isinstance(example, Judged) else [True, False]
    return [[dataclasses.replace(one, good=is_good)] for one, is_good in zip(sequences, good, strict=True)]
