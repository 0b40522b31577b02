"""Sizes in bytes: parses a size such as 600M, and measures how much of a model's files is not read yet."""

from __future__ import annotations

import os
import re
from pathlib import Path

from nplora.platform import memory

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
_LEAST_PLAIN = 1 << 20  # bytes; a smaller number without a unit is a mistake


def parse_bytes(memory: int | str, op: str = "parse_bytes", name: str = "memory") -> int:
    """Read a size such as 600M, 1.5G or 512MiB, or a plain number of bytes. Return the number of bytes.

    Args:
        op, name: the operation and the argument, for error messages.
    Raises:
        ValueError: the text is not a size; or the size is not above 0; or the size has no unit and is below
            1 MiB, so that a unit was probably forgotten.

    >>> nplora.finetuning.planning.parse_bytes("600M")
    600000000
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([KMGT]?I?)B?", str(memory).strip().upper())
    if found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        raise ValueError(f"{op}: {name} is {memory!r}, expected a size like 600M, 1.5G or 512MiB")
    size = int(float(found[1]) * _UNITS[found[2]])
    if not found[2] and size < _LEAST_PLAIN:
        raise ValueError(
            f"{op}: {name} is {memory!r}, which means {size:,} bytes: give a unit, as in 600M, 1.5G or 512MiB"
        )
    return size


def unread(source: str) -> int:
    """The number of bytes of a model's files that the process has mapped but not read yet.

    Args:
        source: the model's file, or the config.json in the directory of the model's weights.
    """
    beside = Path(source).parent.glob("*.safetensors")
    return memory.unread({os.path.realpath(path) for path in (Path(source), *beside)})
