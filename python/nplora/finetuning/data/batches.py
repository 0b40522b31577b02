"""Batches of a dataset's examples, packed without padding. The order depends only on seed and epoch."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.finetuning.data.stored import Examples
from nplora.models.packing import PackedBatch

Array = npt.NDArray[Any]

EVALUATION_TOKENS = 1024  # maximum tokens in a batch of an evaluation, unless one example has more


class TokenBatches:
    """Packed batches with a fixed number of examples, or with as many examples as a token limit allows.

    With `batch_tokens`, the examples are shuffled once with the seed, and grouped into batches. All epochs
    use these batches, each in a new order, so all epochs have the same number of batches. With
    `batch_examples`, each epoch groups the examples into new batches. But if `dataset.same_batches` is set,
    all epochs use the same batches, each in a new order. An epoch can begin with any batch; the earlier
    batches are then not built.

    Args:
        dataset: the examples.
        batch_tokens: maximum tokens in a batch. An example with more tokens is the only example of its batch.
        batch_examples: number of examples in a batch; the last batch may have fewer. Set either
            `batch_examples` or `batch_tokens`.
        shuffle: whether the order of the examples is random. If False, every epoch has the examples in the
            order of the data.
        seed: random seed for the order of the examples, at least 0.
    Attributes:
        length: the number of batches in an epoch.
    Raises:
        ValueError: `batch_tokens` and `batch_examples` are both given or both missing, or a number is out of
            range.

    >>> lm = nplora.load_model("model.gguf")
    >>> dataset = nplora.data.read_dataset("train.jsonl", lm.tokenizer)
    >>> batches = nplora.data.TokenBatches(dataset, batch_examples=5)
    >>> len(dataset), len(batches)
    (16, 4)
    >>> batch, targets = next(batches.epoch(0))
    >>> len(batch.ids)
    37
    """

    def __init__(
        self,
        dataset: Examples,
        *,
        batch_tokens: int | None = None,
        batch_examples: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        op = "TokenBatches"
        if (batch_tokens is None) == (batch_examples is None):
            both = "both" if batch_tokens is not None else "none"
            raise ValueError(f"{op}: got {both} of batch_tokens and batch_examples, expected one of them")
        self.dataset, self.shuffle = dataset, bool(shuffle)
        self.seed = _check.integer(op, "seed", seed, least=0)
        self._tokens, self._examples = batch_tokens, batch_examples
        if batch_tokens is not None:
            _check.integer(op, "batch_tokens", batch_tokens, least=1)
            self._groups = self._grouped(batch_tokens)
        else:
            count = self._examples = _check.integer(op, "batch_examples", batch_examples, least=1)
            self._groups = []
            if dataset.same_batches:
                order = self._order(len(dataset), 0)
                self._groups = [order[begin : begin + count] for begin in range(0, len(order), count)]

    @property
    def length(self) -> int:
        return len(self._groups) or -(-len(self.dataset) // (self._examples or 1))

    def __len__(self) -> int:
        return self.length

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[PackedBatch, Any]]:
        """Make the batches of epoch number `epoch` (from 0).

        Yields tuples: a batch, and the additional inputs of the loss for this batch.

        Args:
            skip: number of batches to leave out at the start of the epoch.
        """
        for members in self.members(epoch, skip):
            yield self.dataset.batch(members)

    def members(self, epoch: int, skip: int = 0) -> Iterator[Array]:
        """Yield, for each batch of epoch number `epoch` (from 0), the indices of its examples.

        Args:
            skip: number of batches to leave out at the start of the epoch.
        """
        if self._groups or self._examples is None:
            order = self._order(len(self._groups), 1 + epoch)
            yield from (self._groups[index] for index in order[skip:])
            return
        order = self._order(len(self.dataset), epoch)
        for start in range(skip * self._examples, len(order), self._examples):
            yield order[start : start + self._examples]

    def __iter__(self) -> Iterator[tuple[PackedBatch, Any]]:
        return self.epoch(0)

    def identity(self) -> dict[str, Any]:
        """Return the settings, as JSON values. A resumed run must have the same settings as the first run."""
        return {
            "data": self.dataset.fingerprint(),
            "batch_tokens": self._tokens,
            "batch_examples": self._examples,
            "shuffle": self.shuffle,
            "seed": self.seed,
        }

    def log_summary(self) -> dict[str, Any]:
        """Return what the log of a run says about the batches, as JSON values."""
        report = self.dataset.report
        sizes = {"batch_tokens": self._tokens, "batch_examples": self._examples}
        return {
            "source": report.source,
            "format": report.kind,
            "examples": report.examples,
            "tokens": report.tokens,
            "trained_tokens": report.learned,
        } | {name: size for name, size in sizes.items() if size is not None}

    def _grouped(self, batch_tokens: int) -> list[Array]:
        """Group the examples into batches. Return the indices of the examples of each batch."""
        lengths, order = self.dataset.lengths, self._order(len(self.dataset), 0)
        groups, begin, size = list[Array](), 0, 0
        for place, length in enumerate(lengths[order].tolist()):
            if size and size + length > batch_tokens:
                groups.append(order[begin:place])
                begin, size = place, 0
            size += length
        return [*groups, order[begin:]]

    def _order(self, count: int, key: int) -> Array:
        """A random permutation from PCG64's raw output. It is the same in all versions of NumPy."""
        if not self.shuffle:
            return np.arange(count)
        stream = np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(key,)))
        return np.argsort(stream.random_raw(count), kind="stable")
