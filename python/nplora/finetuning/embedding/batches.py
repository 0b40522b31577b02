"""TextBatch: the token ids of a batch of texts. ExampleBatches: the batches of an embedding training."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.trainer.batches import shuffled

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class TextBatch:
    """The token ids of texts, in columns.

        >>> import nplora
        >>> encoder = nplora.load_encoder("encoder-model")
        >>> questions, answers = encoder.encode(["where is my parcel"]), encoder.encode(["the order is late"])
        >>> len(nplora.embedding.TextBatch([questions, answers]))
        1

    Args:
        columns: a list of columns of texts. A column is a list with an array of token ids for each text. The
            columns are anchors, positives and perhaps negatives, or first and second texts. The first two
            columns have the same number of texts.
    """

    columns: Sequence[Sequence[npt.ArrayLike]]

    def __len__(self) -> int:
        return len(self.columns[0])

    @functools.cached_property
    def texts(self) -> list[npt.ArrayLike]:
        """The token ids of all texts, column after column."""
        return [ids for column in self.columns for ids in column]

    def split(self, rows: Array) -> list[Array]:
        """Divide `rows`, an array with a row for each text. Return one array for each column of texts."""
        return np.split(rows, np.cumsum([len(column) for column in self.columns[:-1]]))

    def known_positives(self) -> Array | None:
        """Mark, for each anchor, the candidates that must not count as its negatives.

        The result is a bool array with a row for each anchor and a column for each candidate. The candidates
        are all texts except the anchors.

        In the row of an anchor, a candidate is marked if it has the same tokens as the anchor or the anchor's
        positive. The positive itself is not marked. If two anchors are equal, the positive of each is marked
        in the row of the other. If no candidate is marked, the result is None.
        """
        numbers = dict[bytes, int]()
        keys = (np.asarray(ids, np.int64).tobytes() for ids in self.texts)
        anchors, positives, *rest = self.split(np.array([numbers.setdefault(k, len(numbers)) for k in keys]))
        candidates = np.concatenate([positives, *rest])
        known = (candidates == positives[:, None]) | (candidates == anchors[:, None])
        known[:, : len(anchors)] |= anchors == anchors[:, None]
        own = np.arange(len(anchors))
        known[own, own] = False
        return known if known.any() else None


class Examples(Protocol):
    """The examples that `ExampleBatches` reads, such as `TextExamples`."""

    @property
    def report(self) -> Any:
        """A summary with the attributes `source`, `examples` and `tokens`."""

    def __len__(self) -> int: ...

    def batch(self, indices: npt.ArrayLike) -> tuple[TextBatch, Array | None]:
        """A batch of the examples with these indices, and the scores of these examples (or None)."""

    def fingerprint(self) -> str:
        """A text that identifies the examples."""


class ExampleBatches:
    """Batches of a fixed number of examples, for `Trainer.fit`. The order depends only on seed and epoch.

        >>> import nplora
        >>> encoder = nplora.load_encoder("encoder-model")
        >>> rows = [{"anchor": "a cat", "positive": "the cat"}, {"anchor": "a dog", "positive": "the dog"}]
        >>> examples = nplora.embedding.read_examples(rows, encoder)
        >>> nplora.embedding.ExampleBatches(examples, batch_size=1).length
        2

    Args:
        examples: the examples.
        batch_size: the number of examples in a batch; the last batch of an epoch may have fewer.
        shuffle: whether each epoch has the examples in a new random order.
        seed: the seed of the order.
    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, examples: Examples, batch_size: int = 64, shuffle: bool = True, seed: int = 0) -> None:
        op = "ExampleBatches"
        self.examples, self.shuffle = examples, bool(shuffle)
        self.batch_size = _check.integer(op, "batch_size", batch_size, least=1)
        self.seed = _check.integer(op, "seed", seed, least=0)

    @property
    def length(self) -> int:
        """The number of batches in an epoch."""
        return -(-len(self.examples) // self.batch_size)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[TextBatch, Array | None]]:
        """For each batch of epoch number `epoch` (from 0), yield the pair (batch, scores); without scores,
        (batch, None).

        The first `skip` batches are left out.
        """
        rows = len(self.examples)
        order = shuffled(rows, self.seed, epoch) if self.shuffle else np.arange(rows)
        for begin in range(skip * self.batch_size, len(order), self.batch_size):
            yield self.examples.batch(order[begin : begin + self.batch_size])

    def __iter__(self) -> Iterator[tuple[TextBatch, Array | None]]:
        return self.epoch(0)

    def identity(self) -> dict[str, Any]:
        """Return the settings, as JSON values. A resumed run must have the same settings as the first run."""
        return {
            "data": self.examples.fingerprint(),
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "seed": self.seed,
        }

    def log_summary(self) -> dict[str, Any]:
        """Return what the log of a run says about the batches, as JSON values."""
        report = self.examples.report
        return {
            "source": report.source,
            "examples": report.examples,
            "tokens": report.tokens,
            "batch_size": self.batch_size,
        }


def digest(*arrays: Array | None) -> str:
    """A SHA-256 over the dtypes, shapes and values of the given arrays."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(b"-" if array is None else f"{array.dtype} {array.shape} ".encode() + array.tobytes())
    return found.hexdigest()
