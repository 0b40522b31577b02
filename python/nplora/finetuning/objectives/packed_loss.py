"""PackedLoss: what the losses of a language model have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from nplora.finetuning.objectives.tally import Addition, Tally
from nplora.lm import LanguageModel
from nplora.models.packing import PackedBatch
from nplora.nn.module import Module, quiet
from nplora.trainer import FusedLoss


class PackedLoss(FusedLoss):
    """The base class of losses over packed batches, which are computed in micro-batches.

    Args:
        micro_tokens: maximum tokens of a micro-batch; None: batches are not cut into micro-batches.
    Attributes:
        tokens: number of tokens, trained or not, of all batches that were processed, here or on other ranks.
        after_part: called after the backward pass of each micro-batch.
        unit: what `count` counts, for progress lines.
    """

    unit = "trained tokens"

    def __init__(self, micro_tokens: int | None = None) -> None:
        self.micro_tokens = micro_tokens
        self.tokens = 0
        self.after_part: Callable[[], None] = _nothing

    def parts(self, x: PackedBatch, y: Any) -> int:
        """The number of micro-batches of a batch."""
        return sum(1 for _ in self._micro_batches(x))

    def computed_elsewhere(self, x: PackedBatch, y: Any) -> None:
        self.tokens += len(x.ids)

    def _micro_batches(self, x: PackedBatch) -> Iterator[PackedBatch]:
        """The micro-batches that are computed. Those without a target have no loss."""
        return (part for part in x.pieces(self.micro_tokens) if part.num_targets)

    def settings(self) -> dict[str, Any]:
        return {} if self.micro_tokens is None else {"micro_tokens": self.micro_tokens}

    def blame(self, model: Module, x: PackedBatch) -> str:
        assert isinstance(model, LanguageModel)
        found: list[str] = []
        prefix, model.model.prefix = model.model.prefix, None
        for index, block in enumerate(model.model.layers):
            vars(block)["run"] = _watched(block.run, f"model.layers.{index}", found)
        try:
            with quiet():
                model.loss_packed(x)
        finally:
            for block in model.model.layers:
                del vars(block)["run"]
            model.model.prefix = prefix
        return f"the first layer whose output is not finite is {(found or ['lm_head'])[0]!r}"


class TalliedLoss(PackedLoss):
    """The base class of losses that measure other quantities than the loss."""

    def __init__(self, micro_tokens: int | None = None) -> None:
        super().__init__(micro_tokens)
        self._tally = Tally()

    def take_metrics(self) -> dict[str, float]:
        """The means of the measured quantities since the last call."""
        return self._tally.take()

    def take_measured(self) -> list[Addition]:
        return self._tally.take_additions()

    def add_measured(self, measured: list[Addition]) -> None:
        self._tally.add_all(measured)


def _nothing() -> None:
    pass


def _watched(run: Callable[..., Any], name: str, found: list[str]) -> Callable[..., Any]:
    def watching(*arguments: Any, **named: Any) -> Any:
        result = run(*arguments, **named)
        if not np.isfinite(result[0]).all():
            found.append(name)
        return result

    return watching
