"""Kahneman-Tversky optimisation: learns from answers that were judged one by one, instead of pairs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.finetuning.data import EVALUATION_TOKENS
from nplora.finetuning.data.comparisons import JudgedDataset, Judgements, read_judged, wanted_judgements
from nplora.finetuning.data.dataset import ReadOptions
from nplora.finetuning.data.kinds import Kind
from nplora.finetuning.data.sources import Source
from nplora.finetuning.nonfinite_layers import first_nonfinite_layer
from nplora.finetuning.objectives.objective import Objective
from nplora.finetuning.objectives.packed_loss import MicroBatch, PackedLoss, micro_batches
from nplora.finetuning.objectives.preference_losses import Kto
from nplora.finetuning.objectives.reference import Reference, by_sequence, sums
from nplora.lm import LanguageModel
from nplora.models.packing import PackedBatch
from nplora.nn.module import Module
from nplora.tokenizer import Tokenizer

Array = npt.NDArray[Any]


class KtoLoss(PackedLoss):
    """The KTO loss: the mean of the losses of all answers.

    The log-ratio of an answer is log p(answer) - log p_ref(answer). The loss compares it with an estimate of
    the KL divergence: the mean log-ratio of the batch's mismatched pairs (prompts with answers to other
    prompts), or 0 if this mean is negative. No gradient flows through the estimate.

    The loss has five metrics: the mean reward of the good answers; the mean reward of the bad answers; the
    first mean minus the second; the accuracy; and the estimate of the KL divergence. The accuracy is the
    share of answers that are good and have a log-ratio above the estimate, or are bad and have a log-ratio
    below the estimate.
    """

    unit = "answers"

    def __init__(self, formula: Kto, reference: Reference, micro_tokens: int | None = None) -> None:
        super().__init__(micro_tokens)
        self._formula, self._reference = formula, reference
        self._mismatched: PackedBatch | None = None

    def settings(self) -> dict[str, Any]:
        chosen = {"beta": self._formula.beta, "loss_type": self._formula.loss_type}
        weights = {
            "desirable_weight": self._formula.desirable,
            "undesirable_weight": self._formula.undesirable,
        }
        return {"objective": "kto", **chosen, **weights, **super().settings()}

    def count(self, x: PackedBatch, y: Judgements) -> int:
        return len(y.good)

    def forward_backward(self, model: Module, x: PackedBatch, y: Judgements, factor: float) -> float:
        assert isinstance(model, LanguageModel)
        self.tokens += len(x.ids)
        kl, total = self._kl(model, y), 0.0
        for part, sequences, _ in self._micro_batches(x):
            loss = functools.partial(self._scaled, part, y.good[sequences], kl, factor)
            total += model.forward_backward_of(part, loss)
            self._end_part()
        return total

    def evaluate(self, model: Module, x: PackedBatch, y: Judgements) -> float:
        assert isinstance(model, LanguageModel)
        value, _ = self._scaled(x, y.good, self._kl(model, y), 1.0, model.log_probs(x))
        return value / len(y.good)

    def blame(self, model: Module, x: PackedBatch) -> str:
        """Name the first layer whose output for the batch is not finite.

        If all outputs for the batch are finite, look for such a layer with the mismatched pairs instead.
        """
        assert isinstance(model, LanguageModel)
        name = "" if self._mismatched is None else first_nonfinite_layer(model, self._mismatched)
        if name and not first_nonfinite_layer(model, x):
            return f"in mismatched pairs, the first layer whose output is not finite is {name!r}"
        return super().blame(model, x)

    def _micro_batches(self, x: PackedBatch) -> Iterator[MicroBatch]:
        return micro_batches(x, self.micro_tokens)

    def _inputs_of(self, y: Judgements, sequences: slice, tokens: slice) -> Judgements:
        return dataclasses.replace(y, good=y.good[sequences])  # `_kl` needs all pairs of `mismatched`

    def _kl(self, model: LanguageModel, y: Judgements) -> float:
        """The estimate of the KL divergence from the mismatched pairs of a batch."""
        if not self._formula.uses_kl:
            return 0.0
        self._mismatched = y.mismatched
        ratios = [
            sums(part, model.log_probs(part)) - self._reference.log_probs_of(part)
            for part in y.mismatched.pieces(EVALUATION_TOKENS)
        ]
        kl = max(0.0, float(np.concatenate(ratios).mean()))
        self._tally.add("kl", np.full(len(y.good), kl))
        return kl

    def _scaled(
        self, part: PackedBatch, good: Array, kl: float, factor: float, log_probs: Array
    ) -> tuple[float, Array]:
        """Return the sum of the losses, and `factor` times the derivative of the sum with respect to
        `log_probs`."""
        ratios = sums(part, log_probs) - self._reference.log_probs_of(part)
        values, slopes = self._formula(ratios, good, kl)
        rewards = self._formula.beta * ratios
        self._tally.add("rewards/chosen", rewards[good], counted=True)
        self._tally.add("rewards/rejected", rewards[~good], counted=True)
        self._tally.add("rewards/accuracies", np.where(good, ratios > kl, ratios < kl))
        return float(values.sum()), factor * slopes[by_sequence(part)]


class KtoObjective(Objective):
    """Kahneman-Tversky optimisation: good answers become likelier, bad ones less likely."""

    name = "kto"
    has_reference = True

    def require(self, kind: Kind, where: str) -> None:
        wanted_judgements(self.name).require(kind, where)

    def read(
        self, op: str, sources: list[Source], tokenizer: Tokenizer, reading: ReadOptions
    ) -> JudgedDataset:
        return read_judged(op, sources, tokenizer, reading, self.name, self._formula.uses_kl)

    def sequences_of(self, x: PackedBatch, y: Judgements) -> list[PackedBatch]:
        """Return the answers, and the mismatched pairs if there are any.

        If `tune` compares several losses, the data have mismatched pairs if one of these losses needs them.
        """
        return [x, y.mismatched] if len(y.mismatched.ids) else [x]

    def loss(self, micro_tokens: int | None) -> KtoLoss:
        return KtoLoss(self._formula, self._reference, micro_tokens)

    @property
    def extra_passes(self) -> int:
        return int(self._formula.uses_kl)

    @property
    def _formula(self) -> Kto:
        options = self.options
        return Kto(
            options.loss_type or "kto", options.beta, options.desirable_weight, options.undesirable_weight
        )
