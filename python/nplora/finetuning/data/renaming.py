"""Counts the rows whose fields the option `columns` renames, and the rows that keep their own names."""

from __future__ import annotations

import collections
from collections.abc import Mapping

from nplora.finetuning.data.sources import Source
from nplora.formats.errors import DataError, counted
from nplora.runtime.user_warning import warn_user


class RenamedRows:
    """Counts the rows that were renamed and those that were not, to find misspelled names in `columns`."""

    def __init__(self) -> None:
        self._renamed = 0
        self._others = collections.Counter[str]()  # for each source, the rows that were not renamed

    def add(self, source: Source, is_renamed: bool) -> None:
        """Count a row of the source."""
        if is_renamed:
            self._renamed += 1
        else:
            self._others[source.name] += 1

    def check(self, columns: Mapping[str, str], may_be_none: bool) -> None:
        """After all rows were added, warn about the rows whose fields were not renamed.

        Args:
            may_be_none: whether it is allowed that no row of any source was renamed.
        Raises:
            DataError: no row was renamed, and `may_be_none` is False.
        """
        if not columns or not self._others:
            return
        names = ", ".join(map(repr, columns.values()))
        if not self._renamed and not may_be_none:
            raise DataError(
                f"{', '.join(self._others)}: no row has a field that columns renames ({names}); without "
                "--columns (columns), the rows can be read as they are"
            )
        for source, rows in self._others.items():
            warn_user(
                f"{source}: {counted(rows, 'row')} without any field that columns renames ({names}); "
                "nothing was renamed in these rows"
            )
