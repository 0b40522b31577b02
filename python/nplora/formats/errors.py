"""The errors that a reader gives for a file that it refuses: one family, one `except`."""

import difflib
import itertools
from collections.abc import Iterable, Sequence


class FormatError(ValueError):
    """The bytes do not follow the format.

    The message names the file, the field or tensor, what was found and what is allowed.
    """


class TruncatedError(FormatError):
    """The file ends before what it announces."""


class LimitError(FormatError):
    """A size or a count is over a stated limit; nothing was allocated for it."""


class UnsupportedError(FormatError):
    """The file is well formed, but needs something that nplora does not have."""


class NotFetchedError(FormatError):
    """Git LFS's pointer lies in the place of the file."""


class UnsafeError(FormatError):
    """Reading on could run code, leave the directory or hang."""


class CorruptError(FormatError):
    """The content contradicts its own checksum or its own record."""


class DataError(FormatError):
    """A line of training data is not what it should be."""


_LONGEST_NAME = 256  # difflib is quadratic in the length of a name and linear in their number
_MOST_NAMES = 5_000


_MOST_PROBLEMS = 20  # told in a message; the others are counted


def in_places(problems: Sequence[str]) -> str:
    """The end of a message about all that does not fit: "in 2 places:" and a line for each."""
    told = [*problems[:_MOST_PROBLEMS], *(["…"] if len(problems) > _MOST_PROBLEMS else [])]
    return f"in {counted(len(problems), 'place')}:" + "".join(f"\n  {problem}" for problem in told)


def counted(count: int, noun: str) -> str:
    """1 step, 2 steps, 1,000 steps."""
    return f"{count:,} {noun}{'s'[: count != 1]}"


def nearest_names(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The `count` names most like `name`, best first; bounded in time whatever a file calls its tensors."""
    short = [known for known in itertools.islice(names, _MOST_NAMES) if len(known) <= _LONGEST_NAME]
    return difflib.get_close_matches(name[:_LONGEST_NAME], short, n=count, cutoff=0.5)


def missing_name(source: str, name: object, names: Iterable[str], kind: str = "tensor") -> KeyError:
    """The error for a name that a mapping does not hold: it tells the nearest names, if any are like it."""
    near = ", ".join(map(repr, nearest_names(str(name), names)))
    return KeyError(f"{source}: no {kind} {brief(name)}{near and f', the nearest names: {near}'}")


def brief(value: object, length: int = 80) -> str:
    """`repr(value)` cut to `length` characters, for use in a message."""
    text = repr(value[: length + 1] if isinstance(value, str | bytes | list) else value)
    return text if len(text) <= length else text[: length - 1] + "…"
