"""Work: the batches of a run, described by the sizes of their examples."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.finetuning.data import EVALUATION_TOKENS
from nplora.finetuning.planning.memory import MicroBatch
from nplora.finetuning.planning.teaching import Teaching
from nplora.models.packing import cut

Array = npt.NDArray[Any]

# Arrays as large as all trained values: the momentum; copies of the values, the momentum and AdamW's two
# moments; and, while the ranks add up, this rank's term, the terms of the other ranks, and the sum.
_ARRAYS_OF_OUTER_STEPS = 1 + 4 + 3


@dataclass(frozen=True)
class Work:
    """The batches of a run, described by the sizes of their examples.

    Attributes:
        batches: for each batch, a tuple of two arrays: the number of tokens of each example, and the number
            of trained tokens of each example.
        steps: the number of steps of the run.
        accumulate: the number of batches in a step.
        epoch: the number of batches in an epoch. 0 means that all batches belong to one epoch. The last step
            of an epoch may have fewer batches than the other steps.
        evaluated: the number of tokens in the largest batch of an evaluation; 0 without an evaluation.
        keeps_best: whether a copy of the best factors is kept.
        prefix_tokens: the number of tokens for which a `PrefixCache` holds block outputs in memory.
        sequences: the number of sequences of an example, such as 2 for a pair of answers. The maximum length
            applies to each sequence.
        least_length: the smallest maximum length of a sequence with which no example is left out.
        extra_passes: the number of additional forward passes in a step. Each pass has about as many tokens as
            the step.
        reference: for each forward pass before the first step, a tuple: its number of tokens, and its number
            of trained tokens.
        teaching: the additional memory and time of a distillation; None without a teacher.
        adds_in_order: whether gradients of micro-batches are stored, to be added up later in a fixed order.
        is_local: whether each rank makes local steps, whose changes an outer step combines.
        filters: whether a word filter computes the gradient of the head's input.
        int8_head: the arithmetic of the head in plans in int8: "off", "forward" or "on".

    >>> work = nplora.finetuning.planning.Work([(np.array([8, 5]), np.array([3, 2]))], steps=10)
    >>> work.longest, work.batch_tokens
    (8, 13)
    >>> [batch.tokens for batch in work.micro_batches(micro_tokens=8)]
    [8, 5]
    """

    batches: list[tuple[Array, Array]]
    steps: int
    accumulate: int = 1
    epoch: int = 0
    evaluated: int = 0
    keeps_best: bool = False
    prefix_tokens: int = 0
    sequences: int = 1
    least_length: int = 0
    extra_passes: int = 0
    reference: Sequence[tuple[int, int]] = ()
    teaching: Teaching | None = None
    adds_in_order: bool = False
    is_local: bool = False
    filters: bool = False
    int8_head: str = "forward"

    def batches_of_steps(self) -> Iterator[list[tuple[Array, Array]]]:
        """Divide `batches` into steps, and yield the batches of each step.

        >>> batch = np.array([8, 5]), np.array([3, 2])
        >>> work = nplora.finetuning.planning.Work([batch] * 6, steps=10, accumulate=2, epoch=3)
        >>> [len(step) for step in work.batches_of_steps()]
        [2, 1, 2, 1]
        """
        epoch = self.epoch or len(self.batches)
        epochs = (self.batches[first : first + epoch] for first in range(0, len(self.batches), epoch))
        steps = (one[i : i + self.accumulate] for one in epochs for i in range(0, len(one), self.accumulate))
        return itertools.islice(steps, self.steps)

    def micro_batches(self, micro_tokens: int | None) -> Iterator[MicroBatch]:
        """The micro-batches that the batches are cut into."""
        for batch in self.batches:
            yield from self.cut(batch, micro_tokens)

    def cut(self, batch: tuple[Array, Array], micro_tokens: int | None) -> Iterator[MicroBatch]:
        """The micro-batches that a batch is cut into."""
        lengths, targets = batch
        for first, last in itertools.pairwise(cut(lengths, micro_tokens)):
            part = lengths[first:last]
            yield MicroBatch(int(part.sum()), int(targets[first:last].sum()), int(part.max(initial=0)))

    def largest(self, micro_tokens: int | None) -> MicroBatch:
        """Return the maxima of `tokens`, `targets` and `longest` over all micro-batches."""
        found = list(self.micro_batches(micro_tokens))
        return MicroBatch(
            *(max(getattr(one, name) for one in found) for name in ("tokens", "targets", "longest"))
        )

    def gradient_copies(self, micro_tokens: int | None) -> int:
        """The maximum number of arrays that a rank needs to exchange gradients with other ranks.

        Each of these arrays is as large as all gradients of the model.

        >>> batches = [(np.array([8, 5]), np.array([3, 2]))]
        >>> work = nplora.finetuning.planning.Work(batches, steps=10, accumulate=2, adds_in_order=True)
        >>> work.gradient_copies(micro_tokens=None), work.gradient_copies(micro_tokens=8)
        (4, 7)
        """
        if not self.adds_in_order:
            return 0
        parts = max(len(cut(lengths, micro_tokens)) - 1 for lengths, _ in self.batches)
        if self.is_local:  # this rank's gradients twice, and their sum
            return 2 * parts + 1 + _ARRAYS_OF_OUTER_STEPS
        # At most: this rank's gradients of the current batch; its gradients of the batch before, which may
        # not have arrived everywhere; the gradients of the other ranks; and the sum.
        return (3 if self.accumulate > 1 else 2) * parts + 1

    def shortened(self, length: int) -> Work:
        """A copy of this object as if the maximum length of a sequence were `length` tokens."""
        most = self.sequences * length
        batches = [(np.minimum(n, most), np.minimum(trained, most)) for n, trained in self.batches]
        evaluated = min(self.evaluated, max(EVALUATION_TOKENS, most))
        return dataclasses.replace(self, batches=batches, evaluated=evaluated)

    @property
    def longest(self) -> int:
        """The number of tokens of the longest example."""
        return max(int(lengths.max(initial=0)) for lengths, _ in self.batches)

    @property
    def batch_tokens(self) -> int:
        """The number of tokens of the largest batch."""
        return max(int(lengths.sum()) for lengths, _ in self.batches)
