"""Generated answers: the prompts of rows, the model's answers, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from nplora.finetuning.data.examples import (
    Chat,
    Completion,
    Example,
    Instruction,
    MultipleChoice,
    through_template,
)
from nplora.finetuning.judging.metrics import Metric
from nplora.finetuning.judging.statistics import Measured
from nplora.formats.errors import DataError, counted
from nplora.lm import LanguageModel
from nplora.lm.generation import Sampling, generate_ids
from nplora.runtime.user_warning import warn_user
from nplora.tokenizer import Tokenizer
from nplora.tokenizer.tokenizer import TRAINING_TIME

_MOST_PROMPTS = 32  # prompts that are answered together
_MOST_TOKENS = 8192  # tokens of prompts and answers that are in memory together


@dataclass(frozen=True)
class Asked:
    """A prompt and the reference answer.

    Attributes:
        ids: the tokens of the prompt.
        row: the fields of the row with the prompt.
        where: the file and line of the row.
    """

    ids: list[int]
    reference: str
    row: dict[str, Any]
    where: str


def asked(tokenizer: Tokenizer, example: Example, row: dict[str, Any], where: str, chat: bool) -> Asked:
    """Return the prompt and the reference answer of an example.

    The reference answer is the completion, or the last trained turn of the assistant.

    Args:
        chat: whether an example with a prompt and a completion is written with the chat template.
    Raises:
        DataError: the example has no prompt, its answer is not a text, or the chat template refuses the
            example.
    """
    if isinstance(example, Instruction) and not chat:
        has_template = tokenizer.chat_template is not None
        example = example.as_chat() if has_template else example.as_completion()
    elif isinstance(example, MultipleChoice):
        example = example.as_answer()
    example = through_template(example) if chat else example
    try:
        if isinstance(example, Completion):
            ids, reference = tokenizer.encode_prompt(example.prompt), example.completion
        elif isinstance(example, Chat):
            ids, reference = _of_chat(tokenizer, example)
        else:
            raise DataError("the row has no prompt, but a metric of generated answers needs one")
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    if not ids:
        raise DataError(f"{where}: prompt is empty, but a model without a BOS token needs a prompt")
    return Asked(ids, reference.strip(), row, where)


def _of_chat(tokenizer: Tokenizer, chat: Chat) -> tuple[list[int], str]:
    """Return two things: the tokens of all messages before the last trained turn of the assistant, and the
    text of that turn."""
    place = max((i for i in range(len(chat.messages)) if chat.is_trained(i)), default=0)
    message = chat.messages[place]
    if not place:
        raise DataError("no assistant turn of weight 1 follows another message")
    if message.get("tool_calls"):
        raise DataError(
            "the last assistant turn of weight 1 calls a tool, expected a text to compare the answer with"
        )
    ids = tokenizer.encode_chat(
        chat.messages[:place], True, tools=chat.tools, documents=chat.documents, now=TRAINING_TIME
    )
    return ids, message["content"]


def answers(lm: LanguageModel, questions: list[Asked], max_new_tokens: int) -> Iterator[str]:
    """The model's answer to each prompt, by greedy decoding. White space around the answer is removed."""
    sampling = Sampling(max_new_tokens=max_new_tokens)
    for group in groups([question.ids for question in questions], max_new_tokens):
        yield from map(str.strip, generate_ids(lm, group, sampling))


def groups(prompts: list[list[int]], max_new_tokens: int) -> list[list[list[int]]]:
    """Divide the prompts, in their order, into groups. The model answers each group in one batch."""
    found, longest = list[list[list[int]]](), 0
    for ids in prompts:
        longest = max(longest, len(ids))
        full = not found or len(found[-1]) == _MOST_PROMPTS
        if full or (len(found[-1]) + 1) * (longest + max_new_tokens) > _MOST_TOKENS:
            found.append([])
            longest = len(ids)
        found[-1].append(ids)
    return found


def measure_answers(
    lm: LanguageModel,
    questions: list[Asked],
    metrics: list[Metric],
    max_new_tokens: int,
    record: Callable[[dict[str, Any]], None],
) -> list[Measured]:
    """Generate the answers, and score them with each metric. A metric that always fails gets the value NaN.

    Args:
        record: a function that is called for each prompt, with a dict of the answer and its scores.
    """
    scores = np.zeros((len(metrics), len(questions)))
    for metric in metrics:
        metric.failed, metric.error, metric.is_rate = 0, "", True
    for place, answer in enumerate(answers(lm, questions, max_new_tokens)):
        question, named = questions[place], dict[str, float | None]()
        for index, metric in enumerate(metrics):
            failed = metric.failed
            score = metric.score(answer, question.reference, question.row, question.where)
            scores[index, place] = score
            named[metric.name] = float(score) if metric.failed == failed else None
        record({"row": question.where, "answer": answer, "reference": question.reference, **named})
    for metric, row in zip(metrics, scores, strict=True):
        if metric.failed == len(questions):
            row[:] = np.nan
        if metric.failed:
            warn_user(_failures(metric, len(questions)))
    ones = np.ones(len(questions))
    return [
        Measured(metric.name, row, ones, failed=metric.failed, error=metric.error, is_rate=metric.is_rate)
        for metric, row in zip(metrics, scores, strict=True)
    ]


def _failures(metric: Metric, count: int) -> str:
    """A warning that a metric failed in some of `count` examples."""
    examples = counted(count, "example")
    if metric.failed == count:
        return f"the metric {metric.name} failed in all of {examples}, so it has no value: {metric.error}"
    return f"the metric {metric.name} failed in {metric.failed} of {examples}; a failed example counts as 0"
