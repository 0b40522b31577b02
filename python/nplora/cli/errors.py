"""Prints the errors and warnings of the command line on stderr, each on one line."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nplora.formats.errors import nearest_names
from nplora.runtime.error_text import message_of
from nplora.runtime.stderr import stderr

# _ALONE and _END enclose a name that is not a part of a path, a quoted text or a longer name.
_ALONE, _END = r"(?<![\w/.'\"=-])", r"(?![\w/='\"-]|\.\w)"
_VALUE = r"True|False|-?\d[\w.+-]*(?<!\.)|'[\w:.,-]+'"
_OPERATION = re.compile(r"([a-z_]\w*): ")  # as in "finetune: rank is 0"
_ROW = re.compile(r", (line|row|window) \d+$")
_REPEATED = re.compile(r"(--[\w-]+) \(\1\)")

_LONG_LIST = 300  # characters; if a list in a message is longer, only the first item of the list is shown


class UsageError(ValueError):
    """An argument is unknown, or its value is wrong."""


def show_error(
    error: Exception, hint: str = "", spelled: Callable[[str], str] = str, typed: Sequence[str] = ()
) -> None:
    """Print an error and its notes (see `BaseException.add_note`) on one line.

    Args:
        hint: advice that is printed at the end of the same line.
        spelled: see `Spelling`.
        typed: the arguments of the command line.
    """
    words = "; ".join(map(one_line, (message_of(error), *getattr(error, "__notes__", ()))))
    print(f"nplora: error: {spelled(words)}{_similar_file(error, typed)}{hint}", file=stderr)


def _similar_file(error: Exception, typed: Sequence[str]) -> str:
    """If a file that the user has named is missing, suggest another file of the same directory.

    The result is empty unless exactly one file of the directory has a similar name.
    """
    if not isinstance(error, FileNotFoundError) or not isinstance(error.filename, str | os.PathLike):
        return ""
    if os.fspath(error.filename) not in typed:
        return ""
    path = Path(error.filename)
    try:
        near = nearest_names(path.name, os.listdir(path.parent), count=2, cutoff=0.8)
    except (OSError, ValueError):
        return ""
    if len(near) != 1 or near[0] == path.name:
        return ""
    return f"; did you mean {one_line(str(path.with_name(near[0])))}?"


def show_warning(
    message: Warning | str, *where: object, spelled: Callable[[str], str] = str, **more: object
) -> None:
    """Print a warning. Python calls this function as `warnings.showwarning`, with the message and further
    arguments, such as the file and the line. These further arguments, `where` and `more`, are ignored.
    """
    print(f"nplora: warning: {spelled(one_line(str(message)))}", file=stderr)


class Spelling:
    """Replaces the names of keyword arguments in a message by the options of a command.

    `resume=True` becomes --resume, `rank=8` becomes "--rank 8", "epochs and steps are both given" becomes
    "--epochs and --steps are both given", and a name with an underscore, such as `valid_split`, becomes
    --valid-split. If a message names an option and then its keyword in parentheses, as
    in "--resume ... (resume=True)", the parentheses are removed.

    A message about a file begins with the file's name, and may name fields of the file. The fields of a file
    may have the same names as options. So in a message about a file, a keyword is replaced only before a
    value, as in `rank=8`, before the word "was", and after the word "no". In a message about a row of a file,
    nothing is replaced. A word that the user has typed as an argument is not replaced either, because the
    word may be the name of a file.

    Args:
        options: a dict from keywords to options of the command.
        typed: the arguments of the command line.
    """

    def __init__(self, options: Mapping[str, str], typed: Sequence[str]) -> None:
        self._options, self._typed = options, frozenset(typed[1:])
        names = "|".join(sorted(map(re.escape, options), key=len, reverse=True)) or "(?!)"
        self._given = re.compile(rf"{_ALONE}({names})=({_VALUE})(?![\w/+-]|\.\w)")
        self._named = re.compile(rf"{_ALONE}({names}){_END}")
        self._changed = re.compile(rf"{_ALONE}({names})(?= was )|(?<=\bno )({names}){_END}")
        self._both = re.compile(rf"{_ALONE}({names}) and ({names})(?= are both given)")
        self._doubled = re.compile(rf" \(({names})=[^()]*\)")

    def __call__(self, text: str) -> str:
        text = self._doubled.sub(self._without, text)
        subject, colon, _ = text.partition(": ")
        if colon and _ROW.search(subject):
            return text
        text = self._both.sub(
            lambda found: " and ".join(self._options[name] for name in found.groups()), text
        )
        text = self._given.sub(self._with_value, text)
        operation = _OPERATION.match(text)
        if not colon or (operation is not None and operation[1] not in self._typed):
            text = self._named.sub(self._alone, text)
        text = self._changed.sub(self._alone, text)
        return _REPEATED.sub(r"\1", text)

    def _without(self, found: re.Match[str]) -> str:
        is_before = self._options[found[1]] in found.string[: found.start()]
        return "" if is_before else found[0]

    def _with_value(self, found: re.Match[str]) -> str:
        if found[0] in self._typed or found[2] == "False":
            return found[0]
        option = self._options[found[1]]
        return option if found[2] == "True" else f"{option} {found[2].strip(chr(39))}"

    def _alone(self, found: re.Match[str]) -> str:
        is_option = "_" in found[0] and found[0] not in self._typed
        return self._options[found[0]] if is_option else found[0]


def one_line(text: str) -> str:
    """Put a message on one line. If the message ends in a list, separate the items with semicolons."""
    head, colon, items = text.partition(":\n  ")
    if len(items) > _LONG_LIST and "\n  " in items:
        items = f"{items.partition(chr(10))[0]}\n  …"
    return " ".join((head + colon + items.replace("\n  ", "; ")).split())
