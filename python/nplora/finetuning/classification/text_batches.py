"""TextBatches and TokenBatches: batches of token ids and targets.

The seed and the number of the epoch determine the order of the texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora import _check
from nplora.finetuning.int8_check import AddGradient
from nplora.finetuning.int8_sample import sample_length
from nplora.lm import TextClassifier
from nplora.nn import losses
from nplora.nn.losses import Loss
from nplora.trainer.batches import ArrayBatches
from nplora.trainer.fingerprint import fingerprint

Array = npt.NDArray[Any]


class TextBatches:
    """The token ids of texts and their targets, `batch_size` texts at a time, for `Trainer.fit`.

        >>> ids, labels = [[2, 5, 3], [2, 5, 6, 3], [2, 7, 3]], np.array([0, 1, 1])
        >>> batches = nplora.finetuning.TextBatches(ids, labels, batch_size=2)
        >>> [len(x) for x, y in batches.epoch(0, 0)]
        [2, 1]

    Args:
        ids: the token ids of each text, with the special tokens.
        targets: the targets, in the form that the loss takes.
        shuffle: whether each epoch has the texts in a new random order.
        seed: the seed of the order.
    Attributes:
        length: the number of batches in an epoch.
    Raises:
        ValueError: there are no texts, or the numbers of texts and targets differ.
    """

    def __init__(
        self,
        ids: Sequence[Sequence[int]],
        targets: Array,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        self._ids, self._targets = list(ids), np.asarray(targets)
        op = type(self).__name__
        _check.integer(op, "batch_size", batch_size, least=1)
        numbers = np.arange(len(self._ids))
        self._numbers = ArrayBatches(
            op, numbers, self._targets, batch_size, shuffle, seed, ("ids", "targets")
        )

    @property
    def length(self) -> int:
        return self._numbers.length

    def epoch(self, epoch: int, skip: int) -> Iterator[tuple[list[Sequence[int]], Array]]:
        """Yield the batches of epoch number `epoch` (from 0), except the first `skip` batches."""
        for numbers, targets in self._numbers.epoch(epoch, skip):
            yield [self._ids[i] for i in numbers.tolist()], self._chosen(targets)

    def __iter__(self) -> Iterator[tuple[list[Sequence[int]], Array]]:
        return self.epoch(0, 0)

    def sample_gradient(self, model: TextClassifier, loss: Loss) -> AddGradient:
        """Return the argument `add_gradient` of an `Int8Check`.

        The sample consists of the first texts of the data. The sample has at most `SAMPLE_TOKENS` tokens,
        unless `LEAST_ROWS` texts have more tokens. The sample has at least `LEAST_ROWS` texts, unless the
        data have fewer.

        If the head reads one token of each text, the activations in the last block of the model have one row
        for each text. If activations have fewer than `LEAST_ROWS` rows, their products with low-bit weights
        are computed in int8 even when the check turns int8 off. So with fewer texts, the check could not
        compare int8 with bfloat16 in the last block.
        """
        count = sample_length((len(ids), 1) for ids in self._ids)

        def add_gradient() -> float:
            logits, saved = model.forward(self._ids[:count])
            targets = self._chosen(self._targets[:count])
            value, gradient = losses.call(loss, logits, targets)
            model.backward(gradient, saved)
            return value

        return add_gradient

    def identity(self) -> dict[str, Any]:
        """The settings that must be the same when the run is resumed, as JSON values."""
        targets = fingerprint(self._chosen(self._targets), whole=True)
        return {**self._numbers.identity(), "x": ids_fingerprint(self._ids), "y": targets}

    def log_summary(self) -> dict[str, Any]:
        """The description of these batches in the log of a run."""
        tokens = sum(map(len, self._ids))
        return {**self._numbers.log_summary(), "tokens": tokens}

    def _chosen(self, targets: Array) -> Array:
        """Convert the targets of some texts to the form that the loss takes.

        This class returns them unchanged. A subclass can override the method.
        """
        return targets


class TokenBatches(TextBatches):
    """Batches of texts, as in `TextBatches`, in which each token of a text has a target.

        >>> ids, tags = [[2, 5, 3], [2, 6, 3]], [np.array([-100, 0, -100]), np.array([-100, 1, -100])]
        >>> [y.tolist() for x, y in nplora.finetuning.TokenBatches(ids, tags, batch_size=2)]
        [[-100, 0, -100, -100, 1, -100]]

    Args:
        targets: for each text, the target of each of its tokens, int64 (tokens,); -100: no target.
    Raises:
        ValueError: there are no texts, the numbers of texts and targets differ, or the numbers of tokens and
            targets differ in a text.
    """

    def __init__(
        self,
        ids: Sequence[Sequence[int]],
        targets: Sequence[Array],
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(ids, np.arange(len(targets)), batch_size, shuffle, seed)
        self._of_tokens = [np.asarray(own) for own in targets]
        for i, (text, own) in enumerate(zip(self._ids, self._of_tokens, strict=True)):
            if own.shape != (len(text),):
                raise ValueError(
                    f"{type(self).__name__}: targets[{i}] has shape {own.shape}, expected ({len(text)},), "
                    f"one for each token of ids[{i}]"
                )

    def _chosen(self, targets: Array) -> Array:
        return np.concatenate([self._of_tokens[i] for i in targets.tolist()])


def ids_fingerprint(ids: Iterable[Sequence[int]]) -> str:
    """A hash of the token ids of texts."""
    found = hashlib.sha256()
    for text in ids:
        found.update(np.array([len(text), *text], np.int64).tobytes())
    return found.hexdigest()
