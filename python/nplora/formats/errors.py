"""The errors that file readers raise. All of the errors derive from FormatError."""

import difflib
import itertools
from collections.abc import Iterable, Sequence


class FormatError(ValueError):
    """The bytes do not follow the format.

    The message names the file and the field or tensor, then says what was found and what is allowed.
    """


class TruncatedError(FormatError):
    """The file ends before the data that its header announces."""


class LimitError(FormatError):
    """A size or count exceeds a documented limit. Limits are checked before memory is allocated."""


class UnsupportedError(FormatError):
    """The file is well formed, but it uses a feature that nplora does not support."""


class NotFetchedError(FormatError):
    """The file is a Git LFS pointer. The real content has not been downloaded."""


class UnsafeError(FormatError):
    """Reading this file could run code, access files outside the directory, or hang."""


class CorruptError(FormatError):
    """A file does not match its recorded checksum, or its recorded size and time."""


class DataError(FormatError):
    """A line of training data is invalid."""


# difflib takes time quadratic in the length of a name and linear in the number of names.
_LONGEST_NAME = 256
_MOST_NAMES = 5_000


_MOST_PROBLEMS = 20  # problems listed in one message; the rest are only counted


def in_places(problems: Sequence[str]) -> str:
    """Format a list of problems as the end of a message: "in 2 places:", then one line per problem."""
    shown = [*problems[:_MOST_PROBLEMS], *(["…"] if len(problems) > _MOST_PROBLEMS else [])]
    return f"in {counted(len(problems), 'place')}:" + "".join(f"\n  {problem}" for problem in shown)


def counted(count: int, noun: str) -> str:
    """A count with its noun: 1 step, 2 steps, 1,000 steps."""
    return f"{count:,} {noun}{'s'[: count != 1]}"


def nearest_names(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The `count` names that resemble `name` most, best first. The running time is bounded."""
    short = [known for known in itertools.islice(names, _MOST_NAMES) if len(known) <= _LONGEST_NAME]
    return difflib.get_close_matches(name[:_LONGEST_NAME], short, n=count, cutoff=0.5)


def missing_name(source: str, name: object, names: Iterable[str], kind: str = "tensor") -> KeyError:
    """Make the KeyError for a name that a mapping lacks. The message suggests the most similar names."""
    near = ", ".join(map(repr, nearest_names(str(name), names)))
    return KeyError(f"{source}: no {kind} {brief(name)}{near and f', the nearest names: {near}'}")


def brief(value: object, length: int = 80) -> str:
    """`repr(value)`, cut to `length` characters, for use in a message."""
    text = repr(value[: length + 1] if isinstance(value, str | bytes | list) else value)
    return text if len(text) <= length else text[: length - 1] + "…"
