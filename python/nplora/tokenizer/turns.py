"""Finds the assistant's turns in a chat that a template wrote.

Many templates write a message differently when other messages follow: Qwen 3 drops the reasoning of earlier
turns. So the text of a chat up to a turn is not always the beginning of the text of the whole chat. Therefore
this module renders the chat a second time, with marks that replace the texts of the messages. The place of a
mark among the special tokens shows which special tokens stand before and after the message. Only the
template can write special tokens, so both renderings contain the same special tokens in the same order.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from nplora.formats.errors import UnsupportedError

Pieces = list[tuple[str, bool]]  # the pieces of a text: special tokens (True) and the text between them

Part = tuple[int, int | None]  # the index of a message, and the number of one of its tool calls (or None)

_REASONING = ("reasoning_content", "reasoning", "thinking")  # keys under which a message has its reasoning
_MARKS = range(0xE200, 0xE300)  # private-use characters, which no template changes


class Turn(NamedTuple):
    """The start and the end of an assistant's turn.

    `first` and `last` are indices in the list of all special tokens of the chat.

    Attributes:
        first: the index of the special token with which `head` begins.
        head: the text that the template writes before an answer, such as "<|im_start|>assistant\\n". The
            model does not generate the head.
        last: the index of the special token that ends the turn; None: the turn ends with the text.
    """

    first: int
    head: str
    last: int | None


def mark_of(texts: Sequence[str]) -> str:
    """Return a character that occurs in none of the texts, for use as a mark."""
    try:
        return next(chr(code) for code in _MARKS if not any(chr(code) in text for text in texts))
    except StopIteration:
        raise UnsupportedError("the chat has all characters that could mark its turns") from None


def with_marks(messages: Sequence[Mapping[str, Any]], mark: str) -> list[Mapping[str, Any]]:
    """Copy the messages, but replace each text by two mark characters with the message's index between them.

    System messages keep their texts.
    """
    return [_with_mark(message, f"{mark}{index}{mark}") for index, message in enumerate(messages)]


def _with_mark(message: Mapping[str, Any], mark: str) -> Mapping[str, Any]:
    if message.get("role") in ("system", "developer"):  # templates look for settings in these messages
        return message
    fields = ("content", *_REASONING) if message.get("role") == "assistant" else ("content",)
    made = dict(message)
    for name in fields:
        if isinstance(made.get(name), str) and made[name]:
            made[name] = mark
    calls = made.get("tool_calls")
    if isinstance(calls, list) and message.get("role") == "assistant":
        made["tool_calls"] = [_named(call, mark) for call in calls]
    return made


def without_reasoning(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copy the messages without their reasoning."""
    return [{k: v for k, v in message.items() if k not in _REASONING or not v} for message in messages]


