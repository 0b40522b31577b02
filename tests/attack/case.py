"""One attack, as a row of the table has several."""

from collections.abc import Callable
from typing import NamedTuple


class Case(NamedTuple):
    """An attack, which raises an error where nplora does not hold.

    Attributes:
        row: the kind of attack.
        name: its name among the attacks of this row.
        attack: may return how many attacks it made, or a measurement as text.
    """

    row: str
    name: str
    attack: Callable[[], int | str | None]
