"""Encoder: turns the examples of a data set into tokens, and marks each trained token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nplora.finetuning.data.choices import encode_choices
from nplora.finetuning.data.examples import (
    SYSTEM_ROLES,
    TOOL_ROLES,
    Answered,
    Chat,
    Completion,
    Example,
    Instruction,
    Judged,
    Message,
    MultipleChoice,
    Preference,
    Text,
    through_template,
)
from nplora.formats.errors import DataError, FormatError, LimitError, UnsafeError, UnsupportedError, brief
from nplora.tokenizer import Tokenizer
from nplora.tokenizer.chat_template import RefusedChatError

LEARN = ("completion", "all")
_NOTHING = "nothing to train on, expected an assistant turn of weight 1 with at least one token before it"


@dataclass(frozen=True)
class Encoded:
    """One sequence of tokens.

    Attributes:
        ids: the tokens.
        trained: for each token, whether it is trained.
        unused: what the template leaves out of the example: some of "messages", "reasoning", "tools" and
            "documents".
        is_chat: whether the chat template wrote the sequence.
        good: whether the sequence was judged to be a good answer.
    """

    ids: list[int]
    trained: list[bool]
    unused: tuple[str, ...] = ()
    is_chat: bool = False
    good: bool = False


class Encoder:
    """Turns examples into tokens.

    Args:
        learn_all: whether all tokens are trained, including prompts.
        max_length: the maximum number of tokens of a sequence, or None. The encoder stops at `max_length` + 1
            tokens or soon after, so that the caller can see that the example is too long.
        chat: whether completions go through the chat template too.
    Raises:
        ValueError: the model has no EOS token.
    """

    def __init__(
        self, tokenizer: Tokenizer, learn_all: bool, max_length: int | None, chat: bool = False
    ) -> None:
        if tokenizer.eos_id is None:
            raise ValueError(f"{tokenizer.source}: the model has no EOS token to end each example with")
        self._tokenizer, self._eos = tokenizer, tokenizer.eos_id
        self._all, self._chat = learn_all, chat
        self._most = None if max_length is None else max_length + 1

    def encode(self, example: Example, where: str) -> list[Encoded]:
        """Encode an example as one sequence. A preference has two sequences: chosen and rejected.

        Raises:
            DataError: nothing can be trained, both answers of a preference have the same tokens, or the chat
                template refuses the messages.
            UnsafeError, FormatError: the chat template is unsafe or invalid.
        """
        if self._chat:
            example = through_template(example)
        if isinstance(example, Preference):
            sequences = [self._answered(side, where) for side in (example.chosen, example.rejected)]
        elif isinstance(example, Judged):
            sequences = [self._answered(example.answer, where)]
        elif isinstance(example, Text):
            ids = [*self._tokenizer.encode_prompt(example.text, self._most), self._eos]
            sequences = [Encoded(ids, [True] * len(ids))]
        elif isinstance(example, MultipleChoice):
            sequences = [self._choice(example, where)]
        else:
            sequences = [self._answered(example, where)]
        for one in sequences:
            is_cut = self._most is not None and len(one.ids) >= self._most
            if not is_cut and not any(one.trained[1:]):
                raise DataError(f"{where}: {_NOTHING}")
            if isinstance(example, Preference) and not is_cut and sequences[0].ids == sequences[1].ids:
                raise DataError(f"{where}: chosen and rejected have the same tokens, expected two answers")
        return sequences

    def text_parts(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Encode one text whose consecutive parts are `texts`. Yield the tokens of each part, then EOS."""
        for index, text in enumerate(texts):
            encode = self._tokenizer.encode_continuation if index else self._tokenizer.encode_prompt
            yield encode(text)
        yield [self._eos]

    def _answered(self, example: Answered, where: str) -> Encoded:
        if isinstance(example, Instruction):
            has_template = self._tokenizer.chat_template is not None
            example = example.as_chat() if has_template else example.as_completion()
        if isinstance(example, Chat):
            return self._messages(example, where)
        return self._completion(example, where)

    def _choice(self, example: MultipleChoice, where: str) -> Encoded:
        """Encode the question and the right choice.

        `nplora eval` computes the log-probability of this choice.
        """
        found = encode_choices(self._tokenizer, example, where, self._chat)
        right = found.continuations[found.answer]
        is_trained = [self._all] * len(found.prompt) + [True] * len(right)
        is_chat = self._chat or not isinstance(example.prompt, str)
        return Encoded([*found.prompt, *right], is_trained, is_chat=is_chat)

    def _completion(self, example: Completion, where: str) -> Encoded:
        """Encode the prompt and the completion as one text.

        If the tokens of the whole text do not begin with the tokens of the prompt alone, the prompt and the
        completion are encoded separately.
        """
        prompt, completion = example.prompt, example.completion
        before, ids = (
            self._tokenizer.encode_prompt(prompt, self._most),
            self._tokenizer.encode_prompt(prompt + completion, self._most),
        )
        if not before:
            raise DataError(f"{where}: prompt is empty, but a model without a BOS token needs a prompt")
        if ids[: len(before)] != before:
            ids = before + self._tokenizer.encode_continuation(completion, self._most)
        ids.append(self._eos)
        return Encoded(ids, [self._all or place >= len(before) for place in range(len(ids))])

    def _messages(self, example: Chat, where: str) -> Encoded:
        messages = example.messages
        if not self._all and all(message["role"] != "assistant" for message in messages):
            raise DataError(f"{where}: the chat has no message of the assistant, expected one to train")
        if not self._all and not any(map(example.is_trained, range(len(messages)))):
            raise DataError(f"{where}: {_NOTHING}")
        try:
            chat = self._tokenizer.encode_conversation(
                messages, tools=example.tools, documents=example.documents, most=self._most
            )
        except ValueError as error:
            is_template = isinstance(error, FormatError) and not isinstance(error, UnsupportedError)
            if is_template:
                kind = UnsafeError if isinstance(error, LimitError) else type(error)
                raise kind(f"{where}: {error}") from error
            order = _unusual_order(messages) if isinstance(error, RefusedChatError) else ""
            raise DataError(f"{where}: {order}{error}") from error
        trained = [True] * len(chat.ids) if self._all else chat.is_reply
        for index, turn in chat.turns.items():
            is_left_out = (
                example.messages[index].get("weight") == 0 if self._all else not example.is_trained(index)
            )
            if is_left_out:
                trained[turn.start : turn.stop] = [False] * len(turn)
            elif turn.stop < len(chat.ids) or len(chat.ids) != self._most:  # the turn is not cut
                lost = [call for place, call in chat.lost_calls if place == index]
                _require_calls(messages[index], lost, where)
        return Encoded(chat.ids, trained, chat.unused, is_chat=True)


def _require_calls(message: Message, lost: list[int], where: str) -> None:
    """Check that the template writes all tool calls of a trained turn.

    If the template left out a call, the model would learn to end its turn without the call.

    Args:
        lost: the indices of the calls that the template leaves out.
    """
    if lost:
        name = message["tool_calls"][lost[0]]["function"]["name"]
        raise DataError(
            f"{where}: the chat template of this model leaves out the tool call {brief(name)}, so it cannot "
            "be trained; use a model whose template writes tool calls, or give the call as text in 'content'"
        )


def _unusual_order(messages: list[Message]) -> str:
    """Describe the first message whose role is not in the order that many templates expect; "" if none."""
    before: str | None = None
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if before in ("user", *TOOL_ROLES):
            expected = ["assistant"]
        elif before == "assistant":
            expected = ["user", *TOOL_ROLES]
        else:
            expected = ["user", *SYSTEM_ROLES] if before is None else ["user"]
        if role not in expected and not (role in TOOL_ROLES and before in TOOL_ROLES):
            found = "at the beginning" if before is None else f"after {before!r}"
            return f"message {number} of the chat has the role {role!r} {found}, expected {expected[0]!r}; "
        before = role
    return ""
