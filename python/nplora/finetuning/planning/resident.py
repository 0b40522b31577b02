"""The memory of this process: used now, used at the peak, available, and mapped but not read yet."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from nplora.formats.files import StrPath
from nplora.runtime.memory import largest_memory

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
_LEAST_PLAIN = 1 << 20  # bytes; a smaller number without a unit is a mistake
_ROOT = Path("/")
_NUMBER = r"(\d{1,19})"
_GROUP = r"(?m)^\d+:([^:\n]*):(/.*)$"  # the controllers (none in version 2) and the path
_CACHES = ("active_file", "inactive_file", "slab_reclaimable")


def parse_bytes(memory: int | str, op: str = "parse_bytes", name: str = "memory") -> int:
    """Read a size such as 600M, 1.5G or 512MiB, or a plain number of bytes. Return the number of bytes.

    Args:
        op, name: the operation and the argument that error messages name.
    Raises:
        ValueError: the text is not a size, or the size is not above 0; or the size is below 1 MiB and has no
            unit, which was probably forgotten.

    >>> nplora.finetuning.planning.parse_bytes("600M")
    600000000
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([KMGT]?I?)B?", str(memory).strip().upper())
    if found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        raise ValueError(f"{op}: {name} is {memory!r}, expected a size like 600M, 1.5G or 512MiB")
    size = int(float(found[1]) * _UNITS[found[2]])
    if not found[2] and size < _LEAST_PLAIN:
        raise ValueError(
            f"{op}: {name} is {memory!r}, {size:,} bytes: give a unit, as in 600M, 1.5G or 512MiB"
        )
    return size


def current_memory() -> int:
    """The bytes that this process has in memory now, including mapped files.

    >>> nplora.finetuning.planning.current_memory() > 1e6
    True
    """
    return _status("VmRSS") or largest_memory()


def available_memory() -> int | None:
    """The bytes that this process can have at most, including what it has now; None if unknown.

    The result is the lowest limit of the machine and of all control groups (containers) of the process.

    >>> available = nplora.finetuning.planning.available_memory()
    >>> available is None or available > 1e6
    True
    """
    free = [*_sizes("proc/meminfo", "MemAvailable"), *_left_in_groups()]
    own = _status("RssAnon") + _status("RssShmem")  # pages of files count as free
    return min(free) + own if free else None


def unread(source: str) -> int:
    """The bytes of a model that are mapped but not read yet.

    Args:
        source: the model's file, or the config.json in the directory of the model's weights.
    """
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
    """The bytes that each limit of the process's control groups leaves free. Caches count as free."""
    for controllers, path in re.findall(_GROUP, _text("proc/self/cgroup")):
        if not controllers:
            limits, use, total = ["memory.max", "memory.high"], "memory.current", ""
        elif "memory" in controllers.split(","):  # total_: with the groups below, as in version 2
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
    """The text of a file in /proc or /sys, or an empty text if the file does not exist.

    The file may contain file names, which may hold any bytes.
    """
    try:
        return os.fsdecode((_ROOT / path).read_bytes())
    except (OSError, ValueError):  # not Linux, or no such group; ValueError: not a file name
        return ""
