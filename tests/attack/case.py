"""One attack. A row of the table has several."""

from collections.abc import Callable
from typing import NamedTuple


class Case(NamedTuple):
    """An attack. It raises an error if nplora fails.

    Attributes:
        row: the kind of attack.
        name: its name among the attacks of this row.
        attack: may return the number of attacks it made, or a measurement as text.
    """

    row: str
    name: str
    attack: Callable[[], int | str | None]
