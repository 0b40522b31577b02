"""The content of a row of training data in any format: a text, a completion, a chat, or a comparison."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, Any]
Objects: TypeAlias = list[dict[str, Any]]

SYSTEM_ROLES = ("system", "developer")
TOOL_ROLES = ("tool", "function", "ipython")  # roles of a message with a tool's result

# The prompt that Stanford Alpaca was trained with, for models without a chat template.
_ALPACA = (
    "Below is an instruction that describes a task{also}. Write a response that appropriately completes \
the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
_ALSO = ", paired with an input that provides further context"


@dataclass(frozen=True)
class Text:
    """A text whose tokens are all trained."""

    text: str


@dataclass(frozen=True)
class Completion:
    """A prompt and its completion. Both are plain texts."""

    prompt: str
    completion: str

    def as_chat(self) -> Chat:
        """The completion as a chat: a user message with the prompt, then an assistant message."""
        turns = ("user", self.prompt), ("assistant", self.completion)
        return Chat([{"role": role, "content": content} for role, content in turns])


@dataclass(frozen=True)
class Chat:
    """Messages for the model's chat template.

    Attributes:
        messages: each has a role and a content, as in OpenAI's API; the arguments of tool calls are objects.
        tools, documents: passed to the template along with the messages; None if the row has none.
        prompt: the number of messages of the prompt, which come first and are never trained.
    """

    messages: list[Message]
    tools: Objects | None = None
    documents: Objects | None = None
    prompt: int = 0

    def is_trained(self, index: int) -> bool:
        """Whether a message is trained.

        A trained message is an assistant message after the prompt, and its weight is not 0.
        """
        message = self.messages[index]
        return message["role"] == "assistant" and index >= self.prompt and message.get("weight") != 0


@dataclass(frozen=True)
class Instruction:
    """An instruction, an optional input and an output, as in Alpaca."""

    instruction: str
    output: str
    input: str = ""
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()

    def as_chat(self) -> Chat:
        """The history and the instruction as a chat. The input follows the instruction on a new line."""
        asked = f"{self.instruction}\n{self.input}" if self.input else self.instruction
        turns = [("system", self.system)] if self.system else []
        for question, answer in (*self.history, (asked, self.output)):
            turns += [("user", question), ("assistant", answer)]
        return Chat([{"role": role, "content": content} for role, content in turns])

    def as_completion(self) -> Completion:
        """The instruction with the wording of Stanford Alpaca, for a model without a chat template."""
        before = "".join(f"{_alpaca(question, '')}{answer}\n\n" for question, answer in self.history)
        system = f"{self.system}\n\n" if self.system else ""
        return Completion(f"{system}{before}{_alpaca(self.instruction, self.input)}", self.output)


def _alpaca(instruction: str, context: str) -> str:
    shown = f"### Input:\n{context}\n\n" if context else ""
    return _ALPACA.format(also=_ALSO if context else "", instruction=instruction, input=shown)


Answered: TypeAlias = Completion | Chat | Instruction


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt: `chosen` is better than `rejected`."""

    chosen: Answered
    rejected: Answered


@dataclass(frozen=True)
class Judged:
    """An answer that was judged as good or bad."""

    answer: Answered
    good: bool


@dataclass(frozen=True)
class MultipleChoice:
    """A question with several answers, of which one is right.

    Attributes:
        prompt: the question, as a text or as messages.
        answer: the index of the right choice.
    """

    prompt: str | list[Message]
    choices: tuple[str, ...]
    answer: int

    @property
    def messages(self) -> list[Message]:
        """The question as messages."""
        if isinstance(self.prompt, str):
            return [{"role": "user", "content": self.prompt}]
        return self.prompt

    def as_answer(self) -> Answered:
        """The question and the right choice."""
        right = self.choices[self.answer]
        if isinstance(self.prompt, str):
            return Completion(self.prompt, right)
        return Chat([*self.prompt, {"role": "assistant", "content": right}], prompt=len(self.prompt))


Example: TypeAlias = Text | Answered | Preference | Judged | MultipleChoice


def through_template(example: Example) -> Example:
    """Turn completions and instructions into chats, and return all other examples unchanged."""
    if isinstance(example, Completion | Instruction):
        return example.as_chat()
    if isinstance(example, Preference):
        return Preference(_as_chat(example.chosen), _as_chat(example.rejected))
    if isinstance(example, Judged):
        return replace(example, answer=_as_chat(example.answer))
    return example


def _as_chat(answered: Answered) -> Chat:
    return answered if isinstance(answered, Chat) else answered.as_chat()
