"""PackedLoss: what the losses of a language model have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nplora.finetuning.nonfinite_layers import first_nonfinite_layer
from nplora.finetuning.objectives.tally import Tally
from nplora.lm import LanguageModel
from nplora.models.packing import PackedBatch
from nplora.nn.module import Module
from nplora.trainer import FusedLoss


class PackedLoss(FusedLoss):
    """The base class of losses over packed batches, which are computed in micro-batches.

    Args:
        micro_tokens: maximum tokens of a micro-batch; None: batches are not cut into micro-batches.
    Attributes:
        tokens: number of tokens, trained or not, that `forward_backward` has processed.
        unit: what `count` counts, for progress lines.
    """

    unit = "trained tokens"

    def __init__(self, micro_tokens: int | None = None) -> None:
        self.micro_tokens = micro_tokens
        self.tokens = 0
        self._tally = Tally()

    def settings(self) -> dict[str, Any]:
        return {} if self.micro_tokens is None else {"micro_tokens": self.micro_tokens}

    def count(self, x: PackedBatch, y: Any) -> int:
        return x.num_targets

    def take_metrics(self) -> dict[str, float]:
        return self._tally.take()

    def blame(self, model: Module, x: PackedBatch) -> str:
        assert isinstance(model, LanguageModel)
        name = first_nonfinite_layer(model, x)
        if not name:
            return "the output of every layer is finite, but the loss is not"
        return f"the first layer whose output is not finite is {name!r}"


def micro_batches(
    x: PackedBatch, most_tokens: int | None, together: int = 1
) -> Iterator[tuple[PackedBatch, slice, slice]]:
    """Divide a batch as `PackedBatch.pieces` does. Each piece comes with its sequences and tokens in `x`."""
    sequences = tokens = 0
    for part in x.pieces(most_tokens, together):
        ends = sequences + len(part.starts) - 1, tokens + len(part.ids)
        yield part, slice(sequences, ends[0]), slice(tokens, ends[1])
        sequences, tokens = ends
