"""Reads lines from a pipe or a terminal. The lines from a terminal are kept in a history."""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_MULTILINE = '"""'
_MOST_LINES = 1000  # the most lines that the history keeps
_PROMPT, _MORE = "> ", "… "


class PipedLines:
    """Reads the lines of standard input. Each line is a message.

    The function `opened` uses this class if standard input or standard output is not a terminal.
    """

    is_terminal = False

    def read(self) -> str | None:
        """The next line that is not empty; None at the end of the input.

        Raises:
            ValueError: the line is not UTF-8.
        """
        while raw := sys.stdin.buffer.readline():
            try:
                text = raw.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"the message is not UTF-8, at byte {error.start}") from error
            if text.strip():
                return text
        return None

    def close(self) -> None:
        """Do nothing, because lines from a pipe are not stored in the history."""


class TerminalLines:
    """Reads the messages that a user types in a terminal.

    A message that begins with three quotation marks may have several lines, and ends with the next three
    quotation marks.

    Args:
        words: the words that the Tab key completes at the beginning of a line.
        history: the file with the lines of earlier chats. `close` adds the lines of this chat.
    """

    is_terminal = True

    def __init__(self, words: Sequence[str], history: Path) -> None:
        self._history, self._readline = history, _readline()
        if self._readline is not None:
            self._readline.set_completer(_completer(words))
            self._readline.set_completer_delims(" ")
            self._readline.parse_and_bind("tab: complete")
            with contextlib.suppress(OSError):
                self._readline.read_history_file(history)

    def read(self) -> str | None:
        """The next message; None after Ctrl-D. Ctrl-C raises KeyboardInterrupt."""
        try:
            text = input(_PROMPT)
            if not text.startswith(_MULTILINE):
                return text
            text = text.removeprefix(_MULTILINE)
            while _MULTILINE not in text:
                text += f"\n{input(_MORE)}"
        except EOFError:
            print()
            return None
        return text.partition(_MULTILINE)[0].strip("\n")

    def close(self) -> None:
        """Save the history. If the file of the history cannot be written, raise no error."""
        if self._readline is None:
            return
        with contextlib.suppress(OSError):
            self._history.parent.mkdir(parents=True, exist_ok=True)
            self._readline.set_history_length(_MOST_LINES)
            self._readline.write_history_file(self._history)
            self._history.chmod(0o600)


Lines = PipedLines | TerminalLines


def opened(words: Sequence[str]) -> Lines:
    """Return TerminalLines if standard input and output are a terminal, otherwise PipedLines."""
    is_terminal = sys.stdin.isatty() and sys.stdout is not None and sys.stdout.isatty()
    return TerminalLines(words, history_file()) if is_terminal else PipedLines()


def history_file() -> Path:
    """The file that stores the lines of earlier chats."""
    state = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    return Path(state, "nplora", "chat_history")


def _readline() -> Any:
    try:
        import readline
    except ImportError:  # some builds of Python have no `readline`; lines can then not be edited
        return None
    return readline


def _completer(words: Sequence[str]) -> Callable[[str, int], str | None]:
    def complete(begun: str, number: int) -> str | None:
        found = [word for word in words if word.startswith(begun) and begun]
        return found[number] if number < len(found) else None

    return complete
