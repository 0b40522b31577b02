"""Bytes of this process: in memory now, at most until now, and mapped but not read yet."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

from nplora.formats.files import StrPath

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ ")
_KIBIBYTE = 1024
_LEAST_PLAIN = 1 << 20  # of a number without a unit: what is less was meant in another one
_ROOT = Path("/")
_GROUPS = {  # by the controllers in /proc/self/cgroup (none in version 2): place, and files of limit and use
    "": ("sys/fs/cgroup", "memory.max", "memory.current"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}


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
    """Bytes that this process may come to have, with those it has; None where the system does not tell.

    The machine and every control group (container) that the process is in may set the limit.
    """
    free = [*_sizes("proc/meminfo", "MemAvailable"), *_left_in_groups()]
    own = _status("RssAnon") + _status("RssShmem")  # pages of files are free already
    return min(free) + own if free else None


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
    for line in _lines("proc/self/smaps"):
        if _MAPPING.match(line):
            reading = "/" + line.partition("/")[2] in weights
        elif reading and line.startswith(("Size:", "Rss:")):
            size = int(line.split()[1]) * _KIBIBYTE
            found += size if line.startswith("Size:") else -size
    return found


def _left_in_groups() -> Iterator[int]:
    """What the limit of each of the process's groups leaves, pages of files counted as free."""
    for line in _lines("proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers not in _GROUPS:
            continue
        place, limit, use = _GROUPS[controllers]
        group = Path(f"{place}{path}")
        for directory in (group, *group.parents):
            most, used = ("".join(_lines(directory / name)) for name in (limit, use))
            if most.isdecimal() and used.isdecimal():  # the limit may be "max"
                stat = dict(text.split() for text in _lines(directory / "memory.stat"))
                total = "total_" if controllers else ""  # with the groups below, as version 2 has it always
                files = (stat.get(f"{total}{kind}_file", 0) for kind in ("active", "inactive"))
                yield int(most) - int(used) + sum(map(int, files))


def _status(name: str) -> int:
    return next(_sizes("proc/self/status", name), 0)


def _sizes(path: str, name: str) -> Iterator[int]:
    lines = (line for line in _lines(path) if line.startswith(f"{name}:"))
    return (int(line.split()[1]) * _KIBIBYTE for line in lines)


def _lines(path: StrPath) -> list[str]:
    try:
        return (_ROOT / path).read_text().splitlines()
    except OSError:  # not Linux, or no such group
        return []


def _largest() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIBIBYTE
