"""Preference pairs: how often a model finds the chosen answer likelier than the rejected one."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.finetuning.data.comparisons import PairDataset
from nplora.finetuning.judging.statistics import Measured
from nplora.finetuning.load import evaluation_batches
from nplora.finetuning.objectives.reference import by_sequence
from nplora.lm import LanguageModel

Array = npt.NDArray[Any]


class PairScores:
    """The scores of a model on all pairs.

    Attributes:
        log_probs: float64 (pairs, 2), the log-probabilities of the chosen and of the rejected answer.
        counts: (pairs, 2), the number of tokens of each answer.
        top: (pairs, 2), how many tokens of each answer are the model's most likely tokens.
    """

    def __init__(self, lm: LanguageModel, dataset: PairDataset) -> None:
        self.log_probs, self.counts, self.top = (np.zeros((len(dataset), 2)) for _ in range(3))
        for members in evaluation_batches(dataset).members(0):
            batch, _ = dataset.batch(members)
            scores = lm.token_scores(batch)
            sequence = by_sequence(batch)
            for total, values in (
                (self.log_probs, scores.log_probs), (self.counts, None), (self.top, scores.is_top),
            ):  # fmt: skip
                total[members] = np.bincount(sequence, values, 2 * len(members)).reshape(-1, 2)

    def measured(self, reference: PairScores | None) -> list[Measured]:
        """Compute the metrics of the model from its scores.

        Args:
            reference: the scores of the model without an adapter; None: compute no rewards. The reward of an
                answer is its log-probability minus its log-probability in `reference`.
        """
        tokens, ones = self.counts[:, 0], np.ones(len(self.counts))
        per_token = self.log_probs / np.maximum(1, self.counts)
        found = [
            Measured("loss", -self.log_probs[:, 0], tokens, lower_is_better=True),
            Measured("token_accuracy", self.top[:, 0], tokens, is_rate=True),
            Measured("acc", _preferred(self.log_probs), ones, is_rate=True),
            Measured("acc_token", _preferred(per_token), ones, is_rate=True),
        ]
        if reference is not None:
            rewards = self.log_probs - reference.log_probs
            found += [
                Measured("reward_acc", _preferred(rewards), ones, is_rate=True),
                Measured("reward_margin", rewards[:, 0] - rewards[:, 1], ones, lower_is_better=None),
            ]
        return found


def _preferred(scores: Array) -> Array:
    """For each pair: 1 if the chosen answer has the higher score, 0.5 if both scores are equal, else 0."""
    chosen, rejected = scores.T
    return np.asarray((chosen > rejected) + 0.5 * (chosen == rejected))
