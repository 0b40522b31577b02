"""Where the rows of a pass stand in their sequences: packed in a run, or in the slots of a cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from nplora.models.rope import Rope

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Places:
    """Packed sequences.

    Attributes:
        starts: int64 (sequences + 1,), where each begins; the last entry is the number of rows n.
        positions: int64 (n,), the place of each row in its own sequence.
        table: the rotation's, with a row for every position.
    """

    starts: Array
    positions: Array
    table: Array


@dataclasses.dataclass(frozen=True, slots=True)
class CachePlaces:
    """New tokens of the sequences in a cache.

    Attributes:
        slots, positions: int64 (m,), the sequence of each row and its place there.
        lengths: positions + 1, the tokens that each row sees.
        cells: the index of the rows' keys and values in an array (slots, capacity, ...).
        table: as in Places.
    """

    slots: Array
    positions: Array
    lengths: Array
    cells: tuple[Any, Any]
    table: Array


def packed_places(starts: Array, rope: Rope) -> Places:
    """The places of sequences that begin at `starts`."""
    counts = np.diff(starts)
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1], counts)
    return Places(starts, positions, rope.table(int(counts.max(initial=0))))


def cache_places(slots: Array, lengths: Array, count: int, rope: Rope) -> CachePlaces:
    """The places of the next `count` tokens of the sequences in `slots`, which hold `lengths` tokens."""
    positions = (lengths[:, None] + np.arange(count)).reshape(-1)
    table = rope.table(int(positions.max(initial=-1)) + 1)
    rows = np.repeat(slots, count)
    cells: tuple[Any, Any] = (rows, positions)
    if len(slots) == 1:  # a run, which NumPy reaches faster
        cells = int(slots[0]), slice(int(positions[0]), int(positions[-1]) + 1)
    return CachePlaces(rows, positions, positions + 1, cells, table)
