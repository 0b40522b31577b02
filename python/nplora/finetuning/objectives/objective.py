"""Objective: chooses the loss of a run, reads the data, and prepares what the loss needs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar, Self

from nplora.distributed.communicator import Ranks
from nplora.finetuning.data import TokenBatches
from nplora.finetuning.data.dataset import ReadOptions, read_sources, require_one_answer
from nplora.finetuning.data.kinds import Kind
from nplora.finetuning.data.sources import Source
from nplora.finetuning.data.stored import Examples
from nplora.finetuning.objectives import reference
from nplora.finetuning.objectives.packed_loss import PackedLoss
from nplora.finetuning.objectives.reference import Reference
from nplora.finetuning.objectives.token_loss import TokenLoss
from nplora.finetuning.options import FinetuneOptions
from nplora.finetuning.planning import Teaching
from nplora.finetuning.teachers import Teacher
from nplora.formats import files
from nplora.lm import LanguageModel
from nplora.models.packing import PackedBatch
from nplora.tokenizer import Tokenizer


class Objective:
    """The objective of a run. This base class is the objective of supervised fine-tuning ("sft").

    The loss of "sft" is the mean of -log p(token) over the trained tokens. Make a new objective for each run.

    Attributes:
        has_reference: whether the loss compares the model with the reference: the model without the adapter.
        extra_passes: the number of additional forward passes in a step. Each pass has about as many tokens as
            the step.
    """

    name: ClassVar[str] = "sft"
    has_reference: ClassVar[bool] = False

    def __init__(self, options: FinetuneOptions) -> None:
        self.options = options
        self._reference = Reference()

    def with_options(self, op: str, options: FinetuneOptions) -> Self:
        """Return a copy of this objective with `options`. The copy shares the teacher and the `Reference`.

        Raises:
            ValueError: the options do not fit the teacher.
        """
        other = copy.copy(self)
        other.options = options
        return other

    @property
    def extra_passes(self) -> int:
        return 0

    @property
    def teacher(self) -> Teacher | None:
        """The teacher of a distillation; available after `open`."""
        return None

    def teaching(self, lm: LanguageModel) -> Teaching | None:
        """The facts from which a plan predicts the teacher's memory and time; None if there is no teacher."""
        return None

    def open(self, op: str, lm: LanguageModel, check: bool) -> None:
        """Open the teacher, if the objective needs one, and check that it fits the model.

        Args:
            check: whether `load_model` looks for NaN and infinities in the weights.
        """

    def reload(self, compute: str) -> None:
        """If the objective has loaded a teacher model, load the model again with the arithmetic `compute`."""

    def require(self, kind: Kind, where: str) -> None:
        """Raise a DataError if the objective cannot learn from rows of this kind.

        Args:
            where: the file and line of the row, for the message.
        """
        require_one_answer(kind, where)

    def read(self, op: str, sources: list[Source], tokenizer: Tokenizer, reading: ReadOptions) -> Examples:
        """Read examples, as `read_sources` does."""
        return read_sources(op, sources, tokenizer, reading)

    def sequences_of(self, x: PackedBatch, y: Any) -> list[PackedBatch]:
        """Return the sequences of a batch for which the loss needs log-probabilities of the reference."""
        return []

    def prepare(
        self,
        lm: LanguageModel,
        batches: list[TokenBatches],
        directory: files.Directory | None,
        say: Callable[[str], None],
        writes: bool = True,
        ranks: Ranks | None = None,
    ) -> None:
        """Compute what the loss needs besides the model's outputs: log-probabilities without the adapter.

        A second call adds the log-probabilities of its batches, and removes none.

        Args:
            lm: the model without the adapter that is trained.
            batches: the training data, and the validation data, if there are any.
            directory: the output directory; None on all ranks except rank 0.
            say: prints a text.
            writes: whether this call may write the log-probabilities to the directory. If False, the caller
                must call `keep` later.
            ranks: the processes that train together.
        """
        if self.has_reference:
            self._reference.compute(lm, batches, self.sequences_of, directory, say, writes, ranks)
        if writes and directory is not None:
            self.keep(directory)

    def keep(self, directory: files.Directory) -> None:
        """Write the reference's file if the loss needs it; otherwise remove the file of an earlier run."""
        if self.has_reference:
            self._reference.keep(directory)
        else:
            reference.drop(directory)

    def loss(self, micro_tokens: int | None) -> PackedLoss:
        """Make the loss, which computes each batch in micro-batches of at most `micro_tokens` tokens."""
        return TokenLoss(micro_tokens)
