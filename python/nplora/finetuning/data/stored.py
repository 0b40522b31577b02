"""Stored: the tokens of a data set's examples, and which tokens are trained. DataReport: a summary."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from nplora.formats.errors import brief, counted
from nplora.models.invocation import NEVER, active_in, starts_in
from nplora.models.packing import IGNORED, PackedBatch

Array = npt.NDArray[Any]

_FIELDS = 10  # the most names of unused fields that are shown


@dataclass(frozen=True)
class DataReport:
    """A summary of a data file; `print` shows it in a line or two.

    Attributes:
        source: the file.
        examples: the number of examples in an epoch. An example is a row, or a window of a plain text. If a
            weight repeats an example, each repetition counts.
        tokens: the number of tokens in all examples.
        learned: the number of tokens that count in the loss.
        shortest, median, longest: lengths in tokens, over all sequences of the examples.
        truncated: the number of examples in an epoch that were cut to the maximum length.
        emptied: the number of examples that are left out because of the cut: a sequence has no trained token
            left, or both answers of a pair have become the same.
        skipped: the number of bad rows that were skipped.
        problems: the errors of the first few skipped rows.
        unused: the number of examples in which the chat template leaves something out: messages, reasoning,
            tools or documents. The model does not see what is left out.
        kind: the format of the rows, as `format` in `read_dataset`, or "plain text".
        unit: what the report calls an example: "pair" for pairs, "answer" for judged answers, otherwise
            "example".
        chat: whether the chat template wrote the examples; None if it wrote only some of them.
        unread: a dict from the name of each unused field to the number of rows with this field.

    >>> tokenizer = nplora.load_model("model.gguf").tokenizer
    >>> print(nplora.data.read_dataset("valid.jsonl", tokenizer).report)
    valid.jsonl (completion): 4 examples, 36 tokens (12 in the loss); 9 tokens long
    """

    source: str
    examples: int
    tokens: int
    learned: int
    shortest: int
    median: int
    longest: int
    truncated: int
    emptied: int
    skipped: int
    problems: tuple[str, ...]
    unused: int = 0
    kind: str = ""
    unit: str = "example"
    chat: bool | None = None
    unread: dict[str, int] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        text = (
            f"{self.source} ({self.kind}): {counted(self.examples, self.unit)}, "
            f"{counted(self.tokens, 'token')} ({self.learned:,} in the loss); "
            + (
                f"{self.longest} tokens long"
                if self.shortest == self.longest
                else f"{self.shortest} to {self.longest} tokens long, median {self.median}"
            )
        )
        if self.truncated:
            text += f"; {self.truncated} cut to the maximum length"
        if self.emptied:
            text += f"; {self.emptied} left out, with nothing to train on within the maximum length"
        if self.skipped:
            text += f"; {counted(self.skipped, 'bad row')} skipped, such as: {'; '.join(self.problems)}"
        return text + (f"; {unread_words(self.unread)}" if self.unread else "")


def unread_words(unread: Mapping[str, int]) -> str:
    """A text that lists the unused fields. `unread` is an attribute of `DataReport`."""
    shown = [f"{brief(name)} in {counted(count, 'row')}" for name, count in unread.items()]
    more = f", and {len(shown) - _FIELDS:,} more" if len(shown) > _FIELDS else ""
    return f"fields that are not used: {', '.join(shown[:_FIELDS])}{more}"


def shared_words(shared: int, evaluated: int) -> str:
    """A text that says how many of the validation examples are training examples too."""
    return (
        f"the training data contain {shared:,} of {counted(evaluated, 'validation example')}, so the "
        "validation loss is too low"
    )


class Examples(Protocol):
    """The examples that `TokenBatches` reads. All sequences of an example are in the same batch.

    Attributes:
        report: a summary of the file.
        sequences: the number of sequences of an example.
        same_batches: whether all epochs must have the same batches. They must have the same batches if the
            loss of an example depends on the other examples of its batch.
    """

    report: DataReport

    @property
    def sequences(self) -> int: ...

    @property
    def same_batches(self) -> bool: ...

    @property
    def lengths(self) -> Array:
        """The number of tokens of each example."""

    @property
    def targets(self) -> Array:
        """For each example, the number of its tokens that count in the loss."""

    @property
    def least_length(self) -> int:
        """The smallest maximum length of a sequence with which no example is left out."""

    @property
    def largest_id(self) -> int:
        """The largest token id."""

    def contains(self, tokens: tuple[int, ...]) -> Array:
        """Return, for each example, whether `tokens` occur side by side in one of its sequences."""

    def reached(self, invocation: tuple[int, ...]) -> tuple[int, int, int]:
        """Count the trained tokens that an activated LoRA can change; see `Stored.reached`."""

    def has(self, id_: int) -> bool:
        """Whether a token occurs in the examples."""

    def digests(self) -> list[bytes]:
        """For each example, a hash of its tokens, the marks of trained tokens, and its judgement, if any."""

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """SHA-256 of the examples."""

    def batch(self, indices: Array) -> tuple[PackedBatch, Any]:
        """Return a batch of the examples with these indices, and the additional inputs of the loss."""


class Stored:
    """Examples of one or more sequences each. The tokens of all sequences are in one array, in order.

    Attributes:
        report: a summary of the file.
        sequences: the number of sequences of an example.
        same_batches: as in `Examples`.
    """

    sequences = 1
    same_batches = False

    def __init__(
        self, ids: Array, trained: Array, starts: Array, report: DataReport, order: Array | None = None
    ) -> None:
        """
        Args:
            ids: the tokens of all sequences, one sequence after another.
            trained: for each token in `ids`, whether the token is trained.
            starts: the index of the first token of each sequence, and the index after the last sequence.
            order: for each example of an epoch, its index among the stored examples. If None, an epoch has
                each stored example once, in the order in which they are stored.
        """
        self._ids, self._trained, self._starts = ids, trained, starts
        self._order = np.arange((len(starts) - 1) // self.sequences) if order is None else order
        self.report = report

    def __len__(self) -> int:
        return len(self._order)

    def _sequence(self, number: int) -> tuple[Array, Array]:
        """Return two arrays: the tokens of a stored sequence, and whether each of them is trained."""
        part = slice(self._starts[number], self._starts[number + 1])
        return self._ids[part], self._trained[part]

    def _labelled(self, number: int) -> tuple[Array, Array]:
        """The tokens and the labels of a stored sequence."""
        ids, trained = self._sequence(number)
        return ids, np.where(trained, ids, np.int32(IGNORED))

    @property
    def lengths(self) -> Array:
        """The number of tokens of each example."""
        return self._by_example(np.diff(self._starts))

    @property
    def sequence_lengths(self) -> Array:
        """The number of tokens of each sequence of each example."""
        return np.diff(self._starts).reshape(-1, self.sequences)[self._order].reshape(-1)

    @property
    def targets(self) -> Array:
        """The number of trained tokens of each example. The first token of a sequence is never trained."""
        return self._by_example(self._trained_counts())

    @property
    def least_length(self) -> int:
        """The smallest maximum length of a sequence with which every sequence keeps a trained token."""
        first_tokens, never = self._starts[:-1].astype(np.intp), len(self._ids)
        places = np.where(self._trained, np.arange(never), never)
        places[first_tokens] = never
        return int((np.minimum.reduceat(places, first_tokens) - first_tokens).max()) + 1

    def _trained_counts(self) -> Array:
        """The number of trained tokens of each stored sequence."""
        return self._counts(self._trained)

    def _counts(self, chosen: Array) -> Array:
        """For each stored sequence, count the tokens after its first one whose value in `chosen` is True."""
        counted = chosen.astype(np.int64)
        counted[self._starts[:-1]] = 0
        return np.asarray(np.add.reduceat(counted, self._starts[:-1].astype(np.intp)))

    def _by_example(self, counts: Array) -> Array:
        """Sum `counts`, which has a value for each stored sequence, over the sequences of each example."""
        return np.asarray(counts.reshape(-1, self.sequences).sum(axis=1)[self._order])

    @property
    def largest_id(self) -> int:
        """The largest token id."""
        return int(self._ids.max())

    def contains(self, tokens: tuple[int, ...]) -> Array:
        """Return, for each example, whether `tokens` occur side by side in one of its sequences."""
        return self._by_example(starts_in(self._ids, self._starts, tokens) != NEVER) > 0

    def reached(self, invocation: tuple[int, ...]) -> tuple[int, int, int]:
        """Count the trained tokens that an activated LoRA with these invocation tokens can change.

        Returns:
            three counts: the trained tokens that the LoRA can change; the trained tokens that come before the
            last invocation of their sequence; and all trained tokens.
        """
        can_change = np.zeros(len(self._ids) + 1, np.bool_)
        can_change[active_in(self._ids, self._starts, invocation) + 1] = True  # a token predicts the next one
        reached, trained = self._counts(self._trained & can_change[:-1]), self._counts(self._trained)
        is_there = starts_in(self._ids, self._starts, invocation) != NEVER
        early = np.where(is_there, trained - reached, 0)

        def total(counts: Array) -> int:
            return int(self._by_example(counts).sum())

        return total(reached), total(early), total(trained)

    def has(self, id_: int) -> bool:
        """Whether a token occurs in the examples."""
        return bool((self._ids == id_).any())

    def digests(self) -> list[bytes]:
        """For each example, a hash of its tokens, the marks of trained tokens, and its judgement, if any."""
        stored = list[bytes]()
        for begin, end in itertools.pairwise(self._starts[:: self.sequences].tolist()):
            digest = hashlib.blake2b(self._ids[begin:end].tobytes(), digest_size=16)
            digest.update(self._trained[begin:end].tobytes())
            stored.append(digest.digest())
        return [stored[index] for index in self._order]

    def fingerprint(self) -> str:
        """SHA-256 of the examples: equal for datasets with the same tokens and the same trained tokens."""
        digest = hashlib.sha256()
        for part in (self._ids, self._trained, self._starts):
            digest.update(part.tobytes())
        if not np.array_equal(self._order, np.arange((len(self._starts) - 1) // self.sequences)):
            digest.update(self._order.tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.report})"