def _named(call: Any, mark: str) -> Any:
    """Copy a tool call, and replace the name of its function with a mark."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": {**call["function"], "name": mark}}
    return {**call, "name": mark} if "name" in call else call


def with_written_marks(
    messages: Sequence[Mapping[str, Any]], mark: str, by_id: bool
) -> tuple[list[Mapping[str, Any]], dict[Part, str]]:
    """Copy the messages, and append a different mark to each text that a template should write.

    These texts are of two kinds: the contents of all messages except the assistant's, and the names of the
    functions in tool calls. The mark is appended and does not replace the text, because some templates
    search the text for switches, such as `/no_think`.

    Args:
        by_id: append the mark of a tool call to the call's id, not to the name of its function, because some
            templates write only the ids.
    Returns:
        the messages, and a dict from each marked `Part` to its mark.
    """
    made, marks = list[Mapping[str, Any]](), dict[Part, str]()

    def marked(part: Part, text: str) -> str:
        marks[part] = f"{mark}{len(marks)}{mark}"
        return text + marks[part]

    for index, message in enumerate(messages):
        copy, content, calls = dict(message), message.get("content"), message.get("tool_calls")
        is_answer = message.get("role") == "assistant"
        if not is_answer and isinstance(content, str) and content.strip():
            copy["content"] = marked((index, None), content.rstrip())
        if is_answer and isinstance(calls, list):
            copy["tool_calls"] = list(calls)
            for number, call in enumerate(calls):
                if not isinstance(call, Mapping):
                    continue
                function = call.get("function")
                if by_id and isinstance(call.get("id"), str):
                    found = {**call, "id": marked((index, number), call["id"])}
                elif not by_id and isinstance(function, Mapping) and isinstance(function.get("name"), str):
                    name = marked((index, number), function["name"])
                    found = {**call, "function": {**function, "name": name}}
                else:
                    continue
                copy["tool_calls"][number] = found
        made.append(copy)
    return made, marks


def find_turns(
    messages: Sequence[Mapping[str, Any]],
    text: Pieces,
    marked: Pieces,
    mark: str,
    prompt: Pieces,
    is_end: Callable[[str], bool],
) -> dict[int, Turn]:
    """Find the turns of all assistant messages; return a dict from the index of a message to its `Turn`.

    Args:
        messages: the chat.
        text: the text that the template writes for the chat.
        marked: the text that the template writes for the messages that `with_marks` returns.
        mark: a character that does not occur in the chat.
        prompt: the text that the template adds to a chat when the assistant's answer should begin.
        is_end: a function that returns whether a special token ends a turn.
    Raises:
        UnsupportedError: the special tokens do not show for certain where the turns are.
    """
    specials = [place for place, (_, is_special) in enumerate(text) if is_special]
    names = [text[place][0] for place in specials]
    if names != [piece for piece, is_special in marked if is_special]:
        raise UnsupportedError("the special tokens depend on the text of the messages")
    places = _marked_places(marked, mark)
    heads = _heads(text, specials, prompt, sum(m.get("role") == "assistant" for m in messages))
    begins = sorted(heads)
    seen = sorted((place, index) for index, found in places.items() for place in found)
    turns, before = dict[int, Turn](), -1
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        if index not in places:
            raise UnsupportedError(f"message {index + 1} is not in the text")
        place = places[index][0]  # the number of special tokens before the message
        number = bisect.bisect_left(begins, place) - 1
        if number < 0 or begins[number] <= before:
            raise UnsupportedError(f"message {index + 1} does not begin as the template begins an answer")
        first = before = begins[number]
        following = begins[number + 1] if number + 1 < len(begins) else len(names)
        last = next((n for n in range(place, following) if is_end(names[n])), None)
        end = following if last is None else last
        inside = seen[
            bisect.bisect_right(seen, (first, len(messages))) : bisect.bisect_left(seen, (end + 1, 0))
        ]
        if any(other != index for _, other in inside):
            raise UnsupportedError(f"message {index + 1} does not end before the next message begins")
        if last is None and index < len(messages) - 1:
            raise UnsupportedError(f"message {index + 1} has no token that ends it")
        turns[index] = Turn(first, heads[first], last)
    return turns


def _marked_places(marked: Pieces, mark: str) -> dict[int, list[int]]:
    """Count the special tokens before each mark.

    Returns:
        a dict from the index of each marked message to a list with one count for each mark of the message.
    """
    places, count = dict[int, list[int]](), 0
    for piece, is_special in marked:
        if is_special:
            count += 1
            continue
        for number in piece.split(mark)[1::2]:
            if number.isdecimal():
                places.setdefault(int(number), []).append(count)
    return places


def _heads(text: Pieces, specials: list[int], prompt: Pieces, wanted: int) -> dict[int, str]:
    """Find the head of each turn. Return a dict: index of the head's first special token -> head.

    A prompt may end with text that only the last turn has, such as "<think>". The heads of the other turns
    do not contain this text. A head must be so long that no message of another role begins with the
    head.
    """
    begin = next((place for place, (_, is_special) in enumerate(prompt) if is_special), None)
    if begin is None:
        raise UnsupportedError("the template begins an answer without a special token")
    parts = list(_parts(prompt[begin:]))
    for shortest in range(len(parts)):
        allowed = parts[: shortest + 1]
        found = dict[int, str]()
        for number, place in enumerate(specials):
            if head := next((head for head in allowed if _begins(text, place, head)), None):
                found[number] = "".join(piece for piece, _ in head)
        if len(found) == wanted or (len(found) > wanted and shortest == 0):
            return found
    raise UnsupportedError("the template begins the assistant's messages in several ways")


def _parts(prompt: Pieces) -> list[Pieces]:
    """Return all beginnings of the prompt that end after a line or a special token, the longest first."""
    parts = list[Pieces]()
    for length in range(len(prompt), 0, -1):
        *before, (piece, is_special) = prompt[:length]
        if is_special:
            parts.append([*before, (piece, True)])
            continue
        lines = list(itertools.accumulate(piece.splitlines(keepends=True)))
        parts += [[*before, (line, False)] for line in reversed(lines)]
    return parts


def _begins(text: Pieces, place: int, head: Pieces) -> bool:
    """Whether the pieces of `text`, from the index `place` on, begin with the pieces of `head`."""
    *whole, (last, is_special) = head
    end = place + len(whole)
    if end >= len(text) or text[place:end] != whole or text[end][1] != is_special:
        return False
    return text[end][0] == last if is_special else text[end][0].startswith(last)
