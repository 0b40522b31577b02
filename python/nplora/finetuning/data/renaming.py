"""Counts the rows whose fields the option `columns` renames, and the rows that keep their own names."""

from __future__ import annotations

import collections
from collections.abc import Mapping

from nplora.finetuning.data.rows import Row
from nplora.finetuning.data.sources import Source
from nplora.formats.errors import DataError, counted
from nplora.runtime.user_warning import warn_user


class RenamedRows:
    """Finds rows without the names in `columns`, over several sources. Such a name may be misspelled.

    Args:
        columns: a dict from the names that the formats use to the names in the data.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self._columns = columns
        self._is_found = False
        self._others = collections.Counter[str]()  # for each source, the rows that keep their own names

    def see(self, row: Row) -> None:
        """Notice whether a row has any of the names. The row may turn out to be bad."""
        self._is_found = self._is_found or not {*self._columns.values()}.isdisjoint(row.values)

    def keep(self, source: Source) -> None:
        """Count a row that was read without renaming."""
        self._others[source.name] += 1

    def require(self) -> None:
        """After all rows were seen, raise a DataError if no row has any of the names."""
        if self._columns and self._others and not self._is_found:
            raise DataError(
                f"{', '.join(self._others)}: no row has a field that columns renames ({self._names}); "
                "correct the names in --columns (columns), or leave it out to read the rows as they are"
            )

    def warn(self) -> None:
        """After all rows were counted, warn about those that were read without renaming."""
        for source, rows in self._others.items() if self._columns else ():
            warn_user(
                f"{source}: {counted(rows, 'row')} without any field that columns renames ({self._names}); "
                "nothing was renamed in these rows"
            )

    @property
    def _names(self) -> str:
        return ", ".join(map(repr, self._columns.values()))
