"""Work: the batches that a run reads, as a plan counts them."""

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
    """What a run reads.

    Attributes:
        batches: for each batch, the tokens and the trained tokens of its sequences.
        steps: the steps of the run.
        accumulate: batches in a step.
        evaluated: the tokens of the largest batch that is evaluated; 0 if none is.
        prefix_tokens: the tokens whose rows a `PrefixCache` holds in memory.
    """

    batches: list[tuple[Array, Array]]
    steps: int
    accumulate: int = 1
    evaluated: int = 0
    prefix_tokens: int = 0

    def micro_batches(self, micro_tokens: int | None) -> Iterator[MicroBatch]:
        """What the batches are cut into."""
        for lengths, targets in self.batches:
            for first, last in itertools.pairwise(cut(lengths, micro_tokens)):
                part = lengths[first:last]
                yield MicroBatch(int(part.sum()), int(targets[first:last].sum()), int(part.max(initial=0)))

    def largest(self, micro_tokens: int | None) -> MicroBatch:
        """The most tokens, targets and tokens of a sequence; each may come from another micro-batch."""
        found = list(self.micro_batches(micro_tokens))
        return MicroBatch(
            *(max(getattr(one, name) for one in found) for name in ("tokens", "targets", "longest"))
        )

    def shortened(self, length: int) -> Work:
        """The same work with longer sequences cut to this length."""
        batches = [(np.minimum(n, length), np.minimum(trained, length)) for n, trained in self.batches]
        evaluated = min(self.evaluated, max(EVALUATION_TOKENS, length))
        return dataclasses.replace(self, batches=batches, evaluated=evaluated)

    @property
    def longest(self) -> int:
        """The tokens of the longest sequence."""
        return max(int(lengths.max(initial=0)) for lengths, _ in self.batches)

    @property
    def batch_tokens(self) -> int:
        """The tokens of the largest batch."""
        return max(int(lengths.sum()) for lengths, _ in self.batches)
