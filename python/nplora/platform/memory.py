"""The memory of this process and of the machine, in bytes."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.platform == "win32":
    from nplora.platform import windows_memory
elif sys.platform == "emscripten":
    import ctypes
else:
    import resource
if sys.platform == "darwin":
    from nplora.platform import macos_memory

_KIBIBYTE = 1024
_WASM_MEMORY = 4 << 30  # the bytes that 32-bit addresses can reach
_ROOT = Path("/")
_NUMBER = r"(\d{1,19})"
_GROUP = r"(?m)^\d+:([^:\n]*):(/.*)$"  # a control group: its controllers (none in version 2) and its path
_CACHES = ("active_file", "inactive_file", "slab_reclaimable")
_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ ")


def peak_memory() -> int:
    """The peak memory of this process, including mapped files.

    `getrusage` is only the fallback: in a child process, it may report the peak of the parent process.

    >>> from nplora.platform.memory import peak_memory
    >>> peak_memory() > 1e6
    True
    """
    if sys.platform == "win32":
        return windows_memory.counters().peak
    return next(_sizes("proc/self/status", "VmHWM"), 0) or largest_memory()


def largest_memory() -> int:
    """The peak memory that `getrusage` reports.

    On Windows, this is the largest working set; in a browser, the size of the heap.
    """
    if sys.platform == "win32":
        return windows_memory.counters().peak
    elif sys.platform == "emscripten":
        return int(ctypes.CDLL(None).emscripten_get_heap_size())  # a browser's heap never shrinks
    else:
        unit = 1 if sys.platform == "darwin" else _KIBIBYTE  # macOS counts bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def current_memory() -> int:
    """The bytes that this process has in memory now, including mapped files.

    >>> nplora.finetuning.planning.current_memory() > 1e6
    True
    """
    if sys.platform == "win32":
        return windows_memory.counters().resident
    if sys.platform == "darwin":
        used = macos_memory.usage(os.getpid())
        return used.resident if used is not None else largest_memory()
    return _status("VmRSS") or largest_memory()


def available_memory() -> int | None:
    """The number of bytes that this process can use, including the bytes that it uses now; None if unknown.

    The machine and the process's control groups (containers) set limits. The result is the lowest limit.

    >>> available = nplora.finetuning.planning.available_memory()
    >>> available is None or available > 1e6
    True
    """
    if sys.platform == "win32":
        return windows_memory.free() + windows_memory.counters().private
    if sys.platform == "darwin":
        free, used = macos_memory.free(), macos_memory.usage(os.getpid())
        return None if free is None or used is None else free + used.footprint
    if sys.platform == "emscripten":
        return _WASM_MEMORY
    left = [*_sizes("proc/meminfo", "MemAvailable"), *_left_in_groups()]
    own = _status("RssAnon") + _status("RssShmem")  # not RssFile, whose pages `left` already contains
    return min(left) + own if left else None


def unread(files: set[str]) -> int:
    """How many bytes of the mapped files `files` are not in memory; 0 if the system does not report this."""
    if sys.platform == "win32":
        return 0
    found, reading = 0, False
    for line in _text("proc/self/smaps").split("\n"):
        if _MAPPING.match(line):
            reading = "/" + line.partition("/")[2] in files
        elif reading and line.startswith(("Size:", "Rss:")):
            size = int(line.split()[1]) * _KIBIBYTE
            found += size if line.startswith("Size:") else -size
    return found


def usage_of(pid: int) -> tuple[int, float] | None:
    """Return a pair for another process: its memory in bytes, and its CPU time in seconds. None: unknown."""
    if sys.platform == "win32":
        return windows_memory.usage(pid)
    if sys.platform == "darwin":
        used = macos_memory.usage(pid)
        return None if used is None else (used.footprint, used.seconds)
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    ticks = int(fields[11]) + int(fields[12])
    return int(fields[20]), ticks / os.sysconf("SC_CLK_TCK")  # the mapped memory, which RLIMIT_AS counts


def _left_in_groups() -> Iterator[int]:
    """For each memory limit of the process's control groups, yield the number of bytes that are still free.

    Memory that caches use counts as free.
    """
    for controllers, path in re.findall(_GROUP, _text("proc/self/cgroup")):
        if not controllers:
            limits, use, total = ["memory.max", "memory.high"], "memory.current", ""
        elif "memory" in controllers.split(","):  # total_ includes the child groups, as in version 2
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


def _text(path: str | os.PathLike[str]) -> str:
    """The text of a file in /proc or /sys, or an empty text if the file does not exist.

    The text may contain file names, which may consist of any bytes.
    """
    try:
        return os.fsdecode((_ROOT / path).read_bytes())
    except (OSError, ValueError):  # not Linux, or no such group; ValueError: not a file name
        return ""
