"""Renders chat templates, which are untrusted Jinja code from a model's files.

jinja2's sandbox prevents access to Python's internals. The sandbox does not stop a template that runs for
ever, fills the memory, or nests so deeply that Python crashes. So templates are rendered in a separate
process, whose time and memory the operating system limits.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nplora.formats.errors import FormatError, LimitError, UnsafeError
from nplora.platform.limits import Limits
from nplora.tokenizer.render_process import End, RenderProcess

MAX_TEMPLATE = 1 << 16  # characters; the longest in use have 20,000
# Seconds of CPU time. The longest templates in use, with many short messages, take a fraction of these times.
_COMPILING, _RENDERING, _RENDERING_A_BYTE = 2.0, 0.5, 1e-5
# Bytes. A template of MAX_TEMPLATE characters takes 33 MB while it is compiled, and 14 MB afterwards.
_MEMORY, _MEMORY_A_BYTE = 64 << 20, 64
_LENGTH, _LENGTH_A_BYTE = 4 << 20, 16  # bytes of the rendered text; longer text counts as too much memory
# The text of the error for each cause that can end the rendering process.
_ENDS = {
    "compiling": "takes more than {compiling} s of CPU time to compile",
    "rendering": "takes more than {rendering:.1f} s of CPU time",
    "memory": "takes too much memory",
    "nesting": "is nested too deeply",
    "other": "crashes the process that renders it",
}


class RefusedChatError(ValueError):
    """Raised if a template refuses the messages, or cannot be rendered with these messages."""


_ERRORS = {"unsafe": UnsafeError, "format": FormatError, "value": RefusedChatError}

_PROCESS = RenderProcess()


class ChatTemplate:
    """A chat template.

    Args:
        text: the template's Jinja code.
        source: the name of the template's file, for error messages.
    """

    def __init__(self, text: str, source: str) -> None:
        self.text, self.source = text, source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        now: datetime.datetime | None = None,
        **variables: Any,
    ) -> str:
        """Render a chat as text.

        Args:
            messages: dictionaries that consist of strings, numbers, lists and dictionaries.
            add_generation_prompt: end the text with the start of the assistant's next turn.
            now: the time that the template sees as the present time; None: the present time.
            variables: other variables that the template can use, such as bos_token.
        Raises:
            FormatError: the template is not valid Jinja.
            LimitError: the template is too long.
            UnsafeError: the template tries to access Python's internals, or takes too much time or memory.
            RefusedChatError: the template refuses the messages, or cannot be rendered with these messages.
            ValueError: the messages cannot be converted to JSON.
            ModuleNotFoundError: the package `jinja2` is not installed.
            OSError: the rendering process cannot be started.
            RuntimeError: the rendering process fails.
        """
        if len(self.text) > MAX_TEMPLATE:
            words = f"has {len(self.text):,} characters, expected at most {MAX_TEMPLATE:,}"
            raise LimitError(f"{self.source}: the chat template {words}")
        variables |= {"messages": list(messages), "add_generation_prompt": bool(add_generation_prompt)}
        try:
            variables = plain(variables)
            data = json.dumps(variables).encode()
        except (RecursionError, ValueError) as error:
            raise ValueError(
                f"{self.source}: the messages cannot be passed to a template: {error}"
            ) from error
        limits = Limits(
            compiling=_COMPILING,
            rendering=_RENDERING + _RENDERING_A_BYTE * len(data),
            memory=_MEMORY + _MEMORY_A_BYTE * len(data),
        )
        now = now or datetime.datetime.now()
        own = limits.set_by_process()._asdict()
        request = json.dumps({"template": self.text, "now": now.isoformat(), **own}).encode()
        length = _LENGTH + _LENGTH_A_BYTE * len(data)
        answer = _PROCESS.ask(request + b"\n" + data + b"\n", length, limits)
        if not isinstance(answer, End):
            kind, words = answer
        elif answer.cause is not None:
            kind, words = "unsafe", _ENDS[answer.cause].format(**limits._asdict())
        else:
            end = f"{answer.status}: {answer.words}" if answer.words else f"{answer.status}"
            raise RuntimeError(f"{self.source}: the process that renders templates ended with {end}")
        if kind == "text":
            return words
        contents = [message.get("content") for message in variables["messages"] if isinstance(message, dict)]
        if kind == "value" and any(isinstance(content, list) for content in contents):
            words += " (content is a list: the template may expect a string)"
        elif kind == "value" and None in contents:
            words += ' (content is null: the template may expect a string, such as "")'
        raise _ERRORS[kind](f"{self.source}: the chat template {words}")


def plain(value: Any, change: Callable[[str], str] = str) -> Any:
    """Copy a value as plain Python objects that JSON can represent. Apply `change` to each string in it.

    Raises:
        TypeError: the value holds an object that JSON cannot represent.
        ValueError: the value is nested too deeply.
    """
    try:
        return _plain(value, change)
    except RecursionError:
        raise ValueError("a message of a chat is nested too deeply") from None


def _plain(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(str(key)): _plain(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, change) for part in value]
    if not isinstance(value, bool | int | float | None):
        raise TypeError(
            f"a message of a chat holds a {type(value).__name__}, expected a value that JSON can represent"
        )
    return value
