"""Measures the loss of each example, and how many of its trained tokens are the model's likeliest tokens."""

from __future__ import annotations

import numpy as np

from nplora.finetuning.data import Dataset
from nplora.finetuning.judging.statistics import Measured
from nplora.finetuning.load import evaluation_batches
from nplora.finetuning.objectives.reference import by_sequence
from nplora.lm import LanguageModel


def measure_tokens(lm: LanguageModel, dataset: Dataset) -> list[Measured]:
    """The loss and the token accuracy of the model on all examples.

    The loss is summed in the order in which the trainer sums the validation loss. So the result has the same
    bits as the validation loss.
    """
    summed = 0.0
    loss, tokens, top = (np.zeros(len(dataset)) for _ in range(3))
    for members in evaluation_batches(dataset).members(0):
        batch, _ = dataset.batch(members)
        scores = lm.token_scores(batch)
        summed += -scores.log_probs.sum() / max(1, batch.num_targets) * batch.num_targets
        example = by_sequence(batch)
        for total, values in ((loss, -scores.log_probs), (tokens, None), (top, scores.is_top)):
            total[members] = np.bincount(example, values, minlength=len(members))
    mean = float(summed / max(1.0, tokens.sum()))
    return [
        Measured("loss", loss, tokens, lower_is_better=True, exact=mean),
        Measured("token_accuracy", top, tokens, is_rate=True),
    ]
