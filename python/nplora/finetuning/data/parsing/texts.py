"""Rows with a text, with a prompt and its completion, or with an instruction of Alpaca."""

from __future__ import annotations

from nplora.finetuning.data.examples import Answered, Completion, Example, Instruction, Message, Text
from nplora.finetuning.data.parsing.fields import Fields
from nplora.finetuning.data.parsing.messages import chat_of, messages_of
from nplora.formats.errors import brief


def text(row: Fields) -> Example:
    return Text(row.text("text"))


def completion(row: Fields) -> Example:
    return prompt_and_answer(row, "completion")


def prompt_and_answer(row: Fields, name: str) -> Answered:
    """Read the field "prompt", and the answer in the field `name`. Both hold texts, or both hold messages."""
    prompt, answer = row.values.get("prompt"), row.values.get(name)
    is_chat = isinstance(answer, list | dict)
    if isinstance(prompt, str) and is_chat:
        raise row.error(f"{name} is {brief(answer)}, expected a string, because prompt is a string")
    if isinstance(prompt, list) or is_chat:
        return chat_of(row, [*messages_of(row, "prompt", prompt), *_answered(row, name)], prompt)
    return Completion(row.text("prompt", may_be_empty=True), row.text(name))


def _answered(row: Fields, name: str) -> list[Message]:
    """Return the answer in the field `name` as a list of messages.

    The field holds a list of messages, one message, or the text of a message of the assistant.
    """
    value = row.get(name)
    if isinstance(value, str):
        value = {"role": "assistant", "content": row.text(name)}
    return messages_of(row, name, [value] if isinstance(value, dict) else value)


def instruction(row: Fields, name: str = "output") -> Instruction:
    """Read an instruction in Alpaca's format. Its answer is in the field `name`."""
    history = row.unpacked("history") if row.has("history") else []
    history = [] if history == "" else history
    is_pairs = isinstance(history, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in history
    )
    if not is_pairs:
        raise row.error(f"history is {brief(history)}, expected a list of pairs of texts")
    return Instruction(
        row.text("instruction"),
        row.text(name),
        row.text("input", True, ""),
        row.text("system", True, ""),
        tuple((question, answer) for question, answer in history),
    )
