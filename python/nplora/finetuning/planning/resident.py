"""Bytes of this process: in memory now, at most until now, and mapped but not read yet."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

from nplora.formats.files import StrPath

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
_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ ")
_KIBIBYTE = 1024
_LEAST_PLAIN = 1 << 20  # of a number without a unit: what is less was meant in another one
_ROOT = Path("/")
_NUMBER = r"(\d{1,19})"
_GROUP = r"(?m)^\d+:([^:\n]*):(/.*)$"  # controllers, none in version 2, and the path
_CACHES = ("active_file", "inactive_file", "slab_reclaimable")


def parse_bytes(memory: int | str) -> int:
    """600M, 1.5G, 512MiB or a number of bytes.

    Raises:
        ValueError: it is none of these, not above 0, or a small number whose unit was forgotten.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([KMGT]?I?)B?", str(memory).strip().upper())
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
    for line in _text("proc/self/smaps").split("\n"):
        if _MAPPING.match(line):
            reading = "/" + line.partition("/")[2] in weights
        elif reading and line.startswith(("Size:", "Rss:")):
            size = int(line.split()[1]) * _KIBIBYTE
            found += size if line.startswith("Size:") else -size
    return found


def _left_in_groups() -> Iterator[int]:
    """What each limit of the process's groups leaves, caches counted as free."""
    for controllers, path in re.findall(_GROUP, _text("proc/self/cgroup")):
        if not controllers:
            limits, use, total = ["memory.max", "memory.high"], "memory.current", ""
        elif "memory" in controllers.split(","):  # total: with the groups below, as version 2 has it always
            limits, use, total = ["memory.limit_in_bytes"], "memory.usage_in_bytes", "total_"
        else:
            continue
        mount = Path("sys/fs/cgroup", controllers)
        group = Path(f"{mount}{path}")
        for directory in (group, *group.parents):
            if not directory.is_relative_to(mount):
                break
            stat = dict(re.findall(rf"(?m)^(\w+) {_NUMBER}$", _text(directory / "memory.stat")))
            free = sum(int(stat.get(f"{total}{kind}", 0)) for kind in _CACHES)
            for limit in limits:
                most, used = (re.match(f"{_NUMBER}$", _text(directory / name)) for name in (limit, use))
                if most and used:  # the limit may be "max"
                    yield int(most[1]) - int(used[1]) + free


def _status(name: str) -> int:
    return next(_sizes("proc/self/status", name), 0)


def _sizes(path: str, name: str) -> Iterator[int]:
    found = re.findall(rf"(?m)^{name}:\s*{_NUMBER} kB$", _text(path))
    return (int(size) * _KIBIBYTE for size in found)


def _text(path: StrPath) -> str:
    """As the kernel wrote it: a file's name may hold any byte but a line's end."""
    try:
        return os.fsdecode((_ROOT / path).read_bytes())
    except (OSError, ValueError):  # not Linux, or no such group; ValueError: no name of a file
        return ""


def _largest() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIBIBYTE
