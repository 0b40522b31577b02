"""Objectives on pairs of a chosen and a rejected answer: DPO with a reference, and ORPO without one."""

from __future__ import annotations

import dataclasses
import functools
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.finetuning.data.comparisons import Answers, LearnedPairs, PairDataset, read_pairs, wanted_pairs
from nplora.finetuning.data.dataset import ReadOptions
from nplora.finetuning.data.kinds import Kind
from nplora.finetuning.data.sources import Source
from nplora.finetuning.objectives.objective import Objective
from nplora.finetuning.objectives.packed_loss import MicroBatch, PackedLoss, micro_batches
from nplora.finetuning.objectives.preference_losses import Dpo, odds_ratio
from nplora.finetuning.objectives.reference import Reference, by_sequence, sums
from nplora.lm import LanguageModel
from nplora.models.packing import IGNORED, PackedBatch
from nplora.nn.module import Module
from nplora.tokenizer import Tokenizer

Array = npt.NDArray[Any]


class PairLoss(PackedLoss):
    """The base class of losses of pairs of answers. The loss of a batch is the mean of its pairs' losses.

    The two answers of a pair are always in the same micro-batch.

    The loss has four metrics: the mean reward of the chosen answers; the mean reward of the rejected answers;
    the first mean minus the second (the margin); and the share of pairs whose chosen answer has the larger
    reward.
    """

    unit = "pairs"
    together = 2

    def count(self, x: PackedBatch, y: Answers) -> int:
        return (len(x.starts) - 1) // 2

    def forward_backward(self, model: Module, x: PackedBatch, y: Answers, factor: float) -> float:
        assert isinstance(model, LanguageModel)
        self.tokens += len(x.ids)
        total, weight = 0.0, self._weight(x)
        for part, _, tokens in self._micro_batches(x):
            loss = functools.partial(self._scaled, part, y.is_answer[tokens], weight, factor)
            total += model.forward_backward_of(part, loss)
            self._end_part()
        return total

    def evaluate(self, model: Module, x: PackedBatch, y: Answers) -> float:
        assert isinstance(model, LanguageModel)
        weight = 1 / y.tokens_per_pair
        return self._loss(x, y.is_answer, weight, model.log_probs(x))[0] / self.count(x, y)

    def _micro_batches(self, x: PackedBatch) -> Iterator[MicroBatch]:
        return micro_batches(x, self.micro_tokens, self.together)

    def _inputs_of(self, y: Answers, sequences: slice, tokens: slice) -> Answers:
        return dataclasses.replace(y, is_answer=y.is_answer[tokens])

    def _scaled(
        self, part: PackedBatch, is_answer: Array, weight: float, factor: float, log_probs: Array
    ) -> tuple[float, Array]:
        value, gradient = self._loss(part, is_answer, weight, log_probs)
        return value, factor * gradient

    @abstractmethod
    def _loss(
        self, part: PackedBatch, is_answer: Array, weight: float, log_probs: Array
    ) -> tuple[float, Array]:
        """Return the sum of a micro-batch's losses, and the sum's derivative with respect to `log_probs`.

        Args:
            is_answer: for each token, whether the next token belongs to an answer.
            weight: the number of pairs, divided by the number of targets in their chosen sequences. In
                training, the pairs are those of the batch; in an evaluation, those of the data set, so that
                the loss does not depend on how the data are divided into batches.
            log_probs: array (m,), the log-probability of each of the m targets.
        """

    def _weight(self, x: PackedBatch) -> float:
        tokens = np.bincount(by_sequence(x), minlength=len(x.starts) - 1)[::2].sum()
        return (len(x.starts) - 1) / 2 / max(1, int(tokens))

    def _measure(self, rewards: Array) -> None:
        """Update the metrics, named as in TRL. Columns of `rewards` (n, 2): chosen and rejected."""
        chosen, rejected = rewards.T
        self._tally.add("rewards/chosen", chosen)
        self._tally.add("rewards/rejected", rejected)
        self._tally.add("rewards/accuracies", chosen > rejected)


class DpoLoss(PairLoss):
    """A loss of the log-ratios log p(answer) - log p_ref(answer) of chosen and rejected answers."""

    def __init__(self, formula: Dpo, reference: Reference, micro_tokens: int | None = None) -> None:
        super().__init__(micro_tokens)
        self._formula, self._reference = formula, reference

    def settings(self) -> dict[str, Any]:
        chosen = {"beta": self._formula.beta, "loss_type": self._formula.loss_type}
        smoothing = {"label_smoothing": self._formula.label_smoothing}
        return {"objective": "dpo", **chosen, **smoothing, **super().settings()}

    def _loss(
        self, part: PackedBatch, is_answer: Array, weight: float, log_probs: Array
    ) -> tuple[float, Array]:
        places = by_sequence(part)
        counts = np.bincount(places, minlength=len(part.starts) - 1)
        ratios = sums(part, log_probs) - self._reference.log_probs_of(part)
        values, slopes = self._formula(ratios.reshape(-1, 2), counts.reshape(-1, 2))
        self._measure(self._formula.beta * ratios.reshape(-1, 2))
        return float(values.sum()), slopes.reshape(-1)[places]


class OrpoLoss(PairLoss):
    """The cross-entropy of the chosen texts, plus a penalty that compares the odds of the two answers.

    The cross-entropy is a mean over all tokens of the chosen texts, prompts included. The penalty is a mean
    over the pairs. The trainer divides the sum of all losses by the number of pairs. The loss of each token
    is therefore multiplied by `weight`, the number of pairs divided by the number of tokens, which makes the
    cross-entropy a mean over tokens.
    """

    def __init__(self, beta: float, micro_tokens: int | None = None) -> None:
        super().__init__(micro_tokens)
        self._beta = beta

    def settings(self) -> dict[str, Any]:
        return {"objective": "orpo", "beta": self._beta, **super().settings()}

    def _loss(
        self, part: PackedBatch, is_answer: Array, weight: float, log_probs: Array
    ) -> tuple[float, Array]:
        places, in_answer = by_sequence(part), is_answer[part.targets != IGNORED]
        counts = np.maximum(1, np.bincount(places, in_answer, len(part.starts) - 1))
        means = np.bincount(places, log_probs * in_answer, len(part.starts) - 1) / counts
        values, slopes = odds_ratio(means.reshape(-1, 2), self._beta)
        is_chosen = places % 2 == 0
        gradient = in_answer * (slopes.reshape(-1) / counts)[places] - weight * is_chosen
        learned = log_probs[is_chosen]
        self._measure(self._beta * means.reshape(-1, 2))
        self._tally.add("nll_loss", -learned, counted=True)
        return float(values.sum()) - weight * float(learned.sum()), gradient


class _PairObjective(Objective):
    """The base class of objectives that learn from pairs."""

    def require(self, kind: Kind, where: str) -> None:
        wanted_pairs(self.name).require(kind, where)


class DpoObjective(_PairObjective):
    """Direct preference optimisation: chosen answers become likelier, rejected ones less likely."""

    name = "dpo"
    has_reference = True

    def read(self, op: str, sources: list[Source], tokenizer: Tokenizer, reading: ReadOptions) -> PairDataset:
        return read_pairs(op, sources, tokenizer, reading, self.name, PairDataset)

    def sequences_of(self, x: PackedBatch, y: Answers) -> list[PackedBatch]:
        return [x]

    def loss(self, micro_tokens: int | None) -> DpoLoss:
        options = self.options
        formula = Dpo(options.loss_type or "sigmoid", options.beta, options.label_smoothing)
        return DpoLoss(formula, self._reference, micro_tokens)


class OrpoObjective(_PairObjective):
    """Odds ratio preference optimisation: learns chosen answers, penalises rejected ones; no reference."""

    name = "orpo"

    def read(self, op: str, sources: list[Source], tokenizer: Tokenizer, reading: ReadOptions) -> PairDataset:
        return read_pairs(op, sources, tokenizer, reading, self.name, LearnedPairs)

    def loss(self, micro_tokens: int | None) -> OrpoLoss:
        return OrpoLoss(self.options.beta, micro_tokens)
