"""Divides sources into a part to train on and a part to evaluate on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nplora.finetuning.data.rows import Row
from nplora.finetuning.data.sources import Source
from nplora.formats.errors import DataError, counted


@dataclass(frozen=True)
class Part:
    """One side of a data set that is divided by a hash of each row, so that a row stays on its side.

    Attributes:
        share: the share of the rows that are held out, on average.
        held_out: whether this side has the rows that are held out.
    """

    share: float
    held_out: bool

    def has(self, values: Mapping[str, Any]) -> bool:
        text = json.dumps(values, sort_keys=True, default=str, skipkeys=True).encode()
        place = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
        return (place < self.share * 2.0**64) == self.held_out


def split_sources(op: str, sources: list[Source], share: float) -> tuple[list[Source], list[Source]]:
    """The sources with the rows to train on, and those with the rows that are held out.

    A hash of each row decides, so a row stays on its side when others are added or the order changes. The
    rows are read once to count them.

    Args:
        share: the share of the rows that are held out, on average.
    Raises:
        DataError: no row is held out, or all rows are; or `read_rows` fails.
        ValueError: a source is a plain text, which has no rows.
    """
    for source in sources:
        if source.is_text:
            raise ValueError(f"{op}: {source.name} is a plain text, which has no rows to hold out")
    counts = [_count(source, share) for source in sources]
    rows, held_out = (sum(numbers) for numbers in zip(*counts, strict=True))
    if rows and held_out in (0, rows):
        names = ", ".join(source.name for source in sources)
        use, change = ("evaluate", "larger") if not held_out else ("train", "smaller")
        raise DataError(
            f"{names}: valid_split={share} holds out {held_out} of {counted(rows, 'row')}, which leaves none "
            f"to {use} on; expected a {change} share, or a file of its own as validation data"
        )
    train = [_part(s, share, False) for s, (all_, held) in zip(sources, counts, strict=True) if held < all_]
    valid = [_part(s, share, True) for s, (_, held) in zip(sources, counts, strict=True) if held]
    return train or sources, valid


def _count(source: Source, share: float) -> tuple[int, int]:
    """The number of rows, and of those that are held out. A row that cannot be read is not held out."""
    part, rows, held_out = Part(share, held_out=True), 0, 0
    for row in source.read():
        rows += 1
        held_out += row.error is None and part.has(row.values)
    return rows, held_out


def _part(source: Source, share: float, held_out: bool) -> Source:
    part = Part(share, held_out)

    def read() -> Iterator[Row]:
        for row in source.read():
            if part.has(row.values) if row.error is None else not held_out:
                yield row

    name = f"{source.name}, held out" if held_out else source.name
    return dataclasses.replace(source, name=name, read=read)
