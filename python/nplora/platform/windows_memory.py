"""Windows' counters of memory and CPU time."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

_THIS_PROCESS = -1
_QUERY_AND_READ = 0x1000 | 0x0010  # PROCESS_QUERY_LIMITED_INFORMATION, PROCESS_VM_READ


class Counters(NamedTuple):
    """The memory of a process in bytes.

    Attributes:
        resident: the memory in use now.
        peak: the most memory in use so far.
        private: the memory that the process does not share with other processes.
    """

    resident: int
    peak: int
    private: int


class _Counters(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS_EX."""

    _fields_ = (
        ("cb", ctypes.c_uint32),
        ("PageFaultCount", ctypes.c_uint32),
        ("PeakWorkingSetSize", ctypes.c_size_t),
        ("WorkingSetSize", ctypes.c_size_t),
        ("QuotaPeakPagedPoolUsage", ctypes.c_size_t),
        ("QuotaPagedPoolUsage", ctypes.c_size_t),
        ("QuotaPeakNonPagedPoolUsage", ctypes.c_size_t),
        ("QuotaNonPagedPoolUsage", ctypes.c_size_t),
        ("PagefileUsage", ctypes.c_size_t),
        ("PeakPagefileUsage", ctypes.c_size_t),
        ("PrivateUsage", ctypes.c_size_t),
    )


class _Machine(ctypes.Structure):
    """MEMORYSTATUSEX."""

    _fields_ = (
        ("dwLength", ctypes.c_uint32),
        ("dwMemoryLoad", ctypes.c_uint32),
        ("ullTotalPhys", ctypes.c_uint64),
        ("ullAvailPhys", ctypes.c_uint64),
        ("ullTotalPageFile", ctypes.c_uint64),
        ("ullAvailPageFile", ctypes.c_uint64),
        ("ullTotalVirtual", ctypes.c_uint64),
        ("ullAvailVirtual", ctypes.c_uint64),
        ("ullAvailExtendedVirtual", ctypes.c_uint64),
    )


def _kernel() -> Any:
    return vars(ctypes)["windll"].kernel32  # mypy knows this name on Windows only


def counters(process: int = _THIS_PROCESS) -> Counters:
    """The memory of the process that has the handle `process`."""
    found = _Counters()
    found.cb = ctypes.sizeof(found)
    _kernel().K32GetProcessMemoryInfo(ctypes.c_void_p(process), ctypes.byref(found), found.cb)
    private = max(found.PrivateUsage, found.PagefileUsage)  # equal on Windows; Wine sets only PagefileUsage
    return Counters(found.WorkingSetSize, found.PeakWorkingSetSize, private)


def free() -> int:
    """The free memory of the machine."""
    found = _Machine()
    found.dwLength = ctypes.sizeof(found)
    _kernel().GlobalMemoryStatusEx(ctypes.byref(found))
    return int(found.ullAvailPhys)


def usage(pid: int) -> tuple[int, float] | None:
    """The private bytes of a process and its seconds of CPU time; None if there is no such process."""
    open_process = _kernel().OpenProcess
    open_process.restype = ctypes.c_void_p
    handle = open_process(_QUERY_AND_READ, False, pid)
    if not handle:
        return None
    try:
        times = [ctypes.c_uint64() for _ in range(4)]  # creation, exit, kernel, user, in units of 100 ns
        if not _kernel().GetProcessTimes(ctypes.c_void_p(handle), *map(ctypes.byref, times)):
            return None
        return counters(handle).private, (times[2].value + times[3].value) / 1e7
    finally:
        _kernel().CloseHandle(ctypes.c_void_p(handle))
