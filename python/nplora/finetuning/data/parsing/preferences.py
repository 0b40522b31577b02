"""Comparisons: a chosen and a rejected answer, or a judged answer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from nplora.finetuning.data.examples import Answered, Chat, Completion, Example, Judged, Preference
from nplora.finetuning.data.parsing.fields import CONTEXT, Fields, renaming
from nplora.finetuning.data.parsing.messages import chat_of, messages_of, openai_messages
from nplora.finetuning.data.parsing.sharegpt import conversation, turn_of
from nplora.finetuning.data.parsing.texts import instruction, prompt_and_answer
from nplora.formats.errors import brief

PROMPTS = ("question", "query", "input", "user", "context")  # other names of the prompt
_FEW_WORDS = 5  # two answers may begin with the same few words by chance
# The labels that judge answers. TRL also accepts 1 and 0, and tables in text files have no booleans.
_LABELS: dict[object, bool] = {1: True, 0: False}
_LABELS |= {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def preference(row: Fields) -> Example:
    if row.has("preferred_output") or row.has("non_preferred_output"):
        return _openai(row)
    if row.has("conversations"):
        prompt = conversation(row)
        sides = [[*prompt, turn_of(row.part(name), row.get(name))] for name in ("chosen", "rejected")]
        pair = Preference(*(chat_of(row, messages, prompt) for messages in sides))
    elif row.has("instruction") and not row.has("prompt"):
        pair = Preference(instruction(row, "chosen"), instruction(row, "rejected"))
    elif row.has("prompt") and not _has_whole_chats(row):
        pair = Preference(prompt_and_answer(row, "chosen"), prompt_and_answer(row, "rejected"))
    else:
        pair = _without_prompt(row)
    return _checked(row, pair, "chosen", "rejected")


def _checked(row: Fields, pair: Preference, chosen: str, rejected: str) -> Preference:
    """Check that both answers of a pair end with a message of the assistant, and that they differ.

    Args:
        chosen, rejected: the names of the fields that hold the answers, for messages.
    """
    for name, answer in ((chosen, pair.chosen), (rejected, pair.rejected)):
        if isinstance(answer, Chat) and (role := answer.messages[-1]["role"]) != "assistant":
            raise row.error(
                f"{name} ends with a message of role {role!r}, expected a message of the assistant"
            )
    if pair.chosen == pair.rejected:
        raise row.error(f"{chosen} and {rejected} are the same answer, expected two different ones")
    return pair


def _openai(row: Fields) -> Example:
    """A row in the form of OpenAI's API. The field "input" is an object with messages. The object or the row
    may have tools and documents. The two answers are lists of messages."""
    given = row.get("input")
    if not isinstance(given, dict) or not given.get("messages"):
        raise row.error(f"input is {brief(given)}, expected an object with messages")
    names = "preferred_output", "non_preferred_output"
    answers = [messages_of(row, name, row.get(name)) for name in names]
    for name, answer in zip(names, answers, strict=True):
        if not answer:
            raise row.error(f"{name} is empty, expected messages")
    context = {name: given.get(name) or row.values.get(name) for name in CONTEXT}
    prompt = Fields(given | context, row.where)
    asked = messages_of(prompt, "messages", given["messages"])
    return _checked(
        row, Preference(*(chat_of(prompt, [*asked, *answer], asked) for answer in answers)), *names
    )


def _has_whole_chats(row: Fields) -> bool:
    """Whether the prompt is a text, and both answers are lists of several messages.

    Such lists are taken for whole chats, which contain the prompt too.
    """
    prompt, answers = row.values["prompt"], [row.values.get(name) for name in ("chosen", "rejected")]
    return isinstance(prompt, str) and all(isinstance(a, list) and len(a) > 1 for a in answers)


def _without_prompt(row: Fields) -> Preference:
    """Make a pair of two texts or two chats. The prompt is their common beginning."""
    if isinstance(row.values.get("chosen"), str) or isinstance(row.values.get("rejected"), str):
        texts = row.text("chosen"), row.text("rejected")
        shared = _shared(row, *texts)
        return Preference(*(Completion(text[:shared], text[shared:]) for text in texts))
    chats = [messages_of(row, name, row.get(name)) for name in ("chosen", "rejected")]
    shared = _shared(row, *chats)
    prompt = row.values.get("prompt")
    asked = [message["content"].strip() for message in chats[0][:shared] if message["role"] == "user"]
    if isinstance(prompt, str) and prompt.strip() not in asked:
        wanted = "expected a message of the user at the beginning of chosen and rejected"
        raise row.error(f"prompt is {brief(prompt)}, {wanted}")
    return Preference(*(chat_of(row, messages, messages[:shared]) for messages in chats))


def _shared(row: Fields, one: Sequence[object], other: Sequence[object]) -> int:
    """The length of the common beginning of two texts (in characters) or of two chats (in messages).

    As in TRL's `extract_prompt`, a space at the end of the common beginning belongs to the answers. The
    common beginning never has the last character of a text or the last message of a chat, so no answer is
    empty.
    """
    same = (a == b for a, b in zip(one[:-1], other[:-1], strict=False))
    count = sum(1 for _ in itertools.takewhile(bool, same))
    if count and one[count - 1] == " " and one[count] != other[count]:
        count -= 1
    if not count and one != other:
        name = prompt_among(row.unread())
        hint = f"; {renaming('prompt', name)}" if name and not row.has("prompt") else ""
        raise row.error(f"chosen and rejected begin differently, expected the same prompt in both{hint}")
    return count


def prompt_among(unread: Mapping[str, Any]) -> str | None:
    """Return the name of the unused field that probably holds the prompt, or None.

    The value of this field must be a text. Either the name of the field is in `PROMPTS`, or the value has
    several words and at least one letter. A value of one word is probably an identifier or the name of a
    source. A value without letters is probably a date or a number.
    """
    texts = {k: v for k, v in unread.items() if isinstance(v, str) and (k in PROMPTS or _is_prose(v))}
    known = next((name for name in PROMPTS if name in texts), None)
    return known or max(texts, key=lambda name: len(texts[name]), default=None)


def _is_prose(text: str) -> bool:
    return " " in text.strip() and any(map(str.isalpha, text))


def forgotten_prompt(pair: Preference, unread: Mapping[str, Any]) -> str | None:
    """If both texts of a pair lack a prompt, return the name of the field that probably holds it, or None.

    If both texts begin with the same lines, or with many equal words, they do not lack a prompt: their common
    beginning is the prompt.

    Args:
        unread: a dict of the unused fields of the row.
    """
    if not isinstance(pair.chosen, Completion):
        return None
    shared = pair.chosen.prompt
    if "\n" in shared or len(shared.split()) > _FEW_WORDS:
        return None
    others = {k: v for k, v in unread.items() if not isinstance(v, str) or v.strip() not in shared}
    return prompt_among(others)


def judged(row: Fields) -> Example:
    label = row.get("label")
    key = label.strip().lower() if isinstance(label, str) else label
    if not isinstance(key, str | bool | int | float) or key not in _LABELS:
        raise row.error(f"label is {brief(label)}, expected true or false, or 1 or 0")
    return Judged(_judged_answer(row), _LABELS[key])


def _judged_answer(row: Fields) -> Answered:
    """The prompt and the answer that has the label. In a chat, the answer is the last message."""
    if row.has("completion"):
        return prompt_and_answer(row, "completion")
    if row.has("instruction"):
        return instruction(row)
    if not row.has("messages") and not row.has("conversations"):
        return prompt_and_answer(row, "completion")
    messages = openai_messages(row) if row.has("messages") else conversation(row)
    if (role := messages[-1]["role"]) != "assistant":
        raise row.error(f"the chat ends with a message of role {role!r}, expected a message of the assistant")
    return chat_of(row, messages, messages[:-1])
