"""The text of an error for a reader who sees no traceback."""

import errno
import os

# The messages of these errors are clear without the names of their classes, and without a traceback.
EXPECTED = (OSError, ValueError, ArithmeticError, ImportError, MemoryError)
# Windows' numbers for a file or a folder that does not exist. Other systems give none.
_MISSING = (None, 2, 3)


def message_of(error: BaseException) -> str:
    """The message of an error. The message of a system error has the file's name, but not the error number.

    The message of an unexpected error begins with the name of the error's class.

    >>> from nplora.runtime.error_text import message_of
    >>> message_of(ValueError("rank is 0")), message_of(KeyError("rank"))
    ('rank is 0', "KeyError: 'rank'")
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None and error.errno is not None:
        return _of_system(error, error.strerror, error.errno)
    if isinstance(error, MemoryError | KeyboardInterrupt):
        return text or ("out of memory" if isinstance(error, MemoryError) else "interrupted")
    says_why = isinstance(error, SystemExit) and text != str(error.code)  # not only an exit status
    if text and (says_why or isinstance(error, EXPECTED)):
        return text
    return ": ".join(filter(None, [type(error).__name__, text]))


def _of_system(error: OSError, text: str, number: int) -> str:
    """The message of a system error.

    `text` is the system's text for the error number, or a more exact text. Windows has its own errors: there,
    its text belongs to `error.winerror`, which other errors do not have.
    """
    windows_number, file = getattr(error, "winerror", None), error.filename
    is_systems = bool(text) and (windows_number is not None or text == os.strerror(number))
    if is_systems:
        is_missing = number == errno.ENOENT and windows_number in _MISSING
        text = "no such file" if is_missing else text[0].lower() + text[1:]
    if file is None:
        return text
    path = os.fsdecode(file) if isinstance(file, (str, bytes, os.PathLike)) else str(file)
    return f"{text}: {path}" if is_systems else f"{path}: {text}"
