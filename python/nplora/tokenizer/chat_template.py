"""Chat templates: Jinja out of a model's file, which nobody vouches for, rendered within bounds.

jinja2's sandbox keeps a template away from Python's internals, and what it may call is listed. Neither keeps
it from running for ever or from filling the memory, so each rendering has an allowance, of bytes that it may
handle, and everything that it does is paid from it before it is done. So the end of a rendering depends on
the template and the messages alone, not on the machine's clock.
"""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nplora.formats.errors import FormatError, UnsafeError
from nplora.tokenizer.allowance import ALLOWANCE, ALLOWANCE_PER_BYTE, ExcessError, Meter, Traced
from nplora.tokenizer.sandbox import RefusalError, compile_template, strftime_now

_MAX_INPUT = 1 << 32


class ChatTemplate:
    """A compiled template.

    Args:
        text: the template.
        source: whose it is, for messages.
    Raises:
        FormatError: it is not Jinja. LimitError: it is too long.
        ModuleNotFoundError: the package `jinja2` is not installed.
    """

    def __init__(self, text: str, source: str) -> None:
        self.text, self.source = text, source
        self._lock = threading.Lock()
        self._program: tuple[Meter, Any] | None = None  # compiled when it is first needed: that takes jinja2

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        now: datetime.datetime | None = None,
        **variables: Any,
    ) -> str:
        """The text of a chat.

        Args:
            messages: of strings, numbers, lists and dictionaries. They are not changed.
            now: the time that the template is told; None: the clock's.
            variables: whatever else the template may ask for, such as bos_token.
        Raises:
            ValueError: the template refuses the messages, or does not find in them what it needs.
            UnsafeError: it reaches for Python's internals. ExhaustedError: it takes more than its allowance.
            FormatError, LimitError, ModuleNotFoundError: as for the template.
        """
        told_messages = plain(list(messages))
        variables |= {"messages": told_messages, "add_generation_prompt": bool(add_generation_prompt)}
        told = {"strftime_now": strftime_now(now)}
        with self._lock, _Failures(self.source, told_messages):
            if self._program is None:
                self._program = compile_template(self.text, self.source)
            meter, template = self._program
            meter.allow(_MAX_INPUT)
            meter.allow(ALLOWANCE + ALLOWANCE_PER_BYTE * meter.weigh(variables))
            context = template.new_context(variables | told)
            with Traced(meter):
                return str(template.environment.concat(template.root_render_func(context)))


class _Failures:
    """Tells what goes wrong in a template in the terms of this package."""

    def __init__(self, source: str, messages: Sequence[Any]) -> None:
        self.source, self.messages = source, messages

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, FormatError | ImportError) or not isinstance(error, Exception):
            return
        from jinja2 import exceptions

        what = f"{self.source}: the chat template"
        if isinstance(error, exceptions.SecurityError):
            raise UnsafeError(f"{what} is not safe: {error}") from error
        if isinstance(error, ExcessError | OverflowError):
            raise UnsafeError(f"{what} asks for too much: {error}") from error
        if isinstance(error, RecursionError | MemoryError):
            raise UnsafeError(f"{what} nests too deep") from error
        if isinstance(error, exceptions.TemplateSyntaxError | SyntaxError):
            raise FormatError(f"{what} is not Jinja, in line {error.lineno}: {error}") from error
        if isinstance(error, RefusalError):
            raise ValueError(f"{what} refuses the messages: {error}") from error
        told = f"{what} fails with these messages: {type(error).__name__}: {error}"
        if any(isinstance(m, dict) and isinstance(m.get("content"), list) for m in self.messages):
            told += " (content is a list: the template may expect a string)"
        raise ValueError(told) from error


def plain(value: Any, change: Callable[[str], str] = str) -> Any:
    """The value, which JSON could hold, as plain Python objects, every text in it changed.

    Raises:
        TypeError: it is another kind of object.
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {str(key): plain(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part, change) for part in value]
    if not isinstance(value, bool | int | float | None):
        raise TypeError(f"a message of a chat holds a {type(value).__name__}, expected what JSON can hold")
    return value
