"""The errors and warnings that the command line prints on stderr, one line each."""

import errno
import os

from nplora.runtime.stderr import stderr

_LONG_LIST = 300  # characters; if a list in a message is longer, only its first item is shown


class UsageError(ValueError):
    """An argument is unknown, or its value is wrong."""


def show_error(error: Exception, hint: str = "") -> None:
    """Print an error and its notes."""
    words = "; ".join(map(one_line, (message_of(error), *getattr(error, "__notes__", ()))))
    print(f"nplora: error: {words}{hint}", file=stderr)


def show_warning(message: Warning | str, *where: object, **more: object) -> None:
    """Print a warning. `where` and `more` take the other arguments that Python passes to `showwarning`."""
    print(f"nplora: warning: {one_line(str(message))}", file=stderr)


def message_of(error: Exception) -> str:
    """The message of an error, with the name of its file, but without the number of a system error."""
    if not isinstance(error, OSError) or error.strerror is None or error.errno is None:
        return str(error) or "out of memory"
    text, file = error.strerror, error.filename
    is_systems = text == os.strerror(error.errno)
    if is_systems:
        text = "no such file" if error.errno == errno.ENOENT else text[0].lower() + text[1:]
    if file is None:
        return text
    path = os.fsdecode(file) if isinstance(file, (str, bytes, os.PathLike)) else str(file)
    return f"{text}: {path}" if is_systems else f"{path}: {text}"


def one_line(text: str) -> str:
    """Put a message on one line. If a list follows a colon, separate its items with semicolons."""
    head, colon, items = text.partition(":\n  ")
    if len(items) > _LONG_LIST and "\n  " in items:
        items = f"{items.partition(chr(10))[0]}\n  …"
    return " ".join((head + colon + items.replace("\n  ", "; ")).split())
