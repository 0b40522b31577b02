"""Finds tool calls in a generated text. Models write tool calls in one of these notations:

- `<tool_call>{"name": ..., "arguments": ...}</tool_call>` (Hermes, Qwen), or a list of calls between the two
  marks (SmolLM);
- `[TOOL_CALLS][{"name": ..., "arguments": ...}]` (Mistral); if the mark [TOOL_CALLS] is a special token, the
  generated text begins after it;
- a text that consists only of `{"name": ..., "parameters": ...}` (Llama), or of a list of such objects.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection
from typing import Any

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_MARKS = (_OPEN, "[TOOL_CALLS]", "<|python_tag|>")
_BETWEEN = " \n\r\t;,"  # the characters that may separate calls


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def split_calls(text: str, names: Collection[str]) -> tuple[str, list[dict[str, Any]]]:
    """Split a text into its content and a list of its tool calls. The calls are objects of OpenAI's API.

    If the text has no complete call of a known function, the whole text is content. Text after the last
    complete call, such as an incomplete call, is content too.

    >>> content, calls = split_calls('<tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call>', {"add"})
    >>> content, calls[0]["function"]
    ('', {'name': 'add', 'arguments': '{"x": 1}'})
    """
    places = [place for mark in _MARKS if (place := text.find(mark)) >= 0]
    begin = min(places, default=0)
    if not places and not text.lstrip().startswith(("{", "[")):
        return text, []
    rest = after = text[begin:]
    calls = list[dict[str, Any]]()
    while rest := rest.strip(_BETWEEN):
        if mark := next((mark for mark in (*_MARKS, _CLOSE) if rest.startswith(mark)), ""):
            rest = rest.removeprefix(mark)
            after = rest if mark == _CLOSE else after
            continue
        try:
            value, end = _DECODER.raw_decode(rest)
            made = [_call(one, names) for one in (value if isinstance(value, list) else [value])]
        except (ValueError, RecursionError):
            break
        if not made or None in made:
            break
        calls += [call for call in made if call is not None]
        rest = after = rest[end:]
    if not calls:
        return text, []
    after = after.strip(_BETWEEN) if rest else ""
    return (text[:begin] + after if after else text[:begin].rstrip()), calls


def _call(value: Any, names: Collection[str]) -> dict[str, Any] | None:
    """Return a call as an object of OpenAI's API, or None if `value` is not a call of a known function.

    The arguments must be a JSON object. In the result, the arguments are JSON in ASCII, because they may
    contain half of a surrogate pair, which UTF-8 cannot represent.

    Raises:
        ValueError, RecursionError: the arguments are not JSON.
    """
    if not isinstance(value, dict):
        return None
    inner = value.get("function")
    value = inner if isinstance(inner, dict) else value
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters"))
    if not isinstance(name, str) or name not in names:
        return None
    if isinstance(arguments, str) and arguments:
        arguments = _DECODER.decode(arguments)
    if arguments in (None, ""):
        arguments = {}
    if not isinstance(arguments, dict):
        return None
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments, allow_nan=False)},
    }


class CallFilter:
    """Separates the content of a streamed text from its tool calls.

    Text that may belong to a tool call is held back. The held text is released if later text shows that it is
    content.

    Args:
        names: the functions that may be called. If `names` is empty, no text is held back.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names, self._held, self._begun = names, "", False

    def push(self, piece: str) -> str:
        """Add a piece of text, and return the new text that is certainly content."""
        if not self._names:
            return piece
        text = self._held + piece
        keep = self._first_doubt(text)
        self._held = text[keep:]
        self._begun = self._begun or bool(text[:keep].strip())
        return text[:keep]

    def flush(self) -> tuple[str, list[dict[str, Any]]]:
        """End the text. Return the rest of the content, and the tool calls."""
        held, self._held = self._held, ""
        return split_calls(held, self._names) if self._names and held else (held, [])

    def _first_doubt(self, text: str) -> int:
        """Return the first position at which a tool call may begin.

        A call begins with a mark such as "<tool_call>", or with JSON at the start of the text. A call may
        also begin where the text ends with the first characters of a mark.
        """
        if not self._begun and (not text.strip() or text.lstrip().startswith(("{", "["))):
            return 0
        places = [place for mark in _MARKS if (place := text.find(mark)) >= 0]
        longest = max(map(len, _MARKS)) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(mark.startswith(text[-size:]) for mark in _MARKS):
                places.append(len(text) - size)
                break
        return min(places, default=len(text))
