"""BadRows: counts the rows that are skipped because reading them failed."""

from __future__ import annotations

from nplora.formats.errors import FormatError, counted

_QUOTED = 3  # errors that a report quotes


class BadRows:
    """Counts bad rows, and keeps the first few errors.

    Attributes:
        count: the number of bad rows.
        problems: the first few errors.
    """

    def __init__(self) -> None:
        self.count, self.problems = 0, list[str]()

    def skip(self, error: FormatError, may_skip: bool = True) -> None:
        """Count one bad row, and keep its error. If `may_skip` is False, raise the error instead."""
        if not may_skip:
            raise error
        self.count += 1
        if len(self.problems) < _QUOTED:
            self.problems.append(str(error))

    def add(self, other: BadRows) -> None:
        """Add the number of bad rows of another source, and their errors."""
        self.count += other.count
        self.problems += other.problems[: _QUOTED - len(self.problems)]

    def reason(self) -> str:
        """The number of bad rows and their errors in words; empty if there are none."""
        return f"{counted(self.count, 'bad row')} skipped ({'; '.join(self.problems)})" if self.count else ""
