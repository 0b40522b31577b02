"""Multiple choice: the log-probability of each choice after the question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nplora.finetuning.data.examples import MultipleChoice
from nplora.finetuning.judging.statistics import Measured
from nplora.formats.errors import DataError
from nplora.lm import LanguageModel
from nplora.tokenizer import Tokenizer

_TOGETHER = 16  # questions in one call; the model divides them further by their tokens


@dataclass(frozen=True)
class Choices:
    """A question as tokens.

    Attributes:
        prompt: the tokens of the question.
        continuations: the tokens of each choice.
        texts: the text of each choice.
        answer: the index of the right choice.
        where: the file and line of the row.
    """

    prompt: list[int]
    continuations: list[list[int]]
    texts: tuple[str, ...]
    answer: int
    where: str

    @property
    def longest(self) -> int:
        return len(self.prompt) + max(map(len, self.continuations))


def encode_choices(tokenizer: Tokenizer, example: MultipleChoice, where: str, chat: bool) -> Choices:
    """The tokens of a question and of each choice.

    As in lm-evaluation-harness, white space at the end of the prompt is moved to the beginning of each
    choice, because the tokens of most models begin with white space, but do not end with it. If neither the
    prompt ends nor a choice begins with white space, a space is put before the choice.

    Args:
        chat: write the question with the chat template.
    Raises:
        DataError: the prompt has no tokens, or the chat template refuses it.
    """
    try:
        if chat or not isinstance(example.prompt, str):
            prompt = tokenizer.encode_chat(example.messages, True)
            continuations = [tokenizer.encode_continuation(text) for text in example.choices]
        else:
            before = example.prompt.rstrip()
            gap = example.prompt[len(before) :]
            prompt = tokenizer.encode_prompt(before)
            texts = [(gap or " " * (not text[0].isspace())) + text for text in example.choices]
            continuations = [_continuation(tokenizer, before, prompt, text) for text in texts]
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    if not prompt:
        raise DataError(f"{where}: prompt is empty, but a model without a BOS token needs a prompt")
    return Choices(prompt, continuations, example.choices, example.answer, where)


def _continuation(tokenizer: Tokenizer, before: str, prompt: list[int], text: str) -> list[int]:
    """The tokens of a text that follows the prompt.

    The prompt and the text are encoded as one text. If the result does not begin with the tokens of the
    prompt, the text is encoded alone.
    """
    ids = tokenizer.encode_prompt(before + text)
    return ids[len(prompt) :] if ids[: len(prompt)] == prompt else tokenizer.encode_continuation(text)


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
