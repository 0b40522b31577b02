"""The machine: its name, its processor, and the cores that this process may use."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of a machine
_KEYS = ("model name", "Model", "Hardware")  # x86-64 has the first key, some ARM boards one of the others


def cpu_name() -> str:
    """The processor's name, such as "AMD EPYC 9B45", or its architecture if the system gives no name."""
    if sys.platform == "darwin":
        from nplora.platform.macos_memory import text

        return text(b"machdep.cpu.brand_string") or platform.machine()
    if sys.platform == "win32":
        return _named_in_registry() or platform.processor() or platform.machine()
    try:
        lines = _CPU_INFO.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    named = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    found = next((named[key] for key in _KEYS if named.get(key)), "")
    return " ".join(found.split()) or platform.processor() or platform.machine()


def _named_in_registry() -> str:
    if sys.platform == "win32":
        import winreg

        with contextlib.suppress(OSError):
            key = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
            with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, key) as processor:
                return " ".join(str(winreg.QueryValueEx(processor, "ProcessorNameString")[0]).split())
    return ""


def host_name() -> str:
    """The name of the machine in its network."""
    return platform.node()


def system_name() -> str:
    """The operating system, its version and the architecture, for a bug report."""
    return platform.platform()


def machine_id() -> str:
    """A text that is the same in all processes of one machine, and should differ between machines.

    On Linux, it is the ID of the boot. On other systems, it is the name of the machine.
    """
    if sys.platform == "win32":
        return host_name()
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return host_name()


def usable_cores() -> frozenset[int]:
    """The indices of the cores that this process may use.

    On systems other than Linux, limits of the process are ignored: the result is all cores of the machine.
    """
    if sys.platform == "linux":
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def has_threads() -> bool:
    """Whether Python can start threads. In a browser, it cannot."""
    return sys.platform != "emscripten"
