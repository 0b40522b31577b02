"""macOS' counters of memory and CPU time."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple


class Usage(NamedTuple):
    """The usage of a process.

    Attributes:
        resident: the number of bytes of the process in physical memory.
        footprint: the number of bytes that macOS compares with its memory limits.
        seconds: the CPU time in seconds.
    """

    resident: int
    footprint: int
    seconds: float


class _Rusage(ctypes.Structure):
    """struct rusage_info_v0 of <sys/resource.h>."""

    _fields_ = (
        ("uuid", ctypes.c_uint8 * 16),
        ("user_time", ctypes.c_uint64),
        ("system_time", ctypes.c_uint64),
        ("pkg_idle_wkups", ctypes.c_uint64),
        ("interrupt_wkups", ctypes.c_uint64),
        ("pageins", ctypes.c_uint64),
        ("wired_size", ctypes.c_uint64),
        ("resident_size", ctypes.c_uint64),
        ("phys_footprint", ctypes.c_uint64),
        ("proc_start_abstime", ctypes.c_uint64),
        ("proc_exit_abstime", ctypes.c_uint64),
    )


@functools.cache
def _system() -> Any:
    return ctypes.CDLL(None)


def usage(pid: int) -> Usage | None:
    """The usage of a process; None if there is no such process."""
    used = _Rusage()
    if _system().proc_pid_rusage(pid, 0, ctypes.byref(used)) != 0:
        return None
    ratio = (ctypes.c_uint32 * 2)()  # nanoseconds in a tick: 1 on Intel, 125/3 on Apple's processors
    _system().mach_timebase_info(ctypes.byref(ratio))
    seconds = (used.user_time + used.system_time) * ratio[0] / ratio[1] / 1e9
    return Usage(used.resident_size, used.phys_footprint, seconds)


def free() -> int | None:
    """The available memory in bytes, computed from the percentage that macOS reports; None if unknown."""
    percent = _number(b"kern.memorystatus_level", ctypes.c_int)
    total = _number(b"hw.memsize", ctypes.c_uint64)
    return None if percent is None or total is None else total * percent // 100


def text(name: bytes) -> str:
    """The text that sysctl returns for a name, or an empty text if there is no such name."""
    buffer, size = ctypes.create_string_buffer(256), ctypes.c_size_t(256)
    found = _system().sysctlbyname(name, buffer, ctypes.byref(size), None, ctypes.c_size_t(0))
    return buffer.value.decode(errors="replace") if found == 0 else ""


def _number(name: bytes, kind: type[Any]) -> int | None:
    value, size = kind(), ctypes.c_size_t(ctypes.sizeof(kind))
    found = _system().sysctlbyname(name, ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return int(value.value) if found == 0 else None
