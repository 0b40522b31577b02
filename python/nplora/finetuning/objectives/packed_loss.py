"""PackedLoss: the base class of all losses of a language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from nplora.finetuning.nonfinite_layers import first_nonfinite_layer
from nplora.finetuning.objectives.tally import Addition, Tally
from nplora.lm import LanguageModel
from nplora.models.packing import PackedBatch
from nplora.models.word_filter import WordFilter
from nplora.nn.module import Module
from nplora.trainer import FusedLoss

KEPT = "kept_vocabulary"  # the metric: the share of the vocabulary that the word filter keeps
MicroBatch = tuple[PackedBatch, slice, slice]  # the slices are its sequences and tokens in the whole batch


class PackedLoss(FusedLoss):
    """The base class of losses of a `PackedBatch`. A batch is computed in micro-batches.

    Args:
        micro_tokens: maximum number of tokens in a micro-batch; None: batches are not cut into micro-batches.
    Attributes:
        tokens: number of tokens, trained or not, in the batches that all ranks together have processed.
        after_part: a function that is called after the backward pass of each micro-batch.
        word_filter: the filter of the model's head, or None.
        int8_head: the arithmetic of the head: "off", "forward" or "on"; None: the model does not use int8.
        together: the number of neighbouring sequences that are always in the same micro-batch.
        unit: what the method `count` counts, such as "trained tokens". Progress lines print this name.
    """

    unit = "trained tokens"
    together: ClassVar[int] = 1

    def __init__(self, micro_tokens: int | None = None) -> None:
        self.micro_tokens = micro_tokens
        self.tokens = 0
        self._tally = Tally()
        self.after_part: Callable[[], None] = _nothing
        self.word_filter: WordFilter | None = None
        self.int8_head: str | None = None

    def parts(self, x: PackedBatch, y: Any) -> int:
        """The number of micro-batches of a batch."""
        return sum(1 for _ in self._micro_batches(x))

    def computed_elsewhere(self, x: PackedBatch, y: Any) -> None:
        self.tokens += len(x.ids)

    def _end_part(self) -> None:
        """After a micro-batch, record what the word filter skipped and kept, and call `after_part`."""
        if self.word_filter is not None:
            rows, probability, kept = self.word_filter.take_skipped()
            self._tally.add_all([("skipped_probability", probability, rows, True), (KEPT, kept, rows, True)])
        self.after_part()

    def _micro_batches(self, x: PackedBatch) -> Iterator[MicroBatch]:
        """The micro-batches of a batch. A micro-batch without targets has no loss, and is left out."""
        cut = micro_batches(x, self.micro_tokens, self.together)
        return (each for each in cut if each[0].num_targets)

    def parts_of(self, x: PackedBatch, y: Any, most_tokens: int | None) -> list[tuple[PackedBatch, Any]]:
        """Divide a batch and its additional inputs into batches of at most `most_tokens` tokens."""
        return [
            (part, self._inputs_of(y, sequences, tokens))
            for part, sequences, tokens in micro_batches(x, most_tokens, self.together)
        ]

    def _inputs_of(self, y: Any, sequences: slice, tokens: slice) -> Any:
        """The additional inputs of the loss for a part of a batch.

        Args:
            sequences, tokens: the part's sequences and tokens in the batch.
        """
        return y

    def settings(self) -> dict[str, Any]:
        cut = {} if self.micro_tokens is None else {"micro_tokens": self.micro_tokens}
        filtered = {} if self.word_filter is None else {"filter_vocabulary": self.word_filter.bound}
        return cut | filtered | ({} if self.int8_head is None else {"int8_head": self.int8_head})

    def count(self, x: PackedBatch, y: Any) -> int:
        return x.num_targets

    def take_metrics(self) -> dict[str, float]:
        return self._tally.take()

    def take_measured(self) -> list[Addition]:
        return self._tally.take_additions()

    def add_measured(self, measured: list[Addition]) -> None:
        self._tally.add_all(measured)

    def blame(self, model: Module, x: PackedBatch) -> str:
        assert isinstance(model, LanguageModel)
        name = first_nonfinite_layer(model, x)
        if not name:
            return "the output of every layer is finite, but the loss is not"
        return f"the first layer whose output is not finite is {name!r}"


def micro_batches(x: PackedBatch, most_tokens: int | None, together: int = 1) -> Iterator[MicroBatch]:
    """Divide a batch into micro-batches with `PackedBatch.pieces`.

    Yield a tuple for each micro-batch: the micro-batch, the slice of its sequences in the batch `x`, and the
    slice of its tokens in `x`.
    """
    sequences = tokens = 0
    for part in x.pieces(most_tokens, together):
        ends = sequences + len(part.starts) - 1, tokens + len(part.ids)
        yield part, slice(sequences, ends[0]), slice(tokens, ends[1])
        sequences, tokens = ends


def _nothing() -> None:
    pass
