"""The tokens of a multiple-choice question and of each choice."""

from __future__ import annotations

from dataclasses import dataclass

from nplora.finetuning.data.examples import MultipleChoice
from nplora.formats.errors import DataError
from nplora.tokenizer import Tokenizer
from nplora.tokenizer.tokenizer import TRAINING_TIME


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

    In most models, white space between words belongs to the token that follows it. So, as in
    lm-evaluation-harness, white space at the end of a prompt is moved to the beginning of each choice. If the
    prompt does not end with white space, a space is put before each choice that does not begin with white
    space. With the chat template, the choices stay as they are.

    Args:
        chat: write the question with the chat template.
    Raises:
        DataError: the prompt has no tokens, or the chat template refuses it.
    """
    try:
        if chat or not isinstance(example.prompt, str):
            prompt = tokenizer.encode_chat(example.messages, True, now=TRAINING_TIME)
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
