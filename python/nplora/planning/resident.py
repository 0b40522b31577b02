"""Bytes of this process: in memory now, at most until now, and mapped but not read yet."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ ")
_KIBIBYTE = 1024
_LEAST_PLAIN = 1 << 20  # of a number without a unit: what is less was meant in another one


def parse_bytes(memory: int | str) -> int:
    """600M, 1.5G, 512MiB or a number of bytes.

    Raises:
        ValueError: it is none of these, not above 0, or a small number whose unit was forgotten.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([KMG]?I?)B?", str(memory).strip().upper())
    if found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        raise ValueError(f"memory is {memory!r}, expected a size like 600M, 1.5G or 512MiB")
    size = int(float(found[1]) * _UNITS[found[2]])
    if not found[2] and size < _LEAST_PLAIN:
        raise ValueError(f"memory is {memory!r}, {size:,} bytes: give a unit, as in 600M, 1.5G or 512MiB")
    return size


def current_memory() -> int:
    """Bytes in memory now, mapped files included."""
    return _status("VmRSS") or _largest()


def available_memory() -> int | None:
    """Bytes that this process may come to have, with those it has; None where the system does not tell."""
    lines = (line for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:"))
    free = next((int(line.split()[1]) * _KIBIBYTE for line in lines), None)
    return None if free is None else free + _status("RssAnon")  # pages of files are free already


def peak_memory() -> int:
    """The most bytes that the process had in memory at a time, mapped files included.

    Not by `getrusage` where the system tells it otherwise: there a child begins with its parent's peak.
    """
    return _status("VmHWM") or _largest()


def unread(source: str) -> int:
    """Bytes that are mapped of a model, its file or the weights beside its config.json, and not read yet."""
    beside = Path(source).parent.glob("*.safetensors")
    weights = {os.path.realpath(path) for path in (Path(source), *beside)}
    found, reading = 0, False
    for line in _lines("/proc/self/smaps"):
        if _MAPPING.match(line):
            reading = "/" + line.partition("/")[2] in weights
        elif reading and line.startswith(("Size:", "Rss:")):
            size = int(line.split()[1]) * _KIBIBYTE
            found += size if line.startswith("Size:") else -size
    return found


def _status(name: str) -> int:
    lines = (line for line in _lines("/proc/self/status") if line.startswith(f"{name}:"))
    return next((int(line.split()[1]) * _KIBIBYTE for line in lines), 0)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:  # not Linux
        return []


def _largest() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIBIBYTE
