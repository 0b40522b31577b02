"""Multiple choice: the log-probability of each choice after the question."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nplora.finetuning.data.choices import Choices
from nplora.finetuning.judging.statistics import Measured
from nplora.lm import LanguageModel

_TOGETHER = 16  # questions in one call; the model divides them further by their tokens


def measure_choices(
    lm: LanguageModel, questions: list[Choices], record: Callable[[dict[str, Any]], None]
) -> list[Measured]:
    """Return the loss and the token accuracy of the right choices, and three accuracies of the answers.

    For `acc`, the model's answer is the choice with the largest log-probability. For `acc_norm`, each
    log-probability is first divided by the choice's number of characters; for `acc_token`, by the choice's
    number of tokens. `acc` and `acc_norm` are the metrics of lm-evaluation-harness.
    """
    loss, tokens, top = (np.zeros(len(questions)) for _ in range(3))
    hits = {name: np.zeros(len(questions)) for name in ("acc", "acc_norm", "acc_token")}
    for begin in range(0, len(questions), _TOGETHER):
        group = questions[begin : begin + _TOGETHER]
        found = lm.continuation_scores([q.prompt for q in group], [q.continuations for q in group])
        for place, (question, scores) in enumerate(zip(group, found, strict=True), begin):
            sums = np.array([score.log_probs.sum() for score in scores])
            right = scores[question.answer]
            loss[place], tokens[place] = -sums[question.answer], len(right.log_probs)
            top[place] = right.is_top.sum()
            characters = np.array([len(text) for text in question.texts])
            counts = np.array([len(score.log_probs) for score in scores])
            for name, size in (("acc", 1), ("acc_norm", characters), ("acc_token", counts)):
                hits[name][place] = np.argmax(sums / size) == question.answer
            record({
                "row": question.where, "log_probs": sums.tolist(), "answer": question.answer,
                **{name: values[place] for name, values in hits.items()},
            })  # fmt: skip
    ones = np.ones(len(questions))
    return [
        Measured("loss", loss, tokens, lower_is_better=True),
        Measured("token_accuracy", top, tokens, is_rate=True),
        *(Measured(name, values, ones, is_rate=True) for name, values in hits.items()),
    ]
