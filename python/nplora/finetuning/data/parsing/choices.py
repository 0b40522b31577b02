"""Multiple-choice questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nplora.finetuning.data.examples import Example, MultipleChoice
from nplora.finetuning.data.parsing.fields import Fields
from nplora.finetuning.data.parsing.messages import messages_of
from nplora.formats.errors import brief

_LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")  # labels of the choices of a row that has no labels


def multiple_choice(row: Fields) -> Example:
    name = "question" if not row.has("prompt") and row.has("question") else "prompt"
    prompt = row.get(name)
    if isinstance(prompt, list) and prompt:
        prompt = messages_of(row, name, prompt)
        if prompt[-1]["role"] == "assistant":
            raise row.error(f"{name} ends with a message of the assistant, expected the user's question")
    else:
        prompt = row.text(name)
    choices, labels = _choices(row)
    return MultipleChoice(prompt, choices, _right_choice(row, choices, labels))


def _choices(row: Fields) -> tuple[tuple[str, ...], list[str] | None]:
    """Return a tuple of the choices, and a list of their labels (None if the row has no labels).

    The field "choices" holds a list of texts, or an object {"text": […], "label": […]}, as in ARC.
    """
    wanted = "expected a list of two or more different texts"
    value: Any = row.unpacked("choices")
    labels: Any = None
    if isinstance(value, dict):
        value, labels = value.get("text"), value.get("label")
    if not isinstance(value, list | tuple) or not all(isinstance(c, str) and c.strip() for c in value):
        raise row.error(f"choices is {brief(row.get('choices'))}, {wanted}")
    if len(value) < 2 or len(set(value)) < len(value):
        raise row.error(f"choices is {brief(value)}, {wanted}")
    if labels is None:
        return tuple(value), None
    if not isinstance(labels, list) or len(set(map(str, labels))) != len(value) or len(labels) != len(value):
        raise row.error(
            f"the labels of choices are {brief(labels)}, expected a different label for each choice"
        )
    return tuple(value), list(map(str, labels))


def _right_choice(row: Fields, choices: tuple[str, ...], labels: list[str] | None) -> int:
    """The index of the right choice. The field "answer" holds its label, its text or its index.

    If the row has no labels, its choices have the labels A, B, …. If one of these choices has the text "B",
    the answer "B" is this text, not the label of the second choice. If the row has labels, and one of them
    is a number, a number in "answer" is always a label, not an index.
    """
    answer = row.get("answer")
    if isinstance(answer, str | int) and not isinstance(answer, bool):
        names: list[Sequence[str]] = [labels, choices] if labels else [choices, _LETTERS[: len(choices)]]
        for known in names:
            if str(answer) in known and (isinstance(answer, str) or known is labels):
                return known.index(str(answer))
        index = str(answer)
        has_indices = labels is None or not any(label.isdigit() for label in labels)
        if (
            has_indices
            and index.isascii()
            and index.isdigit()
            and len(index) < 9
            and int(index) < len(choices)
        ):
            return int(index)
    wanted = f"0 to {len(choices) - 1}" if labels is None else f"one of the labels {brief(labels)}"
    raise row.error(f"answer is {brief(row.get('answer'))}, expected one of the choices, or {wanted}")
