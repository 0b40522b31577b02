"""Work: the batches of a run, described by the sizes of their examples."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.finetuning.data import EVALUATION_TOKENS
from nplora.finetuning.planning.memory import MicroBatch
from nplora.models.packing import cut

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Work:
    """The batches of a run, described by the sizes of their examples.

    Attributes:
        batches: for each batch, two arrays: the number of tokens and of trained tokens of each example.
        steps: the number of steps of the run.
        accumulate: the number of batches in a step.
        evaluated: the number of tokens in the largest batch of an evaluation; 0 without an evaluation.
        keeps_best: whether a copy of the best factors is kept.
        prefix_tokens: the number of tokens for which a `PrefixCache` holds block outputs in memory.

    >>> work = nplora.finetuning.planning.Work([(np.array([8, 5]), np.array([3, 2]))], steps=10)
    >>> work.longest, work.batch_tokens
    (8, 13)
    >>> [batch.tokens for batch in work.micro_batches(micro_tokens=8)]
    [8, 5]
    """

    batches: list[tuple[Array, Array]]
    steps: int
    accumulate: int = 1
    evaluated: int = 0
    keeps_best: bool = False
    prefix_tokens: int = 0

    def micro_batches(self, micro_tokens: int | None) -> Iterator[MicroBatch]:
        """The micro-batches that the batches are cut into."""
        for lengths, targets in self.batches:
            for first, last in itertools.pairwise(cut(lengths, micro_tokens)):
                part = lengths[first:last]
                yield MicroBatch(int(part.sum()), int(targets[first:last].sum()), int(part.max(initial=0)))

    def largest(self, micro_tokens: int | None) -> MicroBatch:
        """The largest tokens, targets and longest of all micro-batches, each taken separately."""
        found = list(self.micro_batches(micro_tokens))
        return MicroBatch(
            *(max(getattr(one, name) for one in found) for name in ("tokens", "targets", "longest"))
        )

    def shortened(self, length: int) -> Work:
        """The same work, with every longer example cut to this length."""
        batches = [(np.minimum(n, length), np.minimum(trained, length)) for n, trained in self.batches]
        evaluated = min(self.evaluated, max(EVALUATION_TOKENS, length))
        return dataclasses.replace(self, batches=batches, evaluated=evaluated)

    @property
    def longest(self) -> int:
        """The number of tokens of the longest example."""
        return max(int(lengths.max(initial=0)) for lengths, _ in self.batches)

    @property
    def batch_tokens(self) -> int:
        """The number of tokens of the largest batch."""
        return max(int(lengths.sum()) for lengths, _ in self.batches)
