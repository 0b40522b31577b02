"""Checks that at least one row has a field that `columns` renames, and counts the rows that have none."""

from __future__ import annotations

import collections
from collections.abc import Mapping

from nplora.finetuning.data.rows import Row
from nplora.finetuning.data.sources import Source
from nplora.formats.errors import DataError, brief, counted
from nplora.runtime.user_warning import warn_user


class ColumnNames:
    """Counts, over several sources, the rows that are read without renaming.

    Args:
        columns: a dict from the names that the formats use to the names in the data.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self._columns = columns
        self._is_found = False
        self._first: list[str] = []  # the fields of the first row that was not renamed
        self._others = collections.Counter[str]()  # for each source, the rows that were not renamed

    def look_in(self, row: Row) -> None:
        """Record whether a row has any of the names. Bad rows count too."""
        self._is_found = self._is_found or not {*self._columns.values()}.isdisjoint(row.values)

    def count(self, row: Row, source: Source, is_renamed: bool) -> None:
        """Count a row that was read, unless its fields were renamed."""
        if not is_renamed:
            self._first = self._first or list(row.values)
            self._others[source.name] += 1

    def require(self) -> None:
        """Raise a DataError if no row has any of the names. Call this method after all rows were read."""
        if self._columns and self._others and not self._is_found:
            raise DataError(
                f"{', '.join(self._others)}: no row has a field that --columns (columns=...) renames "
                f"({self._names}); a row has {brief(self._first)}; correct the names, or leave the option "
                "out to read the rows as they are"
            )

    def warn(self) -> None:
        """Warn about rows whose fields were not renamed. Call this method after all rows were read."""
        for source, rows in self._others.items() if self._columns else ():
            warn_user(
                f"{source}: {counted(rows, 'row')} without any field that --columns (columns=...) renames "
                f"({self._names}); nothing was renamed in these rows"
            )

    @property
    def _names(self) -> str:
        return ", ".join(map(repr, self._columns.values()))
